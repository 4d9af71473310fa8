// Stored codes: NumPy arrays and bytes, no tensors, so no torch op.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <mixbit/storage/storage.h>

namespace py = pybind11;

namespace {

namespace storage = mixbit::storage;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

std::span<const uint8_t> span_of(const py::buffer_info& info) {
  return {static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

// Any object with a contiguous buffer of bytes.
py::buffer_info contiguous(const py::buffer& data) {
  py::buffer_info info = data.request();
  py::ssize_t step = info.itemsize;
  for (py::ssize_t d = info.ndim; d-- > 0; step *= info.shape[static_cast<size_t>(d)]) {
    if (info.strides[static_cast<size_t>(d)] != step) throw std::invalid_argument("data: expected contiguous bytes");
  }
  return info;
}

py::dict to_python(const storage::Info& info) {
  using py::arg;
  return py::dict(arg("index") = storage::kIndexNames[static_cast<size_t>(info.options.index)],
                  arg("base_bits") = info.options.base_bits, arg("group_size") = info.options.group_size,
                  arg("group_axis") = info.options.group_axis, arg("shape") = info.shape, arg("weights") = info.weights,
                  arg("flagged") = info.flagged, arg("base") = info.base, arg("extra") = info.extra,
                  arg("index_bytes") = info.index, arg("header") = info.header);
}

template <typename T, typename From>
py::array_t<T> array_of(const std::vector<From>& values, const std::vector<int64_t>& shape) {
  py::array_t<T> array(shape);
  std::transform(values.begin(), values.end(), array.mutable_data(), [](From v) { return static_cast<T>(v); });
  return array;
}

}  // namespace

void bind_storage(py::module_& parent) {
  py::module_ m = parent.def_submodule("storage", "Codes of weights with extra levels as bytes.");
  m.attr("INDEX_MODES") = std::vector<std::string>(storage::kIndexNames.begin(), storage::kIndexNames.end());
  m.def(
      "encode",
      [](const Array<int16_t>& codes, const Array<uint8_t>& extra_bits, int base_bits, const std::string& index,
         int64_t group_size, int group_axis) {
        const storage::Options options{base_bits, storage::parse_index(index), group_size, group_axis};
        const std::vector<int64_t> shape(codes.shape(), codes.shape() + codes.ndim());
        std::vector<uint8_t> data;
        {
          const auto code_span = span_of(codes);
          const auto extra_span = span_of(extra_bits);
          py::gil_scoped_release release;
          data = storage::encode(code_span, extra_span, shape, options);
        }
        return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
      },
      py::arg("codes"), py::arg("extra_bits"), py::arg("base_bits"), py::arg("index"), py::arg("group_size") = 0,
      py::arg("group_axis") = 0);
  m.def(
      "inspect", [](const py::buffer& data) { return to_python(storage::inspect(span_of(contiguous(data)))); },
      py::arg("data"));
  m.def(
      "decode",
      [](const py::buffer& data, const std::optional<Array<uint8_t>>& extra_bits) {
        const py::buffer_info bytes = contiguous(data);
        std::optional<std::span<const uint8_t>> flags;
        if (extra_bits.has_value()) flags = span_of(*extra_bits);
        storage::Decoded found;
        {
          py::gil_scoped_release release;
          found = storage::decode(span_of(bytes), flags);
        }
        const std::vector<int64_t>& shape = found.info.shape;
        const py::object codes = found.info.max_bits() <= 8 ? py::object(array_of<int8_t>(found.codes, shape))
                                                            : py::object(array_of<int16_t>(found.codes, shape));
        return py::make_tuple(codes, array_of<uint8_t>(found.extra_bits, shape));
      },
      py::arg("data"), py::arg("extra_bits") = py::none());
  m.def(
      "expected_bits",
      [](int base_bits, double fraction, const std::string& index, int64_t group_size, int extra) {
        return storage::expected_bits(base_bits, fraction, storage::parse_index(index), group_size, extra);
      },
      py::arg("base_bits"), py::arg("fraction"), py::arg("index"), py::arg("group_size") = 16, py::arg("extra") = 1);
  m.def(
      "index_bits",
      [](double fraction, const std::string& index, int64_t group_size) {
        return storage::index_bits(fraction, storage::parse_index(index), group_size);
      },
      py::arg("fraction"), py::arg("index"), py::arg("group_size") = 16);
  m.def(
      "fraction_at",
      [](double bits, int base_bits, const std::string& index, int64_t group_size, int extra) {
        return storage::fraction_at(bits, base_bits, storage::parse_index(index), group_size, extra);
      },
      py::arg("bits"), py::arg("base_bits"), py::arg("index"), py::arg("group_size") = 16, py::arg("extra") = 1);
}
