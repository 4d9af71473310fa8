// Bit allocation: plain arrays in and out, no tensors, so no torch op.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mixbit/assign/assign.h>

namespace py = pybind11;

namespace {

using mixbit::assign::Choice;
using mixbit::assign::Cost;
using mixbit::assign::GreedyResult;
using mixbit::assign::Problem;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::vector<T> to_vector(const Array<T>& a) {
  return std::vector<T>(a.data(), a.data() + a.size());
}

Problem make_problem(const Array<double>& nsr, const Array<uint8_t>& allowed, const std::vector<int64_t>& groups) {
  if (nsr.ndim() != 3 || allowed.size() != nsr.size()) {
    throw std::invalid_argument("nsr: expected [layers, acts, weights], and allowed of the same shape");
  }
  return {nsr.shape(0), nsr.shape(1), nsr.shape(2), to_vector(nsr), to_vector(allowed), groups};
}

py::tuple to_python(const GreedyResult& r) {
  py::list steps;
  for (const auto& step : r.steps) steps.append(py::make_tuple(step.layer, step.is_act));
  return py::make_tuple(r.choice.act, r.choice.weight, r.feasible, steps);
}

}  // namespace

void bind_assign(py::module_& m) {
  m.def(
      "greedy_target",
      [](const Array<double>& nsr, const Array<uint8_t>& allowed, const std::vector<int64_t>& groups,
         const Array<double>& cost, bool maximum, double limit, const std::vector<int64_t>& reader) {
        const Problem problem = make_problem(nsr, allowed, groups);
        const Cost price{to_vector(cost), maximum, 0.0, reader};
        GreedyResult result;
        {
          py::gil_scoped_release release;
          result = mixbit::assign::greedy_target(problem, price, limit);
        }
        return to_python(result);
      },
      py::arg("nsr"), py::arg("allowed"), py::arg("groups"), py::arg("cost"), py::arg("maximum"), py::arg("limit"),
      py::arg("reader") = std::vector<int64_t>());
  m.def(
      "greedy_budget",
      [](const Array<double>& nsr, const Array<uint8_t>& allowed, const std::vector<int64_t>& groups,
         const std::vector<Array<double>>& costs, const std::vector<bool>& maximum, const std::vector<double>& budgets,
         const std::vector<std::vector<int64_t>>& readers) {
        const Problem problem = make_problem(nsr, allowed, groups);
        if (costs.size() != maximum.size() || costs.size() != budgets.size() ||
            (!readers.empty() && costs.size() != readers.size())) {
          throw std::invalid_argument("costs, maximum, budgets and readers: expected one length");
        }
        std::vector<Cost> prices;
        for (size_t i = 0; i < costs.size(); ++i) {
          prices.push_back(
              {to_vector(costs[i]), maximum[i], budgets[i], readers.empty() ? std::vector<int64_t>() : readers[i]});
        }
        GreedyResult result;
        {
          py::gil_scoped_release release;
          result = mixbit::assign::greedy_budget(problem, prices);
        }
        return to_python(result);
      },
      py::arg("nsr"), py::arg("allowed"), py::arg("groups"), py::arg("costs"), py::arg("maximum"), py::arg("budgets"),
      py::arg("readers") = std::vector<std::vector<int64_t>>());
  m.def(
      "threshold",
      [](const Array<double>& gamma, const std::vector<double>& shares, const std::vector<int64_t>& groups,
         double target_db) {
        if (gamma.ndim() != 2) throw std::invalid_argument("gamma: expected [layers, widths]");
        return mixbit::assign::threshold(to_vector(gamma), gamma.shape(1), shares, groups, target_db);
      },
      py::arg("gamma"), py::arg("shares"), py::arg("groups"), py::arg("target_db"));
  m.def(
      "aimet_order",
      [](const Array<double>& gamma) {
        if (gamma.ndim() != 2) throw std::invalid_argument("gamma: expected [layers, widths]");
        std::vector<int64_t> widths;
        const auto steps = mixbit::assign::aimet_order(to_vector(gamma), gamma.shape(1), &widths);
        py::list order;
        for (size_t i = 0; i < steps.size(); ++i) order.append(py::make_tuple(steps[i].layer, widths[i]));
        return order;
      },
      py::arg("gamma"));
}
