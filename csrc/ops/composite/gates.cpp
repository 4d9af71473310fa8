// sample_gates and expected_cost in terms of ATen, one source for CPU and CUDA: a handful of numbers each.

#include <ATen/Functions.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"

namespace mixbit::ops {

namespace {

// The hard-concrete distribution is stretched to kLow ... kLow + kStretch.
constexpr double kLow = -0.1;
constexpr double kStretch = 1.2;

void check_temperature(double temperature) {
  TORCH_CHECK_VALUE(temperature > 0.0 && std::isfinite(temperature), "temperature=", temperature,
                    ": expected a positive finite number");
}

// s of the concrete distribution, shape of noise.
at::Tensor concrete(const at::Tensor& gate_logits, const at::Tensor& noise, double temperature) {
  check_temperature(temperature);
  TORCH_CHECK_VALUE(gate_logits.scalar_type() == at::kFloat && gate_logits.dim() == 1, "gate_logits is ",
                    gate_logits.scalar_type(), " ", gate_logits.sizes(), ": expected float32 [gates]");
  const int64_t count = gate_logits.size(0);
  TORCH_CHECK_VALUE(
      noise.scalar_type() == at::kFloat && (noise.dim() == 1 || noise.dim() == 2) && noise.size(0) == count,
      "noise is ", noise.scalar_type(), " ", noise.sizes(), ": expected float32 [", count, "] or [", count,
      ", samples]");
  TORCH_CHECK_VALUE(noise.device() == gate_logits.device(), "noise is on ", noise.device(), " and gate_logits on ",
                    gate_logits.device(), ": expected one device");
  const at::Tensor logits = noise.dim() == 1 ? gate_logits : gate_logits.unsqueeze(1);
  return noise.log().sub_(noise.neg().log1p_()).add_(logits).div_(temperature).sigmoid_();
}

at::Tensor sample_gates(const at::Tensor& gate_logits, const at::Tensor& noise, double temperature) {
  return concrete(gate_logits, noise, temperature).mul_(kStretch).add_(kLow).clamp_(0.0, 1.0);
}

at::Tensor sample_gates_backward(const at::Tensor& grad, const at::Tensor& gate_logits, const at::Tensor& noise,
                                 double temperature) {
  const at::Tensor s = concrete(gate_logits, noise, temperature);
  const at::Tensor stretched = s.mul(kStretch).add_(kLow);
  const at::Tensor moving = stretched.gt(0.0).logical_and_(stretched.lt(1.0));
  const at::Tensor slope = s.mul(s.neg().add_(1.0)).mul_(kStretch / temperature).mul_(moving);
  const at::Tensor gradient = slope.mul_(grad);
  return noise.dim() == 1 ? gradient : gradient.sum(1);
}

enum class CostForm : int64_t { kExpected = 0, kSeparate = 1, kJoint = 2 };

CostForm check_cost_arguments(const at::Tensor& act_logits, const at::Tensor& weight_logits, const at::Tensor& values,
                              int64_t form, double temperature) {
  check_temperature(temperature);
  TORCH_CHECK_VALUE(form >= 0 && form <= 2, "form=", form,
                    " is not known: expected 0 (expected), 1 (separate) or 2 (joint)");
  TORCH_CHECK_VALUE((values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble) && values.dim() == 3,
                    "values is ", values.scalar_type(), " ", values.sizes(),
                    ": expected float32 or float64 [layers, act widths, weight widths]");
  const auto check = [&](const at::Tensor& logits, const char* name, int64_t dimension) {
    const int64_t gates = values.size(dimension) - 1;
    TORCH_CHECK_VALUE(logits.scalar_type() == at::kFloat && logits.dim() == 2 && logits.size(0) == values.size(0) &&
                          logits.size(1) == gates,
                      name, " is ", logits.scalar_type(), " ", logits.sizes(), ": expected float32 [", values.size(0),
                      ", ", gates, "] for values ", values.sizes());
    TORCH_CHECK_VALUE(logits.device() == values.device(), name, " is on ", logits.device(), " and values on ",
                      values.device(), ": expected one device");
  };
  check(act_logits, "act_logits", 1);
  check(weight_logits, "weight_logits", 2);
  return static_cast<CostForm>(form);
}

// Of one operand, float64: `open` [L, K], the probability that the first k gates are open (1 for k = 0), and `shut`
// [L, K - 1], that a gate is shut.
struct Openings {
  at::Tensor open;
  at::Tensor shut;

