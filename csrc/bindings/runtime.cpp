// The integer runtime: packages as bytes, networks on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <mixbit/runtime/kernels.h>
#include <mixbit/runtime/network.h>
#include <mixbit/runtime/package.h>

namespace py = pybind11;

namespace {

namespace rt = mixbit::runtime;

using Reals = py::array_t<float, py::array::c_style>;

std::string shown(const py::handle& value) { return py::repr(value).cast<std::string>(); }

// (name, bits, array): int8 codes of `bits` bits; bits 0 with int32, float32 or uint8.
rt::Array to_array(const py::tuple& entry, std::vector<py::array>* kept) {
  rt::Array out;
  out.name = entry[0].cast<std::string>();
  out.bits = entry[1].cast<int>();
  py::array array = py::array::ensure(entry[2], py::array::c_style);
  const bool known = array && (array.dtype().equal(py::dtype::of<int8_t>()) || out.bits == 0);
  if (known && out.bits == 0 && array.dtype().equal(py::dtype::of<int32_t>())) {
    out.type = rt::TensorType::kInt32;
  } else if (known && out.bits == 0 && array.dtype().equal(py::dtype::of<float>())) {
    out.type = rt::TensorType::kFloat32;
  } else if (known && out.bits == 0 && array.dtype().equal(py::dtype::of<uint8_t>())) {
    out.type = rt::TensorType::kUint8;
  } else if (!known || out.bits == 0) {
    throw rt::Error("tensor '" + out.name + "': expected int8 codes, or int32, float32 or uint8 with 0 bits");
  }
  out.shape.assign(array.shape(), array.shape() + array.ndim());
  out.data = array.data();
  kept->push_back(std::move(array));
  return out;
}

py::bytes make_package(const std::string& manifest, const py::list& tensors) {
  std::vector<py::array> kept;
  std::vector<rt::Array> arrays;
  for (const auto& entry : tensors) arrays.push_back(to_array(entry.cast<py::tuple>(), &kept));
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    bytes = rt::make_package(manifest, arrays);
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The batch of an input; throws where its shape is another.
int64_t batch_of(const rt::Network& network, const Reals& x) {
  const rt::Shape& shape = network.package().input_shape();
  bool fits = x.ndim() == static_cast<py::ssize_t>(shape.size()) + 1;
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = x.shape(static_cast<py::ssize_t>(i) + 1) == shape[i];
  if (!fits) {
    std::string expected = "(batch";
    for (const int64_t size : shape) expected += ", " + std::to_string(size);
    throw rt::Error("input has shape " + shown(x.attr("shape")) + ", expected " + expected + ")");
  }
  return x.shape(0);
}

py::list run(rt::Network& network, const Reals& x, std::vector<double>* seconds) {
  const int64_t batch = batch_of(network, x);
  std::vector<Reals> outputs;
  std::vector<float*> at;
  for (const int output : network.package().outputs()) {
    std::vector<py::ssize_t> shape{batch};
    for (const int64_t size : network.package().nodes()[static_cast<size_t>(output)].shape) shape.push_back(size);
    outputs.emplace_back(shape);
    at.push_back(outputs.back().mutable_data());
  }
  const float* data = x.data();
  {
    py::gil_scoped_release release;
    network.run(data, batch, at, seconds != nullptr ? std::span<double>(*seconds) : std::span<double>());
  }
  py::list list;
  for (Reals& output : outputs) list.append(std::move(output));
  return list;
}

py::dict values(rt::Network& network, const Reals& x) {
  const int64_t batch = batch_of(network, x);
  const float* data = x.data();
  std::vector<std::vector<int16_t>> codes;
  {
    py::gil_scoped_release release;
    codes = network.values(data, batch);
  }
  py::dict all;
  for (size_t i = 0; i < codes.size(); ++i) {
    const rt::Node& node = network.package().nodes()[i];
    std::vector<py::ssize_t> shape{batch};
    for (const int64_t size : node.shape) shape.push_back(size);
    py::array_t<int16_t> array(shape);
    if (!codes[i].empty()) std::memcpy(array.mutable_data(), codes[i].data(), codes[i].size() * sizeof(int16_t));
    all[py::str(node.name)] = array;
  }
  return all;
}

py::list steps(const rt::Network& network, const std::vector<double>& seconds) {
  py::list list;
  for (size_t i = 0; i < network.steps().size(); ++i) {
    const rt::StepInfo& info = network.steps()[i];
    py::dict step;
    step["node"] = info.node;
    step["module"] = info.module;
    step["op"] = info.op;
    step["kernel"] = info.kernel;
    step["act_bits"] = info.act_bits;
    step["weight_bits"] = info.weight_bits;
    step["macs"] = info.macs;
    step["value_bytes"] = info.value_bytes;
    step["weight_bytes"] = info.weight_bytes;
    if (!seconds.empty()) step["seconds"] = seconds[i];
    list.append(step);
  }
  return list;
}

rt::Options options_of(int threads, const std::string& isa, bool keep_values, int64_t max_memory) {
  rt::Options options;
  options.max_memory = max_memory;
  options.threads = threads;
  options.keep_values = keep_values;
  if (!isa.empty() && !mixbit::parse_isa(isa.c_str(), &options.isa)) {
    throw rt::Error("isa=" + isa + " is not known: expected scalar, avx2, avx512, vnni or amx");
  }
  return options;
}

}  // namespace

void bind_runtime(py::module_& m) {
  py::module_ runtime = m.def_submodule("runtime");
  runtime.def("make_package", &make_package, py::arg("manifest"), py::arg("tensors"));
  py::class_<rt::Network>(runtime, "Network")
      .def(py::init(
               [](const std::string& path, int threads, const std::string& isa, bool keep_values, int64_t max_memory) {
                 const rt::Options options = options_of(threads, isa, keep_values, max_memory);
                 py::gil_scoped_release release;
                 return rt::Network(rt::Package::open(path), options);
               }),
           py::arg("path"), py::arg("threads") = 1, py::arg("isa") = "", py::arg("keep_values") = false,
           py::arg("max_memory") = int64_t{1} << 30)
      .def_static(
          "from_bytes",
          [](const py::bytes& data, int threads, const std::string& isa, bool keep_values, int64_t max_memory) {
            const rt::Options options = options_of(threads, isa, keep_values, max_memory);
            const auto view = data.cast<std::string_view>();
            std::vector<uint8_t> bytes(view.begin(), view.end());
            py::gil_scoped_release release;
            return rt::Network(rt::Package::own(std::move(bytes)), options);
          },
          py::arg("data"), py::arg("threads") = 1, py::arg("isa") = "", py::arg("keep_values") = false,
          py::arg("max_memory") = int64_t{1} << 30)
      .def_property_readonly("manifest", [](const rt::Network& n) { return n.package().manifest(); })
      .def_property_readonly("file_bytes", [](const rt::Network& n) { return n.package().file_bytes(); })
      .def_property_readonly("input_shape", [](const rt::Network& n) { return n.package().input_shape(); })
      .def_property_readonly("outputs",
                             [](const rt::Network& n) {
                               std::vector<std::pair<std::string, rt::Shape>> out;
                               for (const int i : n.package().outputs()) {
                                 const rt::Node& node = n.package().nodes()[static_cast<size_t>(i)];
                                 out.emplace_back(node.name, node.shape);
                               }
                               return out;
                             })
      .def_property_readonly("isa", [](const rt::Network& n) { return mixbit::isa_name(n.isa()); })
      .def_property_readonly("threads", &rt::Network::threads)
      .def_property_readonly("arena_bytes", &rt::Network::arena_bytes)
      .def_property_readonly("weight_bytes", &rt::Network::weight_bytes)
      .def_property_readonly("steps", [](const rt::Network& n) { return steps(n, {}); })
      .def(
          "run", [](rt::Network& n, const Reals& x) { return run(n, x, nullptr); }, py::arg("x").noconvert())
      .def(
          "profile",
          [](rt::Network& n, const Reals& x) {
            std::vector<double> seconds(n.steps().size());
            run(n, x, &seconds);
            return steps(n, seconds);
          },
          py::arg("x").noconvert())
      .def("peaks",
           [](rt::Network& n) {
             py::gil_scoped_release release;
             const rt::Peaks peaks = n.measure_peaks();
             return std::pair(peaks.macs_per_second, peaks.bytes_per_second);
           })
      .def("values", &values, py::arg("x").noconvert());
}
