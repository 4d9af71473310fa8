#pragma once

// Optimizer steps that are smaller near the decision thresholds of a weight's grid ("threshold-aware learning rate";
// the idea is Kim et al., IEEE TNNLS 32(7), 2021, the formulas are ours). Everything in fp32; multiplications and
// additions that torch's own optimizers fuse are fused here, so that a multiplier of 1 gives their bits.

#include <bit>
#include <cmath>
#include <cstdint>

#include <mixbit/common/levels.h>
#include <mixbit/common/macros.h>
#include <mixbit/common/numerics.h>

namespace mixbit {

// How the multiplier g of a step falls towards a threshold. The values are part of the op schemas: do not renumber.
enum class StepShape : int32_t {
  kOff = 0,     // 1
  kStep = 1,    // alpha if d < rho, else 1
  kLinear = 2,  // alpha + (1 - alpha) min(1, d / rho)
  kGauss = 3,   // 1 - (1 - alpha) exp(-(d / rho)^2)
};

// The largest distance from a threshold, in steps of the grid.
constexpr float kFarthest = 0.5f;

struct StepMultiplier {
  StepShape shape;
  float alpha;
  float rho;  // in steps of the grid, 0 < rho <= 1/2
};

MIXBIT_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// exp(y) has to have the same bits everywhere: its power of two is made of bits.
MIXBIT_HD uint32_t bits_of(float v) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(v);
#else
  return std::bit_cast<uint32_t>(v);
#endif
}
MIXBIT_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// Distance of w from the nearest threshold (k + 1/2) step between two levels, in steps, at most 1/2. Beyond the last
// threshold of either side it is the distance from that one. NaN counts as far.
MIXBIT_HD float threshold_distance(float w, float step, QuantRange range) {
  const float v = w / step;
  const float nearest = clamp_code(std::floor(v) + 0.5f, {range.quant_min + 0.5f, range.quant_max - 0.5f});
  const float d = std::fabs(v - nearest);
  return d < kFarthest ? d : kFarthest;
}

// exp(y) for y <= 0, to about one unit in the last place; below y = -87 it stays what it is there. Written out so that
// every instruction set and device has the same bits.
MIXBIT_HD float exp_negative(float y) {
  y = y < -87.0f ? -87.0f : y;
  // Adding 1.5 2^23 rounds to the integer k; its low bits are then those of k.
  const float shifted = fused_multiply_add(y, 0x1.715476p+0f, 0x1.8p+23f);
  const float k = shifted - 0x1.8p+23f;
  const float r = fused_multiply_add(-k, -0x1.05c61p-29f, fused_multiply_add(-k, 0x1.62e43p-1f, y));
  float p = 0x1.6c16c2p-10f;  // 1/720
  p = fused_multiply_add(p, r, 0x1.111112p-7f);
  p = fused_multiply_add(p, r, 0x1.555556p-5f);
  p = fused_multiply_add(p, r, 0x1.555556p-3f);
  p = fused_multiply_add(p, r, 0.5f);
  p = fused_multiply_add(p, r, 1.0f);
  p = fused_multiply_add(p, r, 1.0f);
  return p * float_of((bits_of(shifted) + 127u) << 23);
}

// g(d). Exactly 1 from rho on for `step` and `linear`.
MIXBIT_HD float step_multiplier(float d, StepMultiplier m) {
  switch (m.shape) {
    case StepShape::kStep:
      return d < m.rho ? m.alpha : 1.0f;
    case StepShape::kLinear:
      return d < m.rho ? fused_multiply_add(1.0f - m.alpha, d / m.rho, m.alpha) : 1.0f;
    case StepShape::kGauss: {
      const float x = d / m.rho;
      return fused_multiply_add(-(1.0f - m.alpha), exp_negative(-(x * x)), 1.0f);
    }
    default:
      return 1.0f;
  }
}

// g of a weight with extra bits (levels.h) on the base grid of `scale` and `range`.
MIXBIT_HD float step_multiplier(float w, float scale, QuantRange range, int extra, StepMultiplier m) {
  return m.shape == StepShape::kOff
             ? 1.0f
             : step_multiplier(threshold_distance(w, extra_step(scale, extra), extra_range(range, extra)), m);
}

