// The ops for C++ programs (ops.h): typed calls through the dispatcher.

#include <mixbit/ops/ops.h>

#include "calls.h"

namespace mixbit {

namespace {

using ops::typed_op;
using OptionalInt = std::optional<int64_t>;

}  // namespace

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         const at::Tensor& bit_width, bool is_signed, bool narrow_range, OptionalInt axis,
                         int64_t rounding, int64_t gradient) {
  return ops::call_fake_quantize(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, std::nullopt,
                                 gradient);
}

std::vector<at::Tensor> fake_quantize_foreach(at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                                              at::TensorList bit_widths, bool is_signed, bool narrow_range,
                                              OptionalInt axis, int64_t rounding, int64_t gradient) {
  return xs.empty() ? std::vector<at::Tensor>()
                    : ops::call_fake_quantize_foreach(xs, scales, zero_points, bit_widths, is_signed, narrow_range,
                                                      axis, rounding, std::nullopt, gradient);
}

at::Tensor quantized_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                            const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                            int64_t rounding, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            int64_t groups, std::optional<at::ScalarType> out_dtype, int64_t x_gradient,
                            int64_t w_gradient) {
  return typed_op<ops::ConvSignature>("mixbit::quantized_conv2d")
      .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
            std::nullopt, c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
            c10::fromIntArrayRefSlow(dilation), groups, out_dtype, x_gradient, w_gradient);
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& x_scale, const at::Tensor& x_zero_point, const at::Tensor& x_bits,
                            const at::Tensor& w_scale, const at::Tensor& w_bits, bool signed_x, bool w_narrow_range,
                            int64_t rounding, std::optional<at::ScalarType> out_dtype, int64_t x_gradient,
                            int64_t w_gradient) {
  return typed_op<ops::LinearSignature>("mixbit::quantized_linear")
      .call(x, weight, bias, x_scale, x_zero_point, x_bits, w_scale, w_bits, signed_x, w_narrow_range, rounding,
            std::nullopt, out_dtype, x_gradient, w_gradient);
}

at::Tensor extra_level_fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
                                     const at::Tensor& extra_bits, OptionalInt axis, bool narrow_range,
                                     int64_t rounding) {
  return ops::call_extra_level_fake_quantize(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
}

std::tuple<at::Tensor, at::Tensor> quantization_noise(const at::Tensor& x, const at::Tensor& scales,
                                                      const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                                                      OptionalInt axis) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool,
                                                       bool, OptionalInt);
  return typed_op<Signature>("mixbit::quantization_noise").call(x, scales, bit_widths, is_signed, narrow_range, axis);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> quantization_noise_foreach(
    at::TensorList xs, at::TensorList scales, at::TensorList bit_widths, bool is_signed, bool narrow_range,
    OptionalInt axis) {
  using Signature = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>(
      at::TensorList, at::TensorList, at::TensorList, bool, bool, OptionalInt);
  if (xs.empty()) {
    return {};
  }
  return typed_op<Signature>("mixbit::quantization_noise_foreach")
      .call(xs, scales, bit_widths, is_signed, narrow_range, axis);
}

std::tuple<at::Tensor, at::Tensor> noise_power(const at::Tensor& x, const at::Tensor& reference) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&);
  return typed_op<Signature>("mixbit::noise_power").call(x, reference);
}

Observation observe(const at::Tensor& x, OptionalInt axis, int64_t bins) {
  using Signature =
      std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, OptionalInt, int64_t);
  auto [min, max, sum, sum_sq, histogram] = typed_op<Signature>("mixbit::observe").call(x, axis, bins);
  return {min, max, sum, sum_sq, histogram};
}

at::Tensor mse_scales(const at::Tensor& x, const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                      OptionalInt axis) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, bool, bool, OptionalInt);
  return typed_op<Signature>("mixbit::mse_scales").call(x, bit_widths, is_signed, narrow_range, axis);
}

at::Tensor mse_scales_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                     const at::Tensor& bit_widths, bool is_signed, bool narrow_range) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool);
  return typed_op<Signature>("mixbit::mse_scales_from_histogram")
      .call(histogram, min, max, bit_widths, is_signed, narrow_range);
}

at::Tensor quantization_noise_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                             const at::Tensor& scales, const at::Tensor& bit_widths, bool is_signed,
                                             bool narrow_range) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, bool, bool);
  return typed_op<Signature>("mixbit::quantization_noise_from_histogram")
      .call(histogram, min, max, scales, bit_widths, is_signed, narrow_range);
}

at::Tensor optimize_rounding(const at::Tensor& weight, const at::Tensor& moments, const at::Tensor& scale,
                             const at::Tensor& bit_width, bool narrow_range, double damping, int64_t sweeps) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, double, int64_t);
  return typed_op<Signature>("mixbit::optimize_rounding")
      .call(weight, moments, scale, bit_width, narrow_range, damping, sweeps);
}

at::Tensor update_level_switches_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                  at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                                  at::TensorList counts, at::TensorList runs, int64_t score, double momentum,
                                  bool narrow_range, OptionalInt axis, int64_t rounding) {
  using Signature =
      at::Tensor(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                 at::TensorList, at::TensorList, int64_t, double, bool, OptionalInt, int64_t);
  return typed_op<Signature>("mixbit::update_level_switches_")
      .call(weights, scales, bit_widths, extra_bits, codes, marks, counts, runs, score, momentum, narrow_range, axis,
            rounding);
}