  Openings(const at::Tensor& logits, double temperature) {
    const at::Tensor shifted = logits.to(at::kDouble).add_(temperature * std::log(-(kLow + kStretch) / kLow));
    shut = shifted.neg().sigmoid_();
    open = at::constant_pad_nd(shifted.sigmoid().cumprod(1), {1, 0}, 1.0);
  }

  // The probability of each width.
  at::Tensor widths() const { return open.sub(at::constant_pad_nd(open.slice(1, 1), {0, 1}, 0.0)); }

  // Gradient of the logits from that of `open`: d open_k / d logit_j = open_k shut_j for j <= k.
  at::Tensor backward(const at::Tensor& gradient) const {
    const at::Tensor terms = gradient.mul(open).slice(1, 1);
    return terms.flip({1}).cumsum(1).flip({1}).mul_(shut);
  }
};

// What multiplies the act's `open` in the sum, [L, Ka]; the weight's by symmetry, with the values transposed.
at::Tensor factors(const Openings& other, const at::Tensor& v, CostForm form) {
  if (form == CostForm::kExpected) {
    // The sum is over p_k = open_k - open_(k+1).
    const at::Tensor per_width = v.matmul(other.widths().unsqueeze(2)).squeeze(2);
    return per_width.sub(at::constant_pad_nd(per_width.slice(1, 0, -1), {1, 0}, 0.0));
  }
  const at::Tensor upper = form == CostForm::kSeparate
                               ? v.slice(1, 1).select(2, 0)
                               : v.slice(1, 1).slice(2, 1).matmul(other.open.slice(1, 1).unsqueeze(2)).squeeze(2);
  return at::constant_pad_nd(upper, {1, 0}, 0.0);
}

at::Tensor expected_cost(const at::Tensor& act_logits, const at::Tensor& weight_logits, const at::Tensor& values,
                         int64_t given_form, double temperature) {
  const CostForm form = check_cost_arguments(act_logits, weight_logits, values, given_form, temperature);
  const Openings act(act_logits, temperature);
  const Openings weight(weight_logits, temperature);
  const at::Tensor v = values.to(at::kDouble);
  at::Tensor total = act.open.mul(factors(weight, v, form)).sum();
  if (form == CostForm::kSeparate) {
    total.add_(weight.open.mul(factors(act, v.transpose(1, 2), form)).sum());
  }
  return total.to(at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> expected_cost_backward(const at::Tensor& grad, const at::Tensor& act_logits,
                                                          const at::Tensor& weight_logits, const at::Tensor& values,
                                                          int64_t given_form, double temperature) {
  const CostForm form = check_cost_arguments(act_logits, weight_logits, values, given_form, temperature);
  const Openings act(act_logits, temperature);
  const Openings weight(weight_logits, temperature);
  const at::Tensor v = values.to(at::kDouble);
  const auto gradient = [&](const Openings& own, const Openings& other, const at::Tensor& table) {
    return own.backward(factors(other, table, form)).mul_(grad).to(at::kFloat);
  };
  return {gradient(act, weight, v), gradient(weight, act, v.transpose(1, 2))};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CompositeExplicitAutograd, m) {
  m.impl("sample_gates", sample_gates);
  m.impl("_sample_gates_backward", sample_gates_backward);
  m.impl("expected_cost", expected_cost);
  m.impl("_expected_cost_backward", expected_cost_backward);
}

}  // namespace mixbit::ops
