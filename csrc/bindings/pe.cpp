// Precision-scalable processing elements: numbers in and out, no tensors, so no torch op.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include <mixbit/hw/pe.h>

namespace py = pybind11;

namespace {

namespace hw = mixbit::hw;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

}  // namespace

void bind_pe(py::module_& parent) {
  py::module_ m = parent.def_submodule("pe", "Precision-scalable processing elements; docs/pe.md.");
  m.attr("KINDS") = std::vector<std::string>(hw::kPeNames.begin(), hw::kPeNames.end());
  m.def(
      "throughput",
      [](const std::string& pe, int weight_bits, int act_bits) {
        return hw::pe_throughput(hw::parse_pe(pe), weight_bits, act_bits);
      },
      py::arg("pe"), py::arg("weight_bits"), py::arg("act_bits"));
  m.def(
      "product",
      [](const std::string& pe, int64_t weight, int weight_bits, int64_t act, int act_bits) {
        int passes = 0;
        const int64_t product = hw::pe_product(hw::parse_pe(pe), weight, weight_bits, act, act_bits, &passes);
        return py::make_tuple(product, passes);
      },
      py::arg("pe"), py::arg("weight"), py::arg("weight_bits"), py::arg("act"), py::arg("act_bits"));
  m.def(
      "dot",
      [](const std::string& pe, const Array<int64_t>& codes, const Array<uint8_t>& extra_bits,
         const Array<int64_t>& acts, int base_bits, int act_bits) {
        return hw::pe_dot(hw::parse_pe(pe), span_of(codes), span_of(extra_bits), span_of(acts), base_bits, act_bits);
      },
      py::arg("pe"), py::arg("codes"), py::arg("extra_bits"), py::arg("acts"), py::arg("base_bits"),
      py::arg("act_bits"));
  m.def(
      "cost",
      [](const std::string& pe, int64_t count, double mac, double add, double accumulator_bits, double dram,
         double buffer, double weight_dram_reads, double weight_buffer_reads, double act_buffer_accesses,
         double act_buffer_bits, double control, double macs, double weights, double inputs, double outputs,
         int act_bits, int base_bits, const std::array<double, 2>& flagged, double index_bits, double unstored_bits) {
        const hw::PeOptions options{hw::parse_pe(pe),
                                    count,
                                    mac,
                                    add,
                                    accumulator_bits,
                                    dram,
                                    buffer,
                                    weight_dram_reads,
                                    weight_buffer_reads,
                                    act_buffer_accesses,
                                    act_buffer_bits,
                                    control};
        const hw::PeLayer layer{macs,      weights, inputs,     outputs,      act_bits,
                                base_bits, flagged, index_bits, unstored_bits};
        const hw::PeCost cost = hw::pe_cost(options, layer);
        return py::dict(py::arg("cycles") = cost.cycles, py::arg("mac") = cost.mac, py::arg("weights") = cost.weights,
                        py::arg("acts") = cost.acts, py::arg("index") = cost.index, py::arg("control") = cost.control);
      },
      py::kw_only(), py::arg("pe"), py::arg("count"), py::arg("mac"), py::arg("add"), py::arg("accumulator_bits"),
      py::arg("dram"), py::arg("buffer"), py::arg("weight_dram_reads"), py::arg("weight_buffer_reads"),
      py::arg("act_buffer_accesses"), py::arg("act_buffer_bits"), py::arg("control"), py::arg("macs"),
      py::arg("weights"), py::arg("inputs"), py::arg("outputs"), py::arg("act_bits"), py::arg("base_bits"),
      py::arg("flagged"), py::arg("index_bits"), py::arg("unstored_bits"));
  m.def("proportional_share", hw::proportional_share, py::arg("saving"), py::arg("compression"));
}
