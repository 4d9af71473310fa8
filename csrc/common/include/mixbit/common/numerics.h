#pragma once

// The formulas of quantization, each written once: scalar CPU kernels, CUDA kernels and the tests call these functions,
// and the SIMD kernels are compared with them bit by bit. Everything is computed in fp32, whatever the storage type.

#include <cmath>
#include <cstdint>

#include <mixbit/common/macros.h>

namespace mixbit {

// How x / scale becomes an integer. The values are part of the op schemas (torch.ops.mixbit.*): do not renumber.
enum class Rounding : int32_t {
  kHalfEven = 0,  // round to nearest, ties to even: what ONNX and ATen compute
  kHalfUp = 1,    // floor(v + 1/2)
};

// What the backward of fake_quantize computes, see fake_quantize_grad and clip_grad. The values are part of the op
// schemas: do not renumber.
enum class Gradient : int32_t {
  kLearnedStep = 0,
  kClip = 1,
};

constexpr int kMinBitWidth = 1;
constexpr int kMaxBitWidth = 16;

// Smallest and largest code of a grid; integers, held in fp32 because the codes are clamped there.
struct QuantRange {
  float quant_min;
  float quant_max;
};

// Gradients of y = fake_quantize(x, scale, zero_point) for one element, already multiplied by the incoming gradient.
struct FakeQuantizeGrad {
  float dx;
  float dscale;
  float dzero_point;
};

MIXBIT_HD bool is_valid_bit_width(float bit_width) {
  return bit_width >= static_cast<float>(kMinBitWidth) && bit_width <= static_cast<float>(kMaxBitWidth) &&
         bit_width == std::floor(bit_width);
}

// Signed: [-2^(b-1) (+1 if narrow_range), 2^(b-1) - 1]. Unsigned: [0, 2^b - 1], narrow_range has no effect.
// `bit_width` must satisfy is_valid_bit_width; one signed bit with narrow_range is an empty grid that callers refuse.
MIXBIT_HD QuantRange quant_range(int bit_width, bool is_signed, bool narrow_range) {
  if (is_signed) {
    const float half = static_cast<float>(int64_t{1} << (bit_width - 1));
    return {narrow_range ? 1.0f - half : -half, half - 1.0f};
  }
  return {0.0f, static_cast<float>((int64_t{1} << bit_width) - 1)};
}

MIXBIT_HD float round_half_even(float v) {
#if defined(__CUDA_ARCH__)
  return rintf(v);
#else
  return std::nearbyint(v);
#endif
}

MIXBIT_HD float round_half_up(float v) { return floorf(v + 0.5f); }

MIXBIT_HD float round_code(float v, Rounding rounding) {
  return rounding == Rounding::kHalfEven ? round_half_even(v) : round_half_up(v);
}

// Clamp that lets NaN through: both comparisons are false for it.
MIXBIT_HD float clamp_code(float q, QuantRange range) {
  q = q < range.quant_min ? range.quant_min : q;
  return q > range.quant_max ? range.quant_max : q;
}

// q = clamp(round(x / scale) + round(zero_point), quant_min, quant_max). The division is a true fp32 division: a
// multiplication by the inverse rounds differently near ties and would break equality with ONNX.
MIXBIT_HD float quantize(float x, float scale, float zero_point, QuantRange range, Rounding rounding) {
  return clamp_code(round_code(x / scale, rounding) + round_half_even(zero_point), range);
}

MIXBIT_HD float dequantize(float q, float scale, float zero_point) { return (q - round_half_even(zero_point)) * scale; }

// NaN stays NaN, +-Inf saturates to the ends of the grid.
MIXBIT_HD float fake_quantize(float x, float scale, float zero_point, QuantRange range, Rounding rounding) {
  return dequantize(quantize(x, scale, zero_point, range, rounding), scale, zero_point);
}

// Whether the gradient of x passes: quant_min <= x / scale + round(zero_point) <= quant_max, before rounding.
MIXBIT_HD bool is_inside(float x, float scale, float zero_point, QuantRange range) {
  const float v = x / scale + round_half_even(zero_point);
  return v >= range.quant_min && v <= range.quant_max;
}

// Whether 1 / scale is a normal number, so that x * (1 / scale) keeps its precision.
MIXBIT_HD bool has_normal_inverse(float scale) { return scale >= 0x1p-126f && scale <= 0x1p+126f; }

// x - fake_quantize(x) for a measurement of noise (zero_point 0), by a multiplication with the inverse. It differs from
// the division only within rounding of a tie between two levels, where both are equally far: levels themselves give an
// exact zero, any other error is within a rounding of the exact one. Needs has_normal_inverse(scale).
MIXBIT_HD float quantization_error(float x, float scale, float inverse, QuantRange range, Rounding rounding) {
  return x - clamp_code(round_code(x * inverse, rounding), range) * scale;
}

// Learned-step gradients (LSQ, arXiv 1902.08153, eq. 3; LSQ+, arXiv 2004.09576, eq. 3-4), exactly: with
// v = x / scale + round(zero_point), inside means quant_min <= v <= quant_max before rounding.
//   inside:  dx = g, dscale = g (q - v),          dzero_point = 0
//   outside: dx = 0, dscale = g (q - zero_point), dzero_point = -g scale
// NaN in x counts as outside for dx and yields NaN in dscale.
MIXBIT_HD FakeQuantizeGrad fake_quantize_grad(float grad, float x, float scale, float zero_point, QuantRange range,
                                              Rounding rounding) {
  const float z = round_half_even(zero_point);
  const float x_over_scale = x / scale;
  const float v = x_over_scale + z;
  const float q = clamp_code(round_code(x_over_scale, rounding) + z, range);
  const bool inside = v >= range.quant_min && v <= range.quant_max;
  if (inside) {
    return {grad, grad * (q - v), 0.0f};
  }
  return {0.0f, grad * (q - z), -(grad * scale)};
}

// Whether x lies between the ends of the grid, of which the upper one counts as outside (PACT, arXiv 1805.06085, eq.
// 3). The ends are compared as values: the highest level itself, which a division by the scale may put on either side
// of its code, is at the end.
MIXBIT_HD bool is_unclipped(float x, float scale, float zero_point, QuantRange range) {
  return x >= dequantize(range.quant_min, scale, zero_point) && x < dequantize(range.quant_max, scale, zero_point);
}

// Gradients of parametrized clipping (PACT, eq. 3), which leave out the rounding term of learned steps:
//   unclipped: dx = g, dscale = 0,                    dzero_point = 0
//   clipped:   dx = 0, dscale = g (end - zero_point), dzero_point = -g scale
// The clip is the scale times a number of steps; so this is its gradient times that number. NaN in x counts as clipped
// for dx and yields NaN in dscale.
MIXBIT_HD FakeQuantizeGrad clip_grad(float grad, float x, float scale, float zero_point, QuantRange range) {
  if (is_unclipped(x, scale, zero_point, range)) {
    return {grad, 0.0f, 0.0f};
  }
  const float z = round_half_even(zero_point);
  float end = x;  // NaN, unless one of the ends
  end = x >= dequantize(range.quant_max, scale, zero_point) ? range.quant_max : end;
  end = x < dequantize(range.quant_min, scale, zero_point) ? range.quant_min : end;
  return {0.0f, grad * (end - z), -(grad * scale)};
}

}  // namespace mixbit
