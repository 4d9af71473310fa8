// Autograd of the differentiable ops: forward and backward are dispatched ops, the backward an op of its own. Flags
// are read before the dispatch guard, and a gradient nobody asked for comes back from the op as a tensor of shape [0].

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "../calls.h"
#include "record.h"

namespace mixbit::ops {

namespace {

// The options of a grid, which fake_quantize and its list form keep alike.
struct GridOptions {
  bool is_signed;
  bool narrow_range;
  std::optional<int64_t> axis;
  int64_t rounding;
  std::optional<int64_t> group_size;
  int64_t gradient;
};

void keep_options(AutogradContext* ctx, const GridOptions& options) {
  ctx->saved_data["signed"] = options.is_signed;
  ctx->saved_data["narrow_range"] = options.narrow_range;
  keep_int(ctx, "axis", options.axis);
  ctx->saved_data["rounding"] = options.rounding;
  keep_int(ctx, "group_size", options.group_size);
  ctx->saved_data["gradient"] = options.gradient;
}

GridOptions kept_options(AutogradContext* ctx) {
  return {ctx->saved_data["signed"].toBool(),
          ctx->saved_data["narrow_range"].toBool(),
          kept_int(ctx, "axis"),
          ctx->saved_data["rounding"].toInt(),
          kept_int(ctx, "group_size"),
          ctx->saved_data["gradient"].toInt()};
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          const Variable& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                          int64_t rounding, std::optional<int64_t> group_size, int64_t gradient) {
    ctx->saved_data["mask"] = c10::List<bool>({x.requires_grad(), scale.requires_grad(), zero_point.requires_grad()});
    at::AutoDispatchBelowADInplaceOrView guard;
    Variable y = call_fake_quantize(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding,
                                    group_size, gradient);
    ctx->save_for_backward({x, scale, zero_point, bit_width});
    keep_options(ctx, {is_signed, narrow_range, axis, rounding, group_size, gradient});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const c10::List<bool> flags = ctx->saved_data["mask"].toBoolList();
    const std::array<bool, 3> mask = {flags[0], flags[1], flags[2]};
    const GridOptions o = kept_options(ctx);
    auto [dx, dscale, dzero_point] =
        call_fake_quantize_backward(grads[0], saved[0], saved[1], saved[2], saved[3], o.is_signed, o.narrow_range,
                                    o.axis, o.rounding, o.group_size, mask, o.gradient);
    return {if_needed(dx, mask[0]),
            if_needed(dscale, mask[1]),
            if_needed(dzero_point, mask[2]),
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

// With a fixed scale the backward needs one bit an element and not x.
class FixedFakeQuantize : public torch::autograd::Function<FixedFakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& zero_point,
                          const Variable& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                          int64_t rounding, std::optional<int64_t> group_size, int64_t gradient) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, mask] = call_fake_quantize_mask(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding,
                                             group_size, gradient);
    ctx->save_for_backward({mask});
    ctx->saved_data["strides"] = y.sym_strides();
    keep_int(ctx, "axis", axis);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto strides = ctx->saved_data["strides"].toSymIntVector();
    Variable dx =
        call_fake_quantize_mask_backward(grads[0], ctx->get_saved_variables()[0], strides, kept_int(ctx, "axis"));
    return {dx, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

Variable fake_quantize_autograd(const Variable& x, const Variable& scale, const Variable& zero_point,
                                const Variable& bit_width, bool is_signed, bool narrow_range,
                                std::optional<int64_t> axis, int64_t rounding, std::optional<int64_t> group_size,
                                int64_t gradient) {
  if (!any_recorded(x, scale, zero_point)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_fake_quantize(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size,
                              gradient);
  }
  if (at::GradMode::is_enabled() && x.requires_grad() && !scale.requires_grad() && !zero_point.requires_grad()) {
    return FixedFakeQuantize::apply(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding,
                                    group_size, gradient);
  }
  return FakeQuantize::apply(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size,
                             gradient);
}

// Lists of n tensors each; the gradients asked for are those of any tensor of a list.
class FakeQuantizeForeach : public torch::autograd::Function<FakeQuantizeForeach> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList xs, at::TensorList scales,
                               at::TensorList zero_points, at::TensorList bit_widths, bool is_signed, bool narrow_range,
                               std::optional<int64_t> axis, int64_t rounding, std::optional<int64_t> group_size,
                               int64_t gradient) {
    const auto any = [](at::TensorList list) {
      return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return t.requires_grad(); });
    };
    ctx->saved_data["mask"] = c10::List<bool>({any(xs), any(scales), any(zero_points)});
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list ys = call_fake_quantize_foreach(xs, scales, zero_points, bit_widths, is_signed, narrow_range, axis,
                                                  rounding, group_size, gradient);
    variable_list saved;
    for (const auto& list : {xs, scales, zero_points, bit_widths}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(std::move(saved));
    keep_options(ctx, {is_signed, narrow_range, axis, rounding, group_size, gradient});
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const size_t n = grads.size();
    const auto part = [&](size_t k) { return at::TensorList(saved).slice(k * n, n); };
    for (size_t i = 0; i < n; ++i) {
      if (!grads[i].defined()) {
        grads[i] = at::zeros_like(saved[i]);
      }
    }
    const c10::List<bool> flags = ctx->saved_data["mask"].toBoolList();
    const std::array<bool, 3> mask = {flags[0], flags[1], flags[2]};
    const GridOptions o = kept_options(ctx);
    auto [dx, dscale, dzero_point] =
        call_fake_quantize_backward_foreach(grads, part(0), part(1), part(2), part(3), o.is_signed, o.narrow_range,
                                            o.axis, o.rounding, o.group_size, mask, o.gradient);
    variable_list gradients(4 * n + 6);
    for (size_t i = 0; i < n; ++i) {
      gradients[i] = if_needed(dx[i], mask[0]);
      gradients[n + i] = if_needed(dscale[i], mask[1]);
      gradients[2 * n + i] = if_needed(dzero_point[i], mask[2]);
    }
    return gradients;
  }
};

