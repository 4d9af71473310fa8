#pragma once

// What a layer asks of an accelerator: integer dimensions and, for each tensor, how a point of the loop nest finds its
// element. Standard library only; bad arguments throw std::invalid_argument.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mixbit::hw {

enum Tensor { kWeights = 0, kInputs = 1, kOutputs = 2 };
inline constexpr int kTensors = 3;
inline constexpr std::array<const char*, kTensors> kTensorNames = {"Weights", "Inputs", "Outputs"};
inline constexpr std::array<Tensor, kTensors> kAllTensors = {kWeights, kInputs, kOutputs};

inline constexpr int kMaxRanks = 8;

// coefficient * (index of dimension `dim`)
struct Term {
  int dim = 0;
  int64_t coefficient = 1;
};

// One coordinate of a tensor: a sum of terms.
using Rank = std::vector<Term>;

// Outputs are read and written (partial sums); the other two are read only.
struct Layer {
  std::vector<std::string> dims;
  std::vector<int64_t> bounds;                      // [dims], each >= 1
  std::array<std::vector<Rank>, kTensors> tensors;  // ranks of each tensor

  int dim(const std::string& name) const;  // throws if there is no such dimension
  int64_t macs() const;
  int64_t elements(Tensor tensor) const;
};

// A convolution with M filters and C channels in each of G groups. The input is read without padding: its extent is
// (P - 1) * stride + (R - 1) * dilation + 1, and Q with S likewise.
struct ConvShape {
  int64_t c = 1, m = 1, r = 1, s = 1, n = 1, p = 1, q = 1, g = 1;
  int64_t w_stride = 1, h_stride = 1, w_dilation = 1, h_dilation = 1;
};

// Dimensions C, M, R, S, N, P, Q, G.
Layer conv(const ConvShape& shape);

// Outputs[N, M] = sum over K of Weights[M, K] * Inputs[N, K]; dimensions M, N, K.
Layer gemm(int64_t m, int64_t n, int64_t k);

// Throws std::invalid_argument where a bound is below 1, a coefficient is below 1, a tensor has more than kMaxRanks
// ranks, a dimension is unknown or used by no tensor, or the layer is too large for exact counts (2^48
// multiplications).
void check(const Layer& layer);

}  // namespace mixbit::hw
