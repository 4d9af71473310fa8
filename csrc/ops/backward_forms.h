#pragma once

// The two forms of fake_quantize's backward, for every device: dx in a new tensor, or written over the gradient.

#include <ATen/Functions.h>

#include <array>
#include <optional>
#include <tuple>

namespace mixbit::ops {

// kBackwardInto(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, dx, mask,
// gradient) writes dx into `dx` (which may be the gradient itself; undefined: not asked for) and returns the gradients
// of scale and zero_point that the mask asks for.
template <auto kBackwardInto>
struct BackwardForms {
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> fresh(const at::Tensor& grad, const at::Tensor& x,
                                                              const at::Tensor& scale, const at::Tensor& zero_point,
                                                              const at::Tensor& bit_width, bool is_signed,
                                                              bool narrow_range, std::optional<int64_t> axis,
                                                              int64_t rounding, std::optional<int64_t> group_size,
                                                              std::array<bool, 3> output_mask, int64_t gradient) {
    const at::Tensor dx = output_mask[0] ? at::empty_like(x) : at::Tensor();
    auto [dscale, dzero_point] = kBackwardInto(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis,
                                               rounding, group_size, dx, {output_mask[1], output_mask[2]}, gradient);
    return {dx.defined() ? dx : at::empty({0}, x.options()), dscale, dzero_point};
  }

  static std::tuple<at::Tensor, at::Tensor> over(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                 bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                 int64_t rounding, std::optional<int64_t> group_size,
                                                 std::array<bool, 2> output_mask, int64_t gradient) {
    return kBackwardInto(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size,
                         grad, output_mask, gradient);
  }
};

}  // namespace mixbit::ops