variable_list fake_quantize_foreach_autograd(at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                                             at::TensorList bit_widths, bool is_signed, bool narrow_range,
                                             std::optional<int64_t> axis, int64_t rounding,
                                             std::optional<int64_t> group_size, int64_t gradient) {
  return FakeQuantizeForeach::apply(xs, scales, zero_points, bit_widths, is_signed, narrow_range, axis, rounding,
                                    group_size, gradient);
}

// x and extra_bits are a weight and a buffer beside it, which the graph holds anyway: saving them costs nothing, also
// where the scale is fixed.
class ExtraLevelFakeQuantize : public torch::autograd::Function<ExtraLevelFakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale, const Variable& bit_width,
                          const Variable& extra_bits, std::optional<int64_t> axis, bool narrow_range,
                          int64_t rounding) {
    ctx->saved_data["mask"] = c10::List<bool>({x.requires_grad(), scale.requires_grad()});
    at::AutoDispatchBelowADInplaceOrView guard;
    Variable y = call_extra_level_fake_quantize(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
    ctx->save_for_backward({x, scale, bit_width, extra_bits});
    keep_int(ctx, "axis", axis);
    ctx->saved_data["narrow_range"] = narrow_range;
    ctx->saved_data["rounding"] = rounding;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const c10::List<bool> flags = ctx->saved_data["mask"].toBoolList();
    const std::array<bool, 2> mask = {flags[0], flags[1]};
    auto [dx, dscale] = call_extra_level_fake_quantize_backward(
        grads[0], saved[0], saved[1], saved[2], saved[3], kept_int(ctx, "axis"),
        ctx->saved_data["narrow_range"].toBool(), ctx->saved_data["rounding"].toInt(), mask);
    return {if_needed(dx, mask[0]), if_needed(dscale, mask[1]), {}, {}, {}, {}, {}};
  }
};

