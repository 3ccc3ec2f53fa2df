// The binding of cpu/quantize_weights.h; localr1/kernels/quantize.py is its documented face and knows
// the tensors, which come as addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checked.h"
#include "cpu/pool.h"
#include "cpu/quantize_weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localr1 {
namespace {

class Quantizer {
 public:
  Quantizer(const std::string& isa, int threads) : table_(find_table(isa)), pool_(checked_threads(threads)) {}

  // blocks: scales (or 0), first row, rows and columns of a block, scales of a row of blocks.
  // scheme: bits, group, type of the scales. positions: address and number.
  // out: packed, scale, error, energy.
  void quantize(Address values, int type, int64_t rows, int64_t columns,
                std::tuple<Address, int64_t, int64_t, int64_t, int64_t> blocks,
                std::tuple<int, int, int> scheme, std::tuple<Address, int64_t> positions,
                Address importance, std::tuple<Address, Address, Address, Address> out) {
    const auto [bits, group, scale_type] = scheme;
    require(rows >= 0, "rows: at least", 0, rows);
    require(bits >= 4 && bits <= 8 && bits != 7, "bits: 4, 5, 6 or", 8, bits);
    require(group == 32 || group == 64 || group == kMaxWeightGroup, "group: 32, 64 or", kMaxWeightGroup, group);
    require(columns >= group && columns % group == 0, "columns: a multiple of", group, columns);
    require(type >= kWeightBfloat16 && type <= kWeightFp8, "type of weights: at most", kWeightFp8, type);
    require(scale_type == kBfloat16 || scale_type == kFloat16, "type of scales: at most", kFloat16, scale_type);
    const auto [scales, first_row, block_rows, block_columns, scale_columns] = blocks;
    if (type == kWeightFp8) {
      require(scales != 0 && first_row >= 0, "first row of blocks: at least", 0, first_row);
      require(block_rows >= 1 && block_columns >= 1, "sizes of a block: at least", 1, 0);
      require(scale_columns == (columns + block_columns - 1) / block_columns, "scales of a row of blocks",
              (columns + block_columns - 1) / block_columns, scale_columns);
    }
    const WeightRows source{pointer<void>(values), WeightType(type), rows,       columns,
                            pointer<float>(scales), first_row,       block_rows, block_columns, scale_columns};
    const Rounding rounding{bits,
                            group,
                            ScaleType(scale_type),
                            pointer<float>(std::get<0>(positions)),
                            std::get<1>(positions),
                            pointer<float>(importance)};
    const QuantizedRows result{pointer<uint32_t>(std::get<0>(out)), pointer<uint16_t>(std::get<1>(out)),
                               pointer<double>(std::get<2>(out)), pointer<double>(std::get<3>(out))};
    nb::gil_scoped_release release;
    quantize_rows(pool_, table_, source, rounding, result);
  }

 private:
  const KernelTable& table_;
  Pool pool_;
};

}  // namespace

void bind_quantize(nb::module_& m) {
  nb::class_<Quantizer>(m, "Quantizer")
      .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
      .def("quantize", &Quantizer::quantize);
}

}  // namespace localr1
