#pragma once

// The formulas of differentiable precision searches, each written once for host and device: levels of nested grids
// (Bayesian Bits, arXiv 2005.07093; Free Bits, arXiv 2307.02894) and of mixtures (EdMIPS, arXiv 2004.05795), what each
// grid contributes, and the gradients. fp32, zero_point 0, ties to even.

#include <mixbit/common/numerics.h>

namespace mixbit {

// How the levels of the grids come about; the values are part of the op schema.
enum class GateForm : int32_t {
  kDifference = 0,  // x rounded on every grid
  kResidual = 1,    // on each grid, what the grids before have left over
};

// Which gradients the backward of candidate grids needs.
enum class MixtureForm : int32_t {
  kMixture = 0,        // of every grid's level and step
  kGated = 1,          // of what each grid adds to the one before, and of the last step
  kGatedResidual = 2,  // the same, with levels of GateForm::kResidual
};

// Steps of a grid over its range: unsigned 0 ... range, or two's complement from -range.
MIXBIT_HD float gated_levels(int bit_width, bool is_signed) {
  return static_cast<float>(is_signed ? int64_t{1} << (bit_width - 1) : (int64_t{1} << bit_width) - 1);
}

MIXBIT_HD float gated_step(float range, int bit_width, bool is_signed) {
  return range / gated_levels(bit_width, is_signed);
}

// Codes of a grid between two neighbouring levels of the grid before: a whole number where the grids nest.
MIXBIT_HD float grid_ratio(QuantRange range, QuantRange before) {
  return range.quant_min < 0.0f ? range.quant_min / before.quant_min : range.quant_max / before.quant_max;
}

// The code of x; its level is code * scale.
MIXBIT_HD float level_code(float x, float scale, QuantRange range) {
  return round_half_even(clamp_code(x / scale, range));
}

// The code of x from what the grid before, with `code` and `level`, has left over. It is level_code except where x lies
// between two levels, which may fall on either side.
MIXBIT_HD float residual_code(float x, float code, float level, float ratio, float scale, QuantRange range) {
  return clamp_code(code * ratio + round_half_even((x - level) / scale), range);
}

// What the gradient of a step (LSQ, arXiv 1902.08153, eq. 3) multiplies the incoming one with.
MIXBIT_HD float step_gradient(float x, float code, float scale, QuantRange range) {
  const float v = x / scale;
  return v >= range.quant_min && v <= range.quant_max ? code - v : code;
}

// What each of `count` levels contributes: z_1 ... z_k (1 - z_(k+1)), from count - 1 gates `stride` apart. This is
// Q_0 + sum_j z_1 ... z_j (Q_j - Q_(j-1)) ordered by Q, so that gates of 0 and 1 give one level exactly.
MIXBIT_HD void gate_shares(const float* gates, int64_t stride, int64_t count, float* shares) {
  float open = 1.0f;
  for (int64_t k = 0; k + 1 < count; ++k) {
    const float next = open * gates[k * stride];
    shares[k] = open - next;
    open = next;
  }
  shares[count - 1] = open;
}

// Gradients of count - 1 gates from sums_k = sum g (Q_(k+1) - Q_k):
// d z_j = z_1 ... z_(j-1) (sums_j + z_(j+1) (sums_(j+1) + ...)), in double. All of them `stride` apart.
MIXBIT_HD void gate_gradients(const double* sums, const float* gates, int64_t stride, int64_t count, float* gradients) {
  double open = 1.0;
  for (int64_t j = 0; j + 1 < count; ++j) {
    double rest = 0.0;
    for (int64_t m = count - 2; m > j; --m) {
      rest = static_cast<double>(gates[m * stride]) * (sums[m * stride] + rest);
    }
    gradients[j * stride] = static_cast<float>(open * (sums[j * stride] + rest));
    open *= static_cast<double>(gates[j * stride]);
  }
}

}  // namespace mixbit