Variable extra_level_fake_quantize_autograd(const Variable& x, const Variable& scale, const Variable& bit_width,
                                            const Variable& extra_bits, std::optional<int64_t> axis, bool narrow_range,
                                            int64_t rounding) {
  if (!any_recorded(x, scale)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_extra_level_fake_quantize(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
  }
  return ExtraLevelFakeQuantize::apply(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
}

// What conv2d and linear save and restore alike: operands, quantizer parameters and flags.
void save_operands(AutogradContext* ctx, const Variable& x, const Variable& weight, const Variable& x_scale,
                   const Variable& x_zero_point, const Variable& x_bits, const Variable& w_scale,
                   const Variable& w_bits, bool signed_x, bool w_narrow_range, int64_t rounding,
                   std::optional<int64_t> group_size, int64_t x_gradient, int64_t w_gradient) {
  ctx->save_for_backward({x, weight, x_scale, x_zero_point, x_bits, w_scale, w_bits});
  ctx->saved_data["signed_x"] = signed_x;
  ctx->saved_data["w_narrow_range"] = w_narrow_range;
  ctx->saved_data["rounding"] = rounding;
  keep_int(ctx, "group_size", group_size);
  ctx->saved_data["x_gradient"] = x_gradient;
  ctx->saved_data["w_gradient"] = w_gradient;
}

c10::List<bool> gradient_flags(const Variable& x, const Variable& weight, const std::optional<Variable>& bias,
                               const Variable& x_scale, const Variable& x_zero_point, const Variable& w_scale) {
  return c10::List<bool>({x.requires_grad(), weight.requires_grad(), bias.has_value() && bias->requires_grad(),
                          x_scale.requires_grad(), x_zero_point.requires_grad(), w_scale.requires_grad()});
}

std::array<bool, 6> to_mask(const c10::List<bool>& flags) {
  return {flags[0], flags[1], flags[2], flags[3], flags[4], flags[5]};
}

class QuantizedConv2d : public torch::autograd::Function<QuantizedConv2d> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                          const std::optional<Variable>& bias, const Variable& x_scale, const Variable& x_zero_point,
                          const Variable& x_bits, const Variable& w_scale, const Variable& w_bits, bool signed_x,
                          bool w_narrow_range, int64_t rounding, std::optional<int64_t> group_size,
                          c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                          c10::SymInt groups, std::optional<at::ScalarType> out_dtype, int64_t x_gradient,
                          int64_t w_gradient) {
    ctx->saved_data["mask"] = gradient_flags(x, weight, bias, x_scale, x_zero_point, w_scale);
    at::AutoDispatchBelowADInplaceOrView guard;
    Variable y = typed_op<ConvSignature>("mixbit::quantized_conv2d")
                     .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range,
                           rounding, group_size, stride, padding, dilation, groups, out_dtype, x_gradient, w_gradient);
    save_operands(ctx, x, weight, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
                  group_size, x_gradient, w_gradient);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto mask = to_mask(ctx->saved_data["mask"].toBoolList());
    auto sizes = [&](const char* key) { return ctx->saved_data[key].toSymIntVector(); };
    const auto stride = sizes("stride"), padding = sizes("padding"), dilation = sizes("dilation");
    auto [dx, dweight, dbias, dx_scale, dx_zero_point, dw_scale] =
        typed_op<ConvBackwardSignature>("mixbit::_quantized_conv2d_backward")
            .call(grads[0], s[0], s[1], s[2], s[3], s[4], s[5], s[6], ctx->saved_data["signed_x"].toBool(),
                  ctx->saved_data["w_narrow_range"].toBool(), ctx->saved_data["rounding"].toInt(),
                  kept_int(ctx, "group_size"), stride, padding, dilation, ctx->saved_data["groups"].toSymInt(), mask,
                  ctx->saved_data["x_gradient"].toInt(), ctx->saved_data["w_gradient"].toInt());
    return {if_needed(dx, mask[0]),
            if_needed(dweight, mask[1]),
            if_needed(dbias, mask[2]),
            if_needed(dx_scale, mask[3]),
            if_needed(dx_zero_point, mask[4]),
            {},
            if_needed(dw_scale, mask[5]),
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

Variable quantized_conv2d_autograd(const Variable& x, const Variable& weight, const std::optional<Variable>& bias,
                                   const Variable& x_scale, const Variable& x_zero_point, const Variable& x_bits,
                                   const Variable& w_scale, const Variable& w_bits, bool signed_x, bool w_narrow_range,
                                   int64_t rounding, std::optional<int64_t> group_size, c10::SymIntArrayRef stride,
                                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                                   std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
  return QuantizedConv2d::apply(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x,
                                w_narrow_range, rounding, group_size, stride, padding, dilation, groups, out_dtype,
                                x_gradient, w_gradient);
}

class QuantizedLinear : public torch::autograd::Function<QuantizedLinear> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                          const std::optional<Variable>& bias, const Variable& x_scale, const Variable& x_zero_point,
                          const Variable& x_bits, const Variable& w_scale, const Variable& w_bits, bool signed_x,
                          bool w_narrow_range, int64_t rounding, std::optional<int64_t> group_size,
                          std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
    ctx->saved_data["mask"] = gradient_flags(x, weight, bias, x_scale, x_zero_point, w_scale);
    at::AutoDispatchBelowADInplaceOrView guard;
    Variable y = typed_op<LinearSignature>("mixbit::quantized_linear")
                     .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range,
                           rounding, group_size, out_dtype, x_gradient, w_gradient);
    save_operands(ctx, x, weight, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
                  group_size, x_gradient, w_gradient);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto mask = to_mask(ctx->saved_data["mask"].toBoolList());
    auto [dx, dweight, dbias, dx_scale, dx_zero_point, dw_scale] =
        typed_op<LinearBackwardSignature>("mixbit::_quantized_linear_backward")
            .call(grads[0], s[0], s[1], s[2], s[3], s[4], s[5], s[6], ctx->saved_data["signed_x"].toBool(),
                  ctx->saved_data["w_narrow_range"].toBool(), ctx->saved_data["rounding"].toInt(),
                  kept_int(ctx, "group_size"), mask, ctx->saved_data["x_gradient"].toInt(),
                  ctx->saved_data["w_gradient"].toInt());
    return {if_needed(dx, mask[0]),
            if_needed(dweight, mask[1]),
            if_needed(dbias, mask[2]),
            if_needed(dx_scale, mask[3]),
            if_needed(dx_zero_point, mask[4]),
            {},
            if_needed(dw_scale, mask[5]),
            {},
            {},
            {},
            {},
            {},
            {},
            {},
            {}};
  }
};

