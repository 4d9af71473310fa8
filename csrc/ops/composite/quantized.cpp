// quantized_conv2d and quantized_linear in terms of dispatched ops, one source for CPU and CUDA. The backward
// recomputes the quantized operands: saving them would double the memory of a training step.

#include <ATen/Functions.h>
#include <torch/library.h>

#include "../calls.h"
#include "../checks.h"

namespace mixbit::ops {

namespace {

// The gradient of ops that are called for their values alone.
constexpr auto kForwardOnly = static_cast<int64_t>(Gradient::kLearnedStep);

// x per tensor.
at::Tensor quantize_x(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                      const at::Tensor& bits, bool is_signed, int64_t rounding, std::optional<int64_t> group_size) {
  return call_fake_quantize(x, scale, zero_point, bits, is_signed, false, std::nullopt, rounding, group_size,
                            kForwardOnly);
}

// Per output channel where a parameter has more than one element.
std::optional<int64_t> weight_axis(const at::Tensor& scale, const at::Tensor& bits) {
  return scale.numel() > 1 || bits.numel() > 1 ? std::optional<int64_t>(0) : std::nullopt;
}

at::Tensor quantize_weight(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bits, bool narrow_range,
                           int64_t rounding, std::optional<int64_t> group_size) {
  return call_fake_quantize(weight, scale, at::zeros({1}, scale.options()), bits, true, narrow_range,
                            weight_axis(scale, bits), rounding, group_size, kForwardOnly);
}

// The type that the operands are multiplied in: that of x, or the one asked for (autocast), whatever both are held in.
at::ScalarType checked_type(const at::Tensor& x, const at::Tensor& weight, int64_t weight_dim,
                            std::optional<at::ScalarType> out_dtype) {
  check_floating(x, "x");
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == weight_dim, "weight has shape ", weight.sizes(), ": expected ", weight_dim,
                    " dimensions");
  TORCH_CHECK_VALUE(out_dtype.has_value() || weight.scalar_type() == x.scalar_type(), "weight has dtype ",
                    weight.scalar_type(), " and x ", x.scalar_type(), ": expected one dtype, or out_dtype given");
  return out_dtype.value_or(x.scalar_type());
}

std::optional<at::Tensor> cast(const std::optional<at::Tensor>& bias, at::ScalarType type) {
  return bias.has_value() ? std::optional<at::Tensor>(bias->to(type)) : std::nullopt;
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                  const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                  int64_t rounding, std::optional<int64_t> group_size, c10::SymIntArrayRef stride,
                  c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                  std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
  checked_gradient(x_gradient, "x_gradient");
  checked_gradient(w_gradient, "w_gradient");
  const auto type = checked_type(x, weight, 4, out_dtype);
  const at::Tensor xq = quantize_x(x, x_scale, x_zero_point, x_bits, signed_x, rounding, group_size).to(type);
  const at::Tensor wq = quantize_weight(weight, w_scale, w_bits, w_narrow_range, rounding, group_size).to(type);
  return at::conv2d_symint(xq, wq, cast(bias, type), stride, padding, dilation, groups);
}

// fake_quantize's backward of one operand from the gradient of its quantized values, which is ours alone: the result
// is written over it where it has the operand's layout.
std::tuple<at::Tensor, at::Tensor, at::Tensor> operand_backward(at::Tensor grad, const at::Tensor& x,
                                                                const at::Tensor& scale, const at::Tensor& zero_point,
                                                                const at::Tensor& bits, bool is_signed,
                                                                bool narrow_range, std::optional<int64_t> axis,
                                                                int64_t rounding, std::optional<int64_t> group_size,
                                                                int64_t gradient, std::array<bool, 3> mask) {
  grad = grad.to(x.scalar_type());
  if (!mask[0] || !x.is_non_overlapping_and_dense() || grad.sym_strides() != x.sym_strides()) {
    return call_fake_quantize_backward(grad, x, scale, zero_point, bits, is_signed, narrow_range, axis, rounding,
                                       group_size, mask, gradient);
  }
  auto [dscale, dzero_point] = call_fake_quantize_backward_(grad, x, scale, zero_point, bits, is_signed, narrow_range,
                                                            axis, rounding, group_size, {mask[1], mask[2]}, gradient);
  return {grad, dscale, dzero_point};
}

// fake_quantize's backward of both operands from the gradients of the multiplication. dx_scale: defined if it is known
// already.
SixTensors finish_backward(at::Tensor grad_x, at::Tensor grad_weight, const at::Tensor& grad_bias, at::Tensor dx_scale,
                           const at::Tensor& x, const at::Tensor& weight, const at::Tensor& x_scale,
                           const at::Tensor& x_zero_point, const at::Tensor& x_bits, const at::Tensor& w_scale,
                           const at::Tensor& w_bits, bool signed_x, bool w_narrow_range, int64_t rounding,
                           std::optional<int64_t> group_size, int64_t x_gradient, int64_t w_gradient,
                           const std::array<bool, 6>& mask) {
  at::Tensor dx, dx_zero_point, dweight, dw_scale;
  if (grad_x.defined()) {
    std::tie(dx, dx_scale, dx_zero_point) =
        operand_backward(std::move(grad_x), x, x_scale, x_zero_point, x_bits, signed_x, false, std::nullopt, rounding,
                         group_size, x_gradient, {mask[0], mask[3], mask[4]});
  }
  if (mask[1] || mask[5]) {
    std::tie(dweight, dw_scale, std::ignore) = operand_backward(
        std::move(grad_weight), weight, w_scale, at::zeros({1}, w_scale.options()), w_bits, true, w_narrow_range,
        weight_axis(w_scale, w_bits), rounding, group_size, w_gradient, {mask[1], mask[5], false});
  }
  // Outputs of an op must be defined and must not share memory.
  const auto or_empty = [](const at::Tensor& gradient, bool wanted, const at::Tensor& like) {
    return wanted ? gradient : at::empty({0}, like.options());
  };
  return {or_empty(dx, mask[0], x),
          or_empty(dweight, mask[1], weight),
          or_empty(mask[2] ? grad_bias.to(weight.scalar_type()) : grad_bias, mask[2], weight),
          or_empty(dx_scale, mask[3], x_scale),
          or_empty(dx_zero_point, mask[4], x_scale),
          or_empty(dw_scale, mask[5], w_scale)};
}

SixTensors conv2d_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                           const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                           int64_t rounding, std::optional<int64_t> group_size, c10::SymIntArrayRef stride,
                           c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                           std::array<bool, 6> mask, int64_t x_gradient, int64_t w_gradient) {
  const auto type = grad.scalar_type();
  const std::vector<c10::SymInt> no_output_padding(2, 0);
  const std::vector<c10::SymInt> bias_sizes{weight.sym_size(0)};
  const auto gradients = [&](const at::Tensor& input, const at::Tensor& kernel, std::array<bool, 3> wanted) {
    return at::convolution_backward_symint(grad, input, kernel, c10::SymIntArrayRef(bias_sizes), stride, padding,
                                           dilation, /*transposed=*/false, no_output_padding, groups, wanted);
  };
  const bool need_weight = mask[1] || mask[5];
  // An input that needs no gradient itself, as the image of a first layer: the gradient of its scale is the inner
  // product of the data gradient with R = d(quantized x) / d(scale), and that equals the inner product of the quantized
  // weight with the weight gradient taken at R, which costs a fraction of a data gradient.
  const bool only_scale = mask[3] && !mask[0] && !mask[4];
  const bool need_x = (mask[0] || mask[3] || mask[4]) && !only_scale;
  at::Tensor wq = quantize_weight(weight, w_scale, w_bits, w_narrow_range, rounding, group_size).to(type);
  at::Tensor xq, dx_scale, gx, gw, gb;
  if (only_scale) {
    auto [y, inside] = call_fake_quantize_mask(x, x_scale, x_zero_point, x_bits, signed_x, false, std::nullopt,
                                               rounding, group_size, x_gradient);
    // scale * R: y outside the grid; inside y - x, or zero when clipping.
    const at::Tensor& to_inside = checked_gradient(x_gradient) == Gradient::kClip ? y : x;
    const at::Tensor r = at::sub(y, call_fake_quantize_mask_backward(to_inside, inside, y.sym_strides(), std::nullopt));
    const at::Tensor at_r = std::get<1>(gradients(r.to(type), wq, {false, true, false}));
    dx_scale = at::div(at::mul(at_r, wq).sum(at::kFloat).reshape(x_scale.sizes()), x_scale);
    xq = y.to(type);
  } else if (need_weight) {
    xq = quantize_x(x, x_scale, x_zero_point, x_bits, signed_x, rounding, group_size).to(type);
  }
  if (!xq.defined()) {
    xq = x.to(type);  // its values do not matter: no weight gradient is asked for
  }
  std::tie(gx, gw, gb) = gradients(xq, wq, {need_x, need_weight, mask[2]});
  xq.reset();
  wq.reset();
  return finish_backward(std::move(gx), std::move(gw), gb, std::move(dx_scale), x, weight, x_scale, x_zero_point,
                         x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding, group_size, x_gradient,
                         w_gradient, mask);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                  const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                  int64_t rounding, std::optional<int64_t> group_size, std::optional<at::ScalarType> out_dtype,
                  int64_t x_gradient, int64_t w_gradient) {
  checked_gradient(x_gradient, "x_gradient");
  checked_gradient(w_gradient, "w_gradient");
  const auto type = checked_type(x, weight, 2, out_dtype);
  const at::Tensor xq = quantize_x(x, x_scale, x_zero_point, x_bits, signed_x, rounding, group_size).to(type);
  const at::Tensor wq = quantize_weight(weight, w_scale, w_bits, w_narrow_range, rounding, group_size).to(type);
  return at::linear(xq, wq, cast(bias, type));
}

