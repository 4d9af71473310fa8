#include <mixbit/hw/workload.h>

#include <algorithm>
#include <set>

#include "text.h"

namespace mixbit::hw {

namespace {

// Counts stay below 2^53 and products of two of them are never formed: doubles and int64 hold all exactly.
constexpr double kMaxCount = static_cast<double>(int64_t{1} << 48);

// At least what all instances of a level together can ask of the next one for a tensor, in any mapping: every step
// fetches its whole tile, whose extent in a rank is at most the largest coefficient times the factors inside.
double most_requests(const Layer& layer, Tensor tensor) {
  double most = 1.0;
  std::vector<bool> moves(layer.dims.size(), false);
  for (const Rank& rank : layer.tensors[tensor]) {
    int64_t largest = 1;
    for (const Term& term : rank) {
      const int64_t bound = layer.bounds[term.dim];
      if (bound > 1) largest = std::max(largest, term.coefficient);
      most *= static_cast<double>(bound);
      moves[term.dim] = true;
    }
    most *= static_cast<double>(largest);
  }
  for (size_t d = 0; d < layer.dims.size(); ++d) most *= moves[d] ? 1.0 : static_cast<double>(layer.bounds[d]);
  return most;
}

}  // namespace

int Layer::dim(const std::string& name) const {
  const auto found = std::find(dims.begin(), dims.end(), name);
  if (found == dims.end()) fail("dimension ", name, " is not one of this layer's: ", joined(dims));
  return static_cast<int>(found - dims.begin());
}

int64_t Layer::macs() const {
  int64_t product = 1;
  for (const int64_t bound : bounds) product *= bound;
  return product;
}

int64_t Layer::elements(Tensor tensor) const {
  int64_t product = 1;
  for (const Rank& rank : tensors[tensor]) {
    int64_t extent = 1;
    for (const Term& term : rank) extent += term.coefficient * (bounds[term.dim] - 1);
    product *= extent;
  }
  return product;
}

Layer conv(const ConvShape& shape) {
  enum { C, M, R, S, N, P, Q, G };
  Layer layer;
  layer.dims = {"C", "M", "R", "S", "N", "P", "Q", "G"};
  layer.bounds = {shape.c, shape.m, shape.r, shape.s, shape.n, shape.p, shape.q, shape.g};
  layer.tensors[kWeights] = {{{C, 1}}, {{M, 1}}, {{R, 1}}, {{S, 1}}, {{G, 1}}};
  layer.tensors[kInputs] = {{{N, 1}},
                            {{C, 1}},
                            {{R, shape.w_dilation}, {P, shape.w_stride}},
                            {{S, shape.h_dilation}, {Q, shape.h_stride}},
                            {{G, 1}}};
  layer.tensors[kOutputs] = {{{N, 1}}, {{M, 1}}, {{Q, 1}}, {{P, 1}}, {{G, 1}}};
  check(layer);
  return layer;
}

Layer gemm(int64_t m, int64_t n, int64_t k) {
  enum { M, N, K };
  Layer layer;
  layer.dims = {"M", "N", "K"};
  layer.bounds = {m, n, k};
  layer.tensors[kWeights] = {{{M, 1}}, {{K, 1}}};
  layer.tensors[kInputs] = {{{N, 1}}, {{K, 1}}};
  layer.tensors[kOutputs] = {{{N, 1}}, {{M, 1}}};
  check(layer);
  return layer;
}

void check(const Layer& layer) {
  if (layer.dims.empty() || layer.dims.size() != layer.bounds.size()) {
    fail("problem: ", layer.dims.size(), " dimensions and ", layer.bounds.size(), " bounds; expected one bound each");
  }
  if (std::set<std::string>(layer.dims.begin(), layer.dims.end()).size() != layer.dims.size()) {
    fail("problem: a dimension is named twice in ", joined(layer.dims));
  }
  double macs = 1.0;
  for (size_t d = 0; d < layer.dims.size(); ++d) {
    if (layer.bounds[d] < 1) fail("problem: ", layer.dims[d], " is ", layer.bounds[d], ", expected at least 1");
    macs *= static_cast<double>(layer.bounds[d]);
  }
  if (macs > kMaxCount) {
    fail("problem: ", macs, " multiplications; exact counts end at 2^48");
  }
  std::set<int> used;
  for (const Tensor tensor : kAllTensors) {
    if (layer.tensors[tensor].size() > kMaxRanks) {
      fail("problem: ", kTensorNames[tensor], " has ", layer.tensors[tensor].size(), " ranks, expected at most ",
           kMaxRanks);
    }
    for (const Rank& rank : layer.tensors[tensor]) {
      for (const Term& term : rank) {
        if (term.dim < 0 || term.dim >= static_cast<int>(layer.dims.size())) {
          fail("problem: ", kTensorNames[tensor], " uses dimension number ", term.dim, " of ", layer.dims.size());
        }
        if (term.coefficient < 1) {
          fail("problem: ", kTensorNames[tensor], " moves by ", term.coefficient, " with ", layer.dims[term.dim],
               " (a stride or dilation), expected at least 1");
        }
        used.insert(term.dim);
      }
    }
    if (const double most = most_requests(layer, tensor); most > kMaxCount) {
      fail("problem: up to ", most, " elements of ", kTensorNames[tensor], " may be moved; exact counts end at 2^48");
    }
  }
  for (size_t d = 0; d < layer.dims.size(); ++d) {
    if (!used.contains(static_cast<int>(d))) fail("problem: no tensor depends on dimension ", layer.dims[d]);
  }
}

}  // namespace mixbit::hw
