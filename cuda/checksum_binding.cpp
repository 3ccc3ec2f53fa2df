// The binding of cpu/checksum.h; localr1/kernels/checksum.py is its documented face.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "cpu/checksum.h"

namespace nb = nanobind;

namespace localr1 {
namespace {

// The bytes of any object with Python's buffer protocol, which stay where they are meanwhile.
class Bytes {
 public:
  explicit Bytes(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) nb::raise_python_error();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t size() const { return size_t(view_.len); }

 private:
  Py_buffer view_;
};

ChecksumUpdate find(const std::string& name) {
  for (const ChecksumBuild& build : available_checksums()) {
    if (name == build.name) return build.update;
  }
  throw nb::value_error(("checksum: there is no build " + name + " for this processor").c_str());
}

uint32_t checksum(nb::handle buffer, uint32_t value, const std::string& build) {
  static const ChecksumUpdate best = available_checksums().front().update;
  const ChecksumUpdate update = build.empty() ? best : find(build);
  const Bytes bytes(buffer);
  nb::gil_scoped_release release;
  return crc32c(update, value, bytes.data(), bytes.size());
}

}  // namespace

void bind_checksum(nb::module_& m) {
  m.def("available_checksums", [] {
    std::vector<std::string> names;
    for (const ChecksumBuild& build : available_checksums()) names.emplace_back(build.name);
    return names;
  });
  m.def("crc32c", checksum);
  m.def("crc32c_joined", crc32c_joined);
}

}  // namespace localr1