// A step from `before` to `after`, of which the share g is taken; all of it has the bits of `after`.
MIXBIT_HD float scaled_update(float before, float after, float g) {
  return g == 1.0f ? after : fused_multiply_add(g, after - before, before);
}

// What all gradients go through first: g is 1 unless it is applied to gradients.
//   gradient = g (+-grad) (+ weight_decay w)
MIXBIT_HD float decayed_gradient(float grad, float w, float g, float weight_decay, bool maximize) {
  grad = (maximize ? -grad : grad) * g;
  return weight_decay != 0.0f ? fused_multiply_add(weight_decay, w, grad) : grad;
}

// torch.optim.SGD. `dampening` is held as 1 - dampening; `first`: there is no momentum yet, it becomes the gradient.
struct SgdRule {
  float lr;
  float momentum;
  float undampened;
  float weight_decay;
  bool nesterov;
  bool maximize;
  bool first;
  bool on_grad;  // g multiplies the gradient instead of the update
};

struct SgdState {
  float weight;
  float momentum;
};

// w -= lr g update, the update being that of SGD (momentum, weight decay included).
MIXBIT_HD SgdState sgd_step(float w, float grad, float momentum, float g, const SgdRule& rule) {
  const float gradient = decayed_gradient(grad, w, rule.on_grad ? g : 1.0f, rule.weight_decay, rule.maximize);
  float update = gradient;
  if (rule.momentum != 0.0f) {
    momentum = rule.first ? gradient : fused_multiply_add(rule.undampened, gradient, rule.momentum * momentum);
    update = rule.nesterov ? fused_multiply_add(rule.momentum, momentum, gradient) : momentum;
  }
  return {fused_multiply_add(-(rule.lr * (rule.on_grad ? 1.0f : g)), update, w), momentum};
}

// torch.optim.Adam and AdamW after a number of steps.
struct AdamRule {
  float beta1_left;        // 1 - beta1
  float beta2;             //
  float beta2_left;        // 1 - beta2
  float step_size;         // lr / (1 - beta1^t)
  float correction2_sqrt;  // sqrt(1 - beta2^t)
  float epsilon;           //
  float weight_decay;      // of the gradient; 0 if decoupled
  float weight_kept;       // 1 - lr weight_decay if decoupled, else 1
  bool maximize;           //
  bool on_grad;            // g multiplies the gradient instead of the update
};

// Numbers of one step in double, as torch computes them. t: steps done with this one.
MIXBIT_HD void set_adam_step(AdamRule* rule, double lr, double beta1, double beta2, double weight_decay, double t,
                             bool decoupled) {
  rule->beta1_left = static_cast<float>(1.0 - beta1);
  rule->beta2 = static_cast<float>(beta2);
  rule->beta2_left = static_cast<float>(1.0 - beta2);
  rule->step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
  rule->correction2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)));
  rule->weight_decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
  rule->weight_kept = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
}

struct AdamState {
  float weight;
  float moment1;
  float moment2;
  float largest_moment2;  // amsgrad only
};

// w += g (w_adam - w), w_adam being Adam's own result, decoupled decay included.
MIXBIT_HD AdamState adam_step(float w, float grad, float moment1, float moment2, float largest_moment2, bool amsgrad,
                              float g, const AdamRule& rule) {
  const float gradient = decayed_gradient(grad, w, rule.on_grad ? g : 1.0f, rule.weight_decay, rule.maximize);
  // torch's lerp takes the nearer end.
  moment1 = rule.beta1_left < 0.5f ? fused_multiply_add(rule.beta1_left, gradient - moment1, moment1)
                                   : fused_multiply_add(rule.beta1_left - 1.0f, gradient - moment1, gradient);
  moment2 = fused_multiply_add(rule.beta2_left * gradient, gradient, rule.beta2 * moment2);
  largest_moment2 = largest_moment2 > moment2 ? largest_moment2 : moment2;
  const float root = std::sqrt(amsgrad ? largest_moment2 : moment2);
  const float denominator = root / rule.correction2_sqrt + rule.epsilon;
  const float after = w * rule.weight_kept + (-rule.step_size * moment1) / denominator;
  return {scaled_update(w, after, rule.on_grad ? 1.0f : g), moment1, moment2, largest_moment2};
}

}  // namespace mixbit
