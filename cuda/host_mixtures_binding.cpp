// The binding of cpu/host_mixtures.h; localr1/kernels/host_mixtures.py is its documented face.
#include "cpu/host_mixtures.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checked.h"

namespace nb = nanobind;

namespace localr1 {
namespace {

// table: addresses of the layer's experts in RAM. exchange: those of chosen, x and outputs.
Address add_layer(HostMixtures& mixtures, int64_t number, const ExpertLayout& layout, Address table,
                  int64_t count, Address on_card, int64_t per_token,
                  std::tuple<Address, Address, Address> exchange) {
  require(layout.gate.rows_per_block == mixtures.table().rows_per_block, "rows per block of the experts",
          mixtures.table().rows_per_block, layout.gate.rows_per_block);
  require(count >= 1, "experts: at least", 1, count);
  require(per_token >= 1, "experts per token: at least", 1, per_token);
  const auto [chosen, x, outputs] = exchange;
  return Address(mixtures.add({nullptr, number, {layout, pointer<const uint8_t*>(table), count},
                               pointer<uint8_t>(on_card), per_token, pointer<int32_t>(chosen),
                               pointer<float>(x), pointer<float>(outputs)}));
}

// (layer, chosen as the bytes of int64, seconds, how many seconds ago it began) of each.
nb::list take(HostMixtures& mixtures) {
  const std::vector<HostResult> results = mixtures.take();
  const double now = HostMixtures::seconds_now();
  nb::list list;
  for (const HostResult& result : results) {
    const nb::bytes chosen(result.chosen.data(), result.chosen.size() * sizeof(int64_t));
    list.append(nb::make_tuple(result.layer, chosen, result.seconds, now - result.begin));
  }
  return list;
}

}  // namespace

void bind_host_mixtures(nb::module_& m) {
  nb::class_<HostMixtures>(m, "HostMixtures")
      .def_prop_ro_static("run", [](nb::handle) { return reinterpret_cast<Address>(&HostMixtures::run); })
      .def("add", add_layer)
      .def("go", [](HostMixtures& mixtures, int way) { mixtures.go(HostMixtures::Way(way)); })
      .def("take", take);
}

}  // namespace localr1
