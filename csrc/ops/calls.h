#pragma once

// Typed calls of our ops through the dispatcher, for the code of other ops.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace mixbit::ops {

template <typename Signature>
c10::TypedOperatorHandle<Signature> typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::Tensor call_fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                     const at::Tensor& bit_width, bool is_signed, bool narrow_range,
                                     std::optional<int64_t> axis, int64_t rounding, std::optional<int64_t> group_size,
                                     int64_t gradient) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool,
                               std::optional<int64_t>, int64_t, std::optional<int64_t>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::fake_quantize");
  return op.call(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, gradient);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> call_fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
    std::optional<int64_t> group_size, std::array<bool, 3> output_mask, int64_t gradient) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool,
      std::optional<int64_t>, int64_t, std::optional<int64_t>, std::array<bool, 3>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::_fake_quantize_backward");
  return op.call(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size,
                 output_mask, gradient);
}

inline std::tuple<at::Tensor, at::Tensor> call_fake_quantize_backward_(
    at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
    std::optional<int64_t> group_size, std::array<bool, 2> output_mask, int64_t gradient) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(
      at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool,
      std::optional<int64_t>, int64_t, std::optional<int64_t>, std::array<bool, 2>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::_fake_quantize_backward_");
  return op.call(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size,
                 output_mask, gradient);
}

inline std::tuple<at::Tensor, at::Tensor> call_fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                                  const at::Tensor& zero_point,
                                                                  const at::Tensor& bit_width, bool is_signed,
                                                                  bool narrow_range, std::optional<int64_t> axis,
                                                                  int64_t rounding, std::optional<int64_t> group_size,
                                                                  int64_t gradient) {
  using Signature =
      std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         bool, bool, std::optional<int64_t>, int64_t, std::optional<int64_t>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::_fake_quantize_mask");
  return op.call(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, gradient);
}

inline at::Tensor call_fake_quantize_mask_backward(const at::Tensor& grad, const at::Tensor& mask,
                                                   c10::SymIntArrayRef strides, std::optional<int64_t> axis) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, std::optional<int64_t>);
  static const auto op = typed_op<Signature>("mixbit::_fake_quantize_mask_backward");
  return op.call(grad, mask, strides, axis);
}

inline std::vector<at::Tensor> call_fake_quantize_foreach(at::TensorList xs, at::TensorList scales,
                                                          at::TensorList zero_points, at::TensorList bit_widths,
                                                          bool is_signed, bool narrow_range,
                                                          std::optional<int64_t> axis, int64_t rounding,
                                                          std::optional<int64_t> group_size, int64_t gradient) {
  using Signature = std::vector<at::Tensor>(at::TensorList, at::TensorList, at::TensorList, at::TensorList, bool, bool,
                                            std::optional<int64_t>, int64_t, std::optional<int64_t>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::fake_quantize_foreach");
  return op.call(xs, scales, zero_points, bit_widths, is_signed, narrow_range, axis, rounding, group_size, gradient);
}

inline std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
call_fake_quantize_backward_foreach(at::TensorList grads, at::TensorList xs, at::TensorList scales,
                                    at::TensorList zero_points, at::TensorList bit_widths, bool is_signed,
                                    bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
                                    std::optional<int64_t> group_size, std::array<bool, 3> output_mask,
                                    int64_t gradient) {
  using Signature = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>(
      at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, bool, bool,
      std::optional<int64_t>, int64_t, std::optional<int64_t>, std::array<bool, 3>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::_fake_quantize_backward_foreach");
  return op.call(grads, xs, scales, zero_points, bit_widths, is_signed, narrow_range, axis, rounding, group_size,
                 output_mask, gradient);
}

inline at::Tensor call_sample_gates(const at::Tensor& gate_logits, const at::Tensor& noise, double temperature) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, double);
  static const auto op = typed_op<Signature>("mixbit::sample_gates");
  return op.call(gate_logits, noise, temperature);
}

inline at::Tensor call_expected_cost(const at::Tensor& act_logits, const at::Tensor& weight_logits,
                                     const at::Tensor& values, int64_t form, double temperature) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, double);
  static const auto op = typed_op<Signature>("mixbit::expected_cost");
  return op.call(act_logits, weight_logits, values, form, temperature);
}

inline at::Tensor call_gated_fake_quantize(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                                           at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> axis,
                                           int64_t form) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef, bool,
                               std::optional<int64_t>, int64_t);
  static const auto op = typed_op<Signature>("mixbit::gated_fake_quantize");
  return op.call(x, scale_range, gates, precisions, is_signed, axis, form);
}

inline at::Tensor call_mixture_fake_quantize(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                             const at::Tensor& bit_widths, bool is_signed,
                                             std::optional<int64_t> axis) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool,
                               std::optional<int64_t>);
  static const auto op = typed_op<Signature>("mixbit::mixture_fake_quantize");
  return op.call(x, scales, weights, bit_widths, is_signed, axis);
}

inline at::Tensor call_extra_level_fake_quantize(const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& bit_width, const at::Tensor& extra_bits,
                                                 std::optional<int64_t> axis, bool narrow_range, int64_t rounding) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               std::optional<int64_t>, bool, int64_t);
  static const auto op = typed_op<Signature>("mixbit::extra_level_fake_quantize");
  return op.call(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
}

inline std::tuple<at::Tensor, at::Tensor> call_extra_level_fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
    const at::Tensor& extra_bits, std::optional<int64_t> axis, bool narrow_range, int64_t rounding,
    std::array<bool, 2> output_mask) {
  using Signature =
      std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, std::optional<int64_t>, bool, int64_t, std::array<bool, 2>);
  static const auto op = typed_op<Signature>("mixbit::_extra_level_fake_quantize_backward");
  return op.call(grad, x, scale, bit_width, extra_bits, axis, narrow_range, rounding, output_mask);
}

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using ConvSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, bool, bool, int64_t, std::optional<int64_t>, c10::SymIntArrayRef,
                                 c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt, std::optional<at::ScalarType>,
                                 int64_t, int64_t);
using ConvBackwardSignature = SixTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         bool, bool, int64_t, std::optional<int64_t>, c10::SymIntArrayRef,
                                         c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt, std::array<bool, 6>,
                                         int64_t, int64_t);
using LinearSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, bool, bool, int64_t, std::optional<int64_t>,
                                   std::optional<at::ScalarType>, int64_t, int64_t);
using LinearBackwardSignature = SixTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           bool, bool, int64_t, std::optional<int64_t>, std::array<bool, 6>, int64_t,
                                           int64_t);

}  // namespace mixbit::ops
