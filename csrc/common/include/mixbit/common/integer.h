#pragma once

// The formulas of the integer network (docs/integer_semantics.md), one element each. fp32 arithmetic with one rounding
// an operation: callers compile with -ffp-contract=off.

#include <cmath>
#include <cstdint>

#include <mixbit/common/macros.h>
#include <mixbit/common/numerics.h>

namespace mixbit {

// Grid of a tensor of codes, value = (code - zero_point) * scale; codes lie in low ... high and are stored as one byte:
// int8 if is_signed, else uint8. A fused relu raises low to zero_point, relu6 lowers high as well.
struct CodeGrid {
  float scale;
  int32_t zero_point;
  int32_t low;
  int32_t high;
  bool is_signed;
};

// clamp(rne(v) + zero_point, low, high); clamped before the conversion, where both ends are exact. NaN gives low.
MIXBIT_HD int32_t code_of(float v, int32_t zero_point, int32_t low, int32_t high) {
  const float smallest = static_cast<float>(low - zero_point);
  const float largest = static_cast<float>(high - zero_point);
  v = v > smallest ? v : smallest;
  v = v < largest ? v : largest;
  return static_cast<int32_t>(round_half_even(v)) + zero_point;
}

// What a layer makes of its accumulator (bias added): clamp(rne(fp32(fp32(total) multiplier)) + zero_point).
MIXBIT_HD int32_t requantize(int32_t total, float multiplier, const CodeGrid& y) {
  return code_of(static_cast<float>(total) * multiplier, y.zero_point, y.low, y.high);
}

// A value of the network's input.
MIXBIT_HD int32_t input_code(float value, const CodeGrid& y) {
  return code_of(value / y.scale, y.zero_point, y.low, y.high);
}

// A code on another grid; the code itself where scale and zero point are the same.
MIXBIT_HD int32_t moved_code(int32_t code, const CodeGrid& x, const CodeGrid& y) {
  if (x.scale == y.scale && x.zero_point == y.zero_point) {
    code = code > y.low ? code : y.low;
    return code < y.high ? code : y.high;
  }
  return requantize(code - x.zero_point, x.scale / y.scale, y);
}

MIXBIT_HD float real_of(int32_t code, const CodeGrid& x) { return static_cast<float>(code - x.zero_point) * x.scale; }

MIXBIT_HD int32_t added_code(int32_t code_a, const CodeGrid& a, int32_t code_b, const CodeGrid& b, const CodeGrid& y) {
  return code_of((real_of(code_a, a) + real_of(code_b, b)) / y.scale, y.zero_point, y.low, y.high);
}

MIXBIT_HD int32_t multiplied_code(int32_t code_a, const CodeGrid& a, int32_t code_b, const CodeGrid& b,
                                  const CodeGrid& y) {
  return requantize((code_a - a.zero_point) * (code_b - b.zero_point), (a.scale * b.scale) / y.scale, y);
}

// One share of a softmax: powers are rne(2^16 exp(-d s_x)) for the distances d from the largest code, `sum` is that of
// all of them.
MIXBIT_HD int32_t softmax_code(int32_t power, int64_t sum, const CodeGrid& y) {
  const float share = static_cast<float>(power) / static_cast<float>(sum);
  return code_of(share / y.scale, y.zero_point, y.low, y.high);
}

// fp32(s_x / fp32(n s_y)): what the sum over a window of n elements is multiplied by.
MIXBIT_HD float average_multiplier(float x_scale, float y_scale, int32_t n) {
  return x_scale / (static_cast<float>(n) * y_scale);
}

}  // namespace mixbit