at::Tensor freeze_oscillating_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                               at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                               at::TensorList frequencies, at::TensorList averages, double threshold, double momentum,
                               bool narrow_range, OptionalInt axis, int64_t rounding) {
  using Signature =
      at::Tensor(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                 at::TensorList, at::TensorList, double, double, bool, OptionalInt, int64_t);
  return typed_op<Signature>("mixbit::freeze_oscillating_")
      .call(weights, scales, bit_widths, extra_bits, codes, marks, frequencies, averages, threshold, momentum,
            narrow_range, axis, rounding);
}

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  return typed_op<at::Tensor(const at::Tensor&, int64_t)>("mixbit::pack_bits").call(codes, bits);
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t n, bool is_signed) {
  return typed_op<at::Tensor(const at::Tensor&, int64_t, int64_t, bool)>("mixbit::unpack_bits")
      .call(packed, bits, n, is_signed);
}

at::Tensor int_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& multiplier, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups, int64_t x_zero_point, int64_t y_zero_point,
                      int64_t y_low, int64_t y_high, int64_t weight_bits) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t);
  return typed_op<Signature>("mixbit::int_conv2d")
      .call(x, weight, bias, multiplier, stride, padding, dilation, groups, x_zero_point, y_zero_point, y_low, y_high,
            weight_bits);
}

at::Tensor int_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& multiplier, int64_t x_zero_point, int64_t y_zero_point, int64_t y_low,
                      int64_t y_high, int64_t weight_bits) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const at::Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t);
  return typed_op<Signature>("mixbit::int_linear")
      .call(x, weight, bias, multiplier, x_zero_point, y_zero_point, y_low, y_high, weight_bits);
}

at::Tensor requantize(const at::Tensor& total, const at::Tensor& multiplier, int64_t zero_point, int64_t low,
                      int64_t high, OptionalInt axis) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, OptionalInt);
  return typed_op<Signature>("mixbit::requantize").call(total, multiplier, zero_point, low, high, axis);
}

at::Tensor sample_gates(const at::Tensor& gate_logits, const at::Tensor& noise, double temperature) {
  return ops::call_sample_gates(gate_logits, noise, temperature);
}

at::Tensor gated_fake_quantize(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                               at::IntArrayRef precisions, bool is_signed, OptionalInt axis, int64_t form) {
  return ops::call_gated_fake_quantize(x, scale_range, gates, precisions, is_signed, axis, form);
}

at::Tensor mixture_fake_quantize(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                 const at::Tensor& bit_widths, bool is_signed, OptionalInt axis) {
  return ops::call_mixture_fake_quantize(x, scales, weights, bit_widths, is_signed, axis);
}

at::Tensor expected_cost(const at::Tensor& act_logits, const at::Tensor& weight_logits, const at::Tensor& values,
                         int64_t form, double temperature) {
  return ops::call_expected_cost(act_logits, weight_logits, values, form, temperature);
}

namespace {

c10::List<bool> bools(const std::vector<bool>& values) {
  c10::List<bool> list;
  for (const bool value : values) {
    list.push_back(value);
  }
  return list;
}

}  // namespace

void threshold_aware_step_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, const at::Tensor& lr,
                           const ThresholdRule& rule, const SgdOptions& o) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                         const at::Tensor&, c10::List<bool>, int64_t, double, double, bool, double, double, double,
                         bool, bool, bool, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);
  if (!weights.empty()) {
    typed_op<Signature>("mixbit::threshold_aware_step_")
        .call(weights, grads, momenta, rule.scales, rule.bit_widths, rule.extra_bits, lr, bools(rule.narrow_range),
              rule.shape, rule.alpha, rule.rho, rule.on_grad, o.momentum, o.dampening, o.weight_decay, o.nesterov,
              o.maximize, o.first_step, o.grad_scale, o.found_inf);
  }
}

void threshold_aware_adam_step_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                                at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList state_steps,
                                const at::Tensor& lr, const ThresholdRule& rule, const AdamOptions& o) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                         at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, c10::List<bool>, int64_t,
                         double, double, bool, double, double, double, double, bool, bool, bool,
                         const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);
  if (!weights.empty()) {
    typed_op<Signature>("mixbit::threshold_aware_adam_step_")
        .call(weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, rule.scales, rule.bit_widths,
              rule.extra_bits, lr, bools(rule.narrow_range), rule.shape, rule.alpha, rule.rho, rule.on_grad, o.beta1,
              o.beta2, o.eps, o.weight_decay, o.decoupled, o.amsgrad, o.maximize, o.grad_scale, o.found_inf);
  }
}

void scale_updates_(at::TensorList weights, at::TensorList before, const ThresholdRule& rule) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                         c10::List<bool>, int64_t, double, double);
  if (!weights.empty()) {
    typed_op<Signature>("mixbit::scale_updates_")
        .call(weights, before, rule.scales, rule.bit_widths, rule.extra_bits, bools(rule.narrow_range), rule.shape,
              rule.alpha, rule.rho);
  }
}

std::vector<at::Tensor> threshold_multipliers(at::TensorList weights, const ThresholdRule& rule) {
  using Signature = std::vector<at::Tensor>(at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                            c10::List<bool>, int64_t, double, double);
  return weights.empty() ? std::vector<at::Tensor>()
                         : typed_op<Signature>("mixbit::threshold_multipliers")
                               .call(weights, rule.scales, rule.bit_widths, rule.extra_bits, bools(rule.narrow_range),
                                     rule.shape, rule.alpha, rule.rho);
}

}  // namespace mixbit
