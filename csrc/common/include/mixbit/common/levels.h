#pragma once

// Grids with extra levels: a weight that is given e extra bits has the grid of bit_width + e bits at the step
// scale / 2^e, so that it keeps every level of its base grid and gets 2^e - 1 new ones between two of them (with
// e = 1 the thresholds at which the weight was switching). Signed grids, zero point 0. After the idea of Kim et al.
// (IEEE TNNLS 32(7), 2021, doi 10.1109/TNNLS.2020.3008996), who give a weight that keeps switching one more level; the
// nested grid is ours.

#include <cstdint>

#include <mixbit/common/numerics.h>

namespace mixbit {

// Most extra bits of one weight.
constexpr int kMaxExtraBits = 2;

// 2^extra, exact; 0 <= extra <= 30.
MIXBIT_HD float extra_steps(int extra) { return static_cast<float>(int64_t{1} << extra); }

// The step of a weight's own grid; exact, unless scale is next to underflow.
MIXBIT_HD float extra_step(float scale, int extra) { return scale / extra_steps(extra); }

// The codes of a weight's own grid: quant_range(bit_width + extra, true, narrow_range), from the range of the base
// grid.
MIXBIT_HD QuantRange extra_range(QuantRange base, int extra) {
  const float steps = extra_steps(extra);
  const float left_out = base.quant_min + base.quant_max + 1.0f;  // 1 with narrow_range, else 0
  return {(base.quant_min - left_out) * steps + left_out, (base.quant_max + 1.0f) * steps - 1.0f};
}

// The code of x on its own grid, in units of extra_step; NaN stays NaN.
MIXBIT_HD float extra_level_code(float x, float scale, QuantRange base, int extra, Rounding rounding) {
  return quantize(x, extra_step(scale, extra), 0.0f, extra_range(base, extra), rounding);
}

// Whether a valid base width and a weight's extra bits make a grid.
MIXBIT_HD bool is_valid_extra(int bit_width, int extra) {
  return extra >= 0 && extra <= kMaxExtraBits && bit_width + extra <= kMaxBitWidth;
}

// The value of x on its own grid; without extra bits that of fake_quantize.
MIXBIT_HD float extra_level_fake_quantize(float x, float scale, QuantRange base, int extra, Rounding rounding) {
  return dequantize(extra_level_code(x, scale, base, extra, rounding), extra_step(scale, extra), 0.0f);
}

// The gradients of a learned step (fake_quantize_grad) on x's own grid, whose step is the scale's 2^e-th part.
struct ExtraLevelGrad {
  float dx;
  float dscale;
};
MIXBIT_HD ExtraLevelGrad extra_level_fake_quantize_grad(float grad, float x, float scale, QuantRange base, int extra,
                                                        Rounding rounding) {
  const FakeQuantizeGrad g =
      fake_quantize_grad(grad, x, extra_step(scale, extra), 0.0f, extra_range(base, extra), rounding);
  return {g.dx, g.dscale / extra_steps(extra)};
}

}  // namespace mixbit
