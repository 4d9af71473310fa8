// Autograd of the ops of differentiable searches; see autograd.cpp.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../calls.h"
#include "record.h"

namespace mixbit::ops {

namespace {

using OptionalInt = std::optional<int64_t>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

class SampleGates : public torch::autograd::Function<SampleGates> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& gate_logits, const Variable& noise,
                          double temperature) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate_logits, noise});
    ctx->saved_data["temperature"] = temperature;
    return call_sample_gates(gate_logits, noise, temperature);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double);
    static const auto op = typed_op<Signature>("mixbit::_sample_gates_backward");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1], ctx->saved_data["temperature"].toDouble()), {}, {}};
  }
};

Variable sample_gates_autograd(const Variable& gate_logits, const Variable& noise, double temperature) {
  if (!any_recorded(gate_logits)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_sample_gates(gate_logits, noise, temperature);
  }
  return SampleGates::apply(gate_logits, noise, temperature);
}

class ExpectedCost : public torch::autograd::Function<ExpectedCost> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& act_logits, const Variable& weight_logits,
                          const Variable& values, int64_t form, double temperature) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({act_logits, weight_logits, values});
    ctx->saved_data["form"] = form;
    ctx->saved_data["temperature"] = temperature;
    return call_expected_cost(act_logits, weight_logits, values, form, temperature);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                         const at::Tensor&, int64_t, double);
    static const auto op = typed_op<Signature>("mixbit::_expected_cost_backward");
    const auto saved = ctx->get_saved_variables();
    auto [dact, dweight] = op.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["form"].toInt(),
                                   ctx->saved_data["temperature"].toDouble());
    return {dact, dweight, {}, {}, {}};
  }
};

Variable expected_cost_autograd(const Variable& act_logits, const Variable& weight_logits, const Variable& values,
                                int64_t form, double temperature) {
  if (!any_recorded(act_logits, weight_logits)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_expected_cost(act_logits, weight_logits, values, form, temperature);
  }
  return ExpectedCost::apply(act_logits, weight_logits, values, form, temperature);
}

class GatedFakeQuantize : public torch::autograd::Function<GatedFakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale_range, const Variable& gates,
                          at::IntArrayRef precisions, bool is_signed, OptionalInt axis, int64_t form) {
    constexpr int64_t kResidual = 1;
    ctx->saved_data["mask"] =
        c10::List<bool>({x.requires_grad(), scale_range.requires_grad() && form == kResidual, gates.requires_grad()});
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale_range, gates});
    ctx->saved_data["precisions"] = precisions;
    ctx->saved_data["signed"] = is_signed;
    keep_int(ctx, "axis", axis);
    ctx->saved_data["form"] = form;
    return call_gated_fake_quantize(x, scale_range, gates, precisions, is_signed, axis, form);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = ThreeTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   at::IntArrayRef, bool, OptionalInt, int64_t, std::array<bool, 3>);
    static const auto op = typed_op<Signature>("mixbit::_gated_fake_quantize_backward");
    const auto saved = ctx->get_saved_variables();
    const c10::List<bool> flags = ctx->saved_data["mask"].toBoolList();
    const std::array<bool, 3> mask = {flags[0], flags[1], flags[2]};
    const auto precisions = ctx->saved_data["precisions"].toIntVector();
    auto [dx, drange, dgates] =
        op.call(grads[0], saved[0], saved[1], saved[2], precisions, ctx->saved_data["signed"].toBool(),
                kept_int(ctx, "axis"), ctx->saved_data["form"].toInt(), mask);
    return {if_needed(dx, mask[0]), if_needed(drange, mask[1]), if_needed(dgates, mask[2]), {}, {}, {}, {}};
  }
};

Variable gated_fake_quantize_autograd(const Variable& x, const Variable& scale_range, const Variable& gates,
                                      at::IntArrayRef precisions, bool is_signed, OptionalInt axis, int64_t form) {
  if (!any_recorded(x, scale_range, gates)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_gated_fake_quantize(x, scale_range, gates, precisions, is_signed, axis, form);
  }
  return GatedFakeQuantize::apply(x, scale_range, gates, precisions, is_signed, axis, form);
}

class MixtureFakeQuantize : public torch::autograd::Function<MixtureFakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scales, const Variable& weights,
                          const Variable& bit_widths, bool is_signed, OptionalInt axis) {
    ctx->saved_data["mask"] = c10::List<bool>({x.requires_grad(), scales.requires_grad(), weights.requires_grad()});
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scales, weights, bit_widths});
    ctx->saved_data["signed"] = is_signed;
    keep_int(ctx, "axis", axis);
    return call_mixture_fake_quantize(x, scales, weights, bit_widths, is_signed, axis);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = ThreeTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, bool, OptionalInt, std::array<bool, 3>);
    static const auto op = typed_op<Signature>("mixbit::_mixture_fake_quantize_backward");
    const auto saved = ctx->get_saved_variables();
    const c10::List<bool> flags = ctx->saved_data["mask"].toBoolList();
    const std::array<bool, 3> mask = {flags[0], flags[1], flags[2]};
    auto [dx, dscales, dweights] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3],
                                           ctx->saved_data["signed"].toBool(), kept_int(ctx, "axis"), mask);
    return {if_needed(dx, mask[0]), if_needed(dscales, mask[1]), if_needed(dweights, mask[2]), {}, {}, {}};
  }
};

Variable mixture_fake_quantize_autograd(const Variable& x, const Variable& scales, const Variable& weights,
                                        const Variable& bit_widths, bool is_signed, OptionalInt axis) {
  if (!any_recorded(x, scales, weights)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_mixture_fake_quantize(x, scales, weights, bit_widths, is_signed, axis);
  }
  return MixtureFakeQuantize::apply(x, scales, weights, bit_widths, is_signed, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, Autograd, m) {
  m.impl("sample_gates", sample_gates_autograd);
  m.impl("expected_cost", expected_cost_autograd);
  m.impl("gated_fake_quantize", gated_fake_quantize_autograd);
  m.impl("mixture_fake_quantize", mixture_fake_quantize_autograd);
  for (const char* name : {"_sample_gates_backward", "_expected_cost_backward", "_gated_fake_quantize_backward",
                           "_mixture_fake_quantize_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace mixbit::ops