Variable quantized_linear_autograd(const Variable& x, const Variable& weight, const std::optional<Variable>& bias,
                                   const Variable& x_scale, const Variable& x_zero_point, const Variable& x_bits,
                                   const Variable& w_scale, const Variable& w_bits, bool signed_x, bool w_narrow_range,
                                   int64_t rounding, std::optional<int64_t> group_size,
                                   std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
  return QuantizedLinear::apply(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x,
                                w_narrow_range, rounding, group_size, out_dtype, x_gradient, w_gradient);
}

// Autocast: the operands are quantized as they come (casting first would move values across the thresholds of the grid,
// and costs a pass more) and multiplied in the lower type. fake_quantize needs no rule: it returns the type of x.
template <c10::DeviceType kDevice>
at::ScalarType autocast_type(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 ? at::autocast::get_autocast_dtype(kDevice)
                                                                          : type;
}

template <c10::DeviceType kDevice>
Variable quantized_conv2d_autocast(const Variable& x, const Variable& weight, const std::optional<Variable>& bias,
                                   const Variable& x_scale, const Variable& x_zero_point, const Variable& x_bits,
                                   const Variable& w_scale, const Variable& w_bits, bool signed_x, bool w_narrow_range,
                                   int64_t rounding, std::optional<int64_t> group_size, c10::SymIntArrayRef stride,
                                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                                   std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  return typed_op<ConvSignature>("mixbit::quantized_conv2d")
      .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
            group_size, stride, padding, dilation, groups,
            out_dtype.has_value() ? out_dtype : autocast_type<kDevice>(x), x_gradient, w_gradient);
}

template <c10::DeviceType kDevice>
Variable quantized_linear_autocast(const Variable& x, const Variable& weight, const std::optional<Variable>& bias,
                                   const Variable& x_scale, const Variable& x_zero_point, const Variable& x_bits,
                                   const Variable& w_scale, const Variable& w_bits, bool signed_x, bool w_narrow_range,
                                   int64_t rounding, std::optional<int64_t> group_size,
                                   std::optional<at::ScalarType> out_dtype, int64_t x_gradient, int64_t w_gradient) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  return typed_op<LinearSignature>("mixbit::quantized_linear")
      .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
            group_size, out_dtype.has_value() ? out_dtype : autocast_type<kDevice>(x), x_gradient, w_gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, AutocastCPU, m) {
  m.impl("quantized_conv2d", quantized_conv2d_autocast<c10::DeviceType::CPU>);
  m.impl("quantized_linear", quantized_linear_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(mixbit, AutocastCUDA, m) {
  m.impl("quantized_conv2d", quantized_conv2d_autocast<c10::DeviceType::CUDA>);
  m.impl("quantized_linear", quantized_linear_autocast<c10::DeviceType::CUDA>);
}

TORCH_LIBRARY_IMPL(mixbit, Autograd, m) {
  m.impl("fake_quantize", fake_quantize_autograd);
  m.impl("fake_quantize_foreach", fake_quantize_foreach_autograd);
  m.impl("extra_level_fake_quantize", extra_level_fake_quantize_autograd);
  m.impl("quantized_conv2d", quantized_conv2d_autograd);
  m.impl("quantized_linear", quantized_linear_autograd);
  // Statistics, codes and optimizer steps carry no gradient.
  for (const char* name :
       {"quantization_noise", "quantization_noise_foreach", "noise_power", "observe", "mse_scales",
        "mse_scales_from_histogram", "quantization_noise_from_histogram", "optimize_rounding", "pack_bits",
        "unpack_bits", "threshold_aware_step_", "threshold_aware_adam_step_", "scale_updates_", "threshold_multipliers",
        "update_level_switches_", "freeze_oscillating_", "int_conv2d", "int_linear", "requantize"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
  // No double backward: asking for one raises instead of giving zeros.
  for (const char* name : {"_fake_quantize_backward", "_fake_quantize_backward_", "_fake_quantize_backward_foreach",
                           "_fake_quantize_mask", "_fake_quantize_mask_backward", "_extra_level_fake_quantize_backward",
                           "_quantized_conv2d_backward", "_quantized_linear_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace mixbit::ops
