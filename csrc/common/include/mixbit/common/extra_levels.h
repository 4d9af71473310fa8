#pragma once

// Grids with extra levels: an element with e extra bits has the nested grid of step scale / 2^e, whose levels are those
// of the base grid and 2^e - 1 more between each two neighbours. The construct is ours, after the idea of Kim et al.
// (IEEE TNNLS 32(7), 2021, doi 10.1109/TNNLS.2020.3008996): a weight that keeps switching between two levels gets the
// one in the middle.

#include <cstdint>

#include <mixbit/common/macros.h>
#include <mixbit/common/numerics.h>

namespace mixbit {

constexpr int kMaxExtraBits = 2;

// The grid of one element.
struct ExtraGrid {
  float step;      // scale / 2^e
  float fraction;  // 1 / 2^e
  QuantRange range;
};

// Whether a base width (which must be valid) and an element's extra bits make a grid.
MIXBIT_HD bool is_valid_extra(int bit_width, int extra) {
  return extra >= 0 && extra <= kMaxExtraBits && bit_width + extra <= kMaxBitWidth;
}

// The grid of an element with e extra bits: the signed codes of bit_width + e bits, [-2^(n+e-1) (+1 if narrow_range),
// 2^(n+e-1) - 1], in steps of scale / 2^e. `base` is the range of the base grid, as quant_range has it.
MIXBIT_HD ExtraGrid extra_grid(float scale, QuantRange base, bool narrow_range, int extra) {
  const auto parts = static_cast<float>(1 << extra);
  const float fraction = 1.0f / parts;
  const float half = (base.quant_max + 1.0f) * parts;
  return {scale * fraction, fraction, {narrow_range ? 1.0f - half : -half, half - 1.0f}};
}

// The value on the element's own grid; with no extra bits that of fake_quantize, zero_point 0.
MIXBIT_HD float extra_level_fake_quantize(float x, float scale, QuantRange base, bool narrow_range, int extra,
                                          Rounding rounding) {
  const ExtraGrid grid = extra_grid(scale, base, narrow_range, extra);
  return fake_quantize(x, grid.step, 0.0f, grid.range, rounding);
}

// Gradients of a learned step (numerics.h) on the element's own grid; the step is the scale's fraction, and so is its
// gradient.
struct ExtraLevelGrad {
  float dx;
  float dscale;
};
MIXBIT_HD ExtraLevelGrad extra_level_fake_quantize_grad(float grad, float x, float scale, QuantRange base,
                                                        bool narrow_range, int extra, Rounding rounding) {
  const ExtraGrid grid = extra_grid(scale, base, narrow_range, extra);
  const FakeQuantizeGrad g = fake_quantize_grad(grad, x, grid.step, 0.0f, grid.range, rounding);
  return {g.dx, g.dscale * grid.fraction};
}

}  // namespace mixbit