SixTensors linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                           const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                           int64_t rounding, std::optional<int64_t> group_size, std::array<bool, 6> mask,
                           int64_t x_gradient, int64_t w_gradient) {
  const auto type = grad.scalar_type();
  at::Tensor gx, gw, gb;
  const at::Tensor flat_grad = grad.reshape({-1, weight.size(0)});
  if (mask[0] || mask[3] || mask[4]) {
    const at::Tensor wq = quantize_weight(weight, w_scale, w_bits, w_narrow_range, rounding, group_size).to(type);
    gx = at::mm(flat_grad, wq).reshape(x.sizes());
  }
  if (mask[1] || mask[5]) {
    const at::Tensor xq = quantize_x(x, x_scale, x_zero_point, x_bits, signed_x, rounding, group_size).to(type);
    gw = at::mm(flat_grad.t(), xq.reshape({-1, weight.size(1)}));
  }
  if (mask[2]) {
    gb = flat_grad.sum(0);
  }
  return finish_backward(std::move(gx), std::move(gw), gb, at::Tensor(), x, weight, x_scale, x_zero_point, x_bits,
                         w_scale, w_bits, signed_x, w_narrow_range, rounding, group_size, x_gradient, w_gradient, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CompositeExplicitAutograd, m) {
  m.impl("quantized_conv2d", conv2d);
  m.impl("_quantized_conv2d_backward", conv2d_backward);
  m.impl("quantized_linear", linear);
  m.impl("_quantized_linear_backward", linear_backward);
}

}  // namespace mixbit::ops
