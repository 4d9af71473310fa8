#pragma once

// One body per kernel over the sixteen-lane vector that the including file has defined (simd_*.h). Everything is in an
// anonymous namespace and free of inline templates of the standard library: the linker must not pick one instruction
// set's copy for all.

#include <cstdint>
#include <cstring>

#include <mixbit/kernels/cpu.h>

namespace {

using mixbit::AdamRule;
using mixbit::Gradient;
using mixbit::MixtureForm;
using mixbit::Rounding;
using mixbit::SgdRule;
using mixbit::StepMultiplier;
using mixbit::StepShape;
using mixbit::SwitchScore;
using mixbit::kernels::cpu::FreezeStates;
using mixbit::kernels::cpu::Isa;
using mixbit::kernels::cpu::KernelTable;
using mixbit::kernels::cpu::kLanes;
using mixbit::kernels::cpu::kMaxGrids;
using mixbit::kernels::cpu::LevelFindings;
using mixbit::kernels::cpu::Mixture;
using mixbit::kernels::cpu::Moments;
using mixbit::kernels::cpu::Quantizer;
using mixbit::kernels::cpu::StepRun;
using mixbit::kernels::cpu::StorageType;
using mixbit::kernels::cpu::SwitchStates;

// Storage types: how sixteen elements are read and written.
struct Float32 {
  using Element = float;
  static Vec read(const float* p) { return load(p); }
  static void write(float* p, const Vec& v) { store(p, v); }
  static void write_past_cache(float* p, const Vec& v) { stream(p, v); }
};
struct Float16 {
  using Element = uint16_t;
  static Vec read(const uint16_t* p) { return load_half(p); }
  static void write(uint16_t* p, const Vec& v) { store_half(p, v); }
  static void write_past_cache(uint16_t* p, const Vec& v) { stream_half(p, v); }
};
struct BFloat16 {
  using Element = uint16_t;
  static Vec read(const uint16_t* p) { return load_bfloat16(p); }
  static void write(uint16_t* p, const Vec& v) { store_bfloat16(p, v); }
  static void write_past_cache(uint16_t* p, const Vec& v) { stream_bfloat16(p, v); }
};

// The last n < 16 elements; the other lanes are zero, which adds nothing to any sum here.
template <typename S>
inline Vec read_partial(const typename S::Element* p, int64_t n) {
  typename S::Element buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(buffer[0]));
  return S::read(buffer);
}
template <typename S>
inline void write_partial(typename S::Element* p, const Vec& v, int64_t n) {
  typename S::Element buffer[kLanes];
  S::write(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(buffer[0]));
}

// Adds the lanes in double, as a tree: a fixed order, and short chains, since a row of weights may be short.
inline double sum_lanes(const Vec& v) {
  float lanes[kLanes];
  to_array(v, lanes);
  double sums[kLanes / 2];
  for (int64_t i = 0; i < kLanes / 2; ++i) {
    sums[i] = static_cast<double>(lanes[i]) + static_cast<double>(lanes[i + kLanes / 2]);
  }
  for (int64_t half = kLanes / 4; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

struct VecQuantizer {
  Vec scale, zero_point, low, high;
};
inline VecQuantizer widen(const Quantizer& q) {
  return {broadcast(q.scale), broadcast(q.zero_point), broadcast(q.range.quant_min), broadcast(q.range.quant_max)};
}

struct VecGrad {
  Vec dx, dscale, dzero_point;
};

// The ends of a grid for clipping: as values, and as codes less the zero point.
struct VecClip {
  Quantizer quantizer;
  Vec scale, lower, upper, low, high;
};
inline VecClip widen_clip(const Quantizer& q) {
  const float low = q.range.quant_min - q.zero_point;
  const float high = q.range.quant_max - q.zero_point;
  return {q, broadcast(q.scale), broadcast(low * q.scale), broadcast(high * q.scale), broadcast(low), broadcast(high)};
}

// Kinds of grids whose codes are clamped in fewer steps, and scales without a normal inverse.
enum class Grid { kSymmetric, kUnsigned, kAny, kDivide };

struct NoiseQuantizer {
  Vec scale, inverse, low, high;
};
inline NoiseQuantizer noise_quantizer(const Quantizer& q) {
  return {broadcast(q.scale), broadcast(1.0f / q.scale), broadcast(q.range.quant_min), broadcast(q.range.quant_max)};
}

// A grid of a mixture. inverse: 1 / scale; ratio: its codes between two levels of the grid before (residual form).
struct VecGrid {
  Vec scale, inverse, low, high, ratio;
};

// The base grid of elements with extra bits: its codes from left_out - half to half - 1.
struct ExtraQuantizer {
  Quantizer base;
  Vec scale, half, left_out;
};
inline ExtraQuantizer widen_extra(const Quantizer& q) {
  return {q, broadcast(q.scale), broadcast(q.range.quant_max + 1.0f),
          broadcast(q.range.quant_min + q.range.quant_max + 1.0f)};
}

// How x / scale is computed; the bits are the same. kShift: multiplied once, the coarser grids' steps being that of the
// last one times a power of two.
enum class Quotient { kDivide, kMultiply, kShift };

// The grid of a weight and how steps shrink near its thresholds; low and high: the outermost thresholds in steps.
struct VecMultiplier {
  Quantizer quantizer;
  StepMultiplier multiplier;
  Vec scale, half, left_out, low, high, alpha, alpha_left, rho;
};
inline VecMultiplier widen(const Quantizer& q, const StepMultiplier& m) {
  const float half = q.range.quant_max + 1.0f;
  return {q,
          m,
          broadcast(q.scale),
          broadcast(half),
          broadcast(q.range.quant_min + half),
          broadcast(q.range.quant_min + 0.5f),
          broadcast(q.range.quant_max - 0.5f),
          broadcast(m.alpha),
          broadcast(1.0f - m.alpha),
          broadcast(m.rho)};
}

// What an optimizer's step leaves.
struct VecState {
  Vec weight, momentum, moment2, largest_moment2;
};

#if defined(MIXBIT_SIMD_SCALAR)

// The oracle: each lane calls the formula of common/numerics.h.
template <Rounding kRounding>
inline Vec fake_quantize(const Vec& x, const VecQuantizer& q) {
  return map([&](int i) {
    return mixbit::fake_quantize(x.lane[i], q.scale.lane[0], q.zero_point.lane[0], {q.low.lane[0], q.high.lane[0]},
                                 kRounding);
  });
}
template <Rounding kRounding>
inline VecGrad fake_quantize_grad(const Vec& grad, const Vec& x, const VecQuantizer& q) {
  VecGrad r;
  for (int i = 0; i < 16; ++i) {
    const mixbit::FakeQuantizeGrad g = mixbit::fake_quantize_grad(
        grad.lane[i], x.lane[i], q.scale.lane[0], q.zero_point.lane[0], {q.low.lane[0], q.high.lane[0]}, kRounding);
    r.dx.lane[i] = g.dx;
    r.dscale.lane[i] = g.dscale;
    r.dzero_point.lane[i] = g.dzero_point;
  }
  return r;
}
inline Mask inside_grid(const Vec& x, const VecQuantizer& q) {
  Mask m = 0;
  for (int i = 0; i < 16; ++i) {
    const bool inside =
        mixbit::is_inside(x.lane[i], q.scale.lane[0], q.zero_point.lane[0], {q.low.lane[0], q.high.lane[0]});
    m = static_cast<Mask>(m | (inside ? 1u << i : 0u));
  }
  return m;
}
inline VecGrad clip_grad(const Vec& grad, const Vec& x, const VecClip& c) {
  VecGrad r;
  for (int i = 0; i < 16; ++i) {
    const mixbit::FakeQuantizeGrad g =
        mixbit::clip_grad(grad.lane[i], x.lane[i], c.quantizer.scale, c.quantizer.zero_point, c.quantizer.range);
    r.dx.lane[i] = g.dx;
    r.dscale.lane[i] = g.dscale;
    r.dzero_point.lane[i] = g.dzero_point;
  }
  return r;
}
inline uint16_t unclipped_bits(const Vec& x, const VecClip& c) {
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unclipped =
        mixbit::is_unclipped(x.lane[i], c.quantizer.scale, c.quantizer.zero_point, c.quantizer.range);
    bits |= unclipped ? 1u << i : 0u;
  }
  return static_cast<uint16_t>(bits);
}
template <Grid kGrid>
inline Vec quantization_error(const Vec& x, const Vec&, const NoiseQuantizer& q) {
  return map([&](int i) {
    const mixbit::QuantRange range = {q.low.lane[0], q.high.lane[0]};
    if constexpr (kGrid == Grid::kDivide) {
      return x.lane[i] - mixbit::fake_quantize(x.lane[i], q.scale.lane[0], 0.0f, range, Rounding::kHalfEven);
    } else {
      return mixbit::quantization_error(x.lane[i], q.scale.lane[0], q.inverse.lane[0], range, Rounding::kHalfEven);
    }
  });
}
inline mixbit::QuantRange range_of(const VecGrid& grid) { return {grid.low.lane[0], grid.high.lane[0]}; }
template <Quotient kQuotient>
inline Vec quotient(const Vec& x, const VecGrid&) {
  return x;  // the formulas divide
}
inline Vec level_code(const Vec& x, const Vec&, const VecGrid& grid) {
  return map([&](int i) { return mixbit::level_code(x.lane[i], grid.scale.lane[0], range_of(grid)); });
}
template <Quotient kQuotient>
inline Vec residual_code(const Vec& x, const Vec& code, const Vec& level, const VecGrid& grid) {
  return map([&](int i) {
    return mixbit::residual_code(x.lane[i], code.lane[i], level.lane[i], grid.ratio.lane[0], grid.scale.lane[0],
                                 range_of(grid));
  });
}
inline Mask inside_grid(const Vec& x, const Vec&, const VecGrid& grid) {
  return inside_grid(x, VecQuantizer{grid.scale, broadcast(0.0f), grid.low, grid.high});
}
inline Vec step_gradient(const Vec& x, const Vec&, const Vec& code, Mask, const VecGrid& grid) {
  return map([&](int i) { return mixbit::step_gradient(x.lane[i], code.lane[i], grid.scale.lane[0], range_of(grid)); });
}
inline Vec clamp_lanes(const Vec& x, const Vec&) { return x; }
constexpr bool kMayMultiply = false;
template <Rounding kRounding>
inline Vec extra_level_fake_quantize(const Vec& x, const Extra& extra, const ExtraQuantizer& q) {
  return map([&](int i) {
    return mixbit::extra_level_fake_quantize(x.lane[i], q.base.scale, q.base.range, extra.bits[i], kRounding);
  });
}
template <Rounding kRounding>
inline VecGrad extra_level_fake_quantize_grad(const Vec& grad, const Vec& x, const Extra& extra,
                                              const ExtraQuantizer& q) {
  VecGrad r{};
  for (int i = 0; i < 16; ++i) {
    const mixbit::ExtraLevelGrad g = mixbit::extra_level_fake_quantize_grad(grad.lane[i], x.lane[i], q.base.scale,
                                                                            q.base.range, extra.bits[i], kRounding);
    r.dx.lane[i] = g.dx;
    r.dscale.lane[i] = g.dscale;
  }
  return r;
}

inline Vec divide(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
// extra_bits: of sixteen weights, or null.
inline Vec step_multiplier(const Vec& w, const uint8_t* extra_bits, const VecMultiplier& m) {
  return map([&](int i) {
    return mixbit::step_multiplier(w.lane[i], m.quantizer.scale, m.quantizer.range,
                                   extra_bits == nullptr ? 0 : extra_bits[i], m.multiplier);
  });
}
inline Vec scaled_update(const Vec& before, const Vec& after, const Vec& g) {
  return map([&](int i) { return mixbit::scaled_update(before.lane[i], after.lane[i], g.lane[i]); });
}
inline VecState sgd_step(const Vec& w, const Vec& grad, const Vec& momentum, const Vec& g, const SgdRule& rule) {
  VecState state{};
  for (int i = 0; i < 16; ++i) {
    const mixbit::SgdState s = mixbit::sgd_step(w.lane[i], grad.lane[i], momentum.lane[i], g.lane[i], rule);
    state.weight.lane[i] = s.weight;
    state.momentum.lane[i] = s.momentum;
  }
  return state;
}
inline VecState adam_step(const Vec& w, const Vec& grad, const Vec& moment1, const Vec& moment2,
                          const Vec& largest_moment2, bool amsgrad, const Vec& g, const AdamRule& rule) {
  VecState state{};
  for (int i = 0; i < 16; ++i) {
    const mixbit::AdamState s = mixbit::adam_step(w.lane[i], grad.lane[i], moment1.lane[i], moment2.lane[i],
                                                  largest_moment2.lane[i], amsgrad, g.lane[i], rule);
    state.weight.lane[i] = s.weight;
    state.momentum.lane[i] = s.moment1;
    state.moment2.lane[i] = s.moment2;
    state.largest_moment2.lane[i] = s.largest_moment2;
  }
  return state;
}

#else

template <Rounding kRounding>
inline Vec round_code(const Vec& v) {
  if constexpr (kRounding == Rounding::kHalfEven) {
    return round_half_even(v);
  } else {
    return floor(add(v, broadcast(0.5f)));
  }
}

// The codes of x; NaN comes through because max and min return their second operand for it.
template <Rounding kRounding>
inline Vec quantize(const Vec& x_over_scale, const VecQuantizer& q) {
  const Vec code = add(round_code<kRounding>(x_over_scale), q.zero_point);
  return min(q.high, max(q.low, code));
}

template <Rounding kRounding>
inline Vec fake_quantize(const Vec& x, const VecQuantizer& q) {
  return mul(sub(quantize<kRounding>(div(x, q.scale), q), q.zero_point), q.scale);
}

template <Rounding kRounding>
inline VecGrad fake_quantize_grad(const Vec& grad, const Vec& x, const VecQuantizer& q) {
  const Vec zero = broadcast(0.0f);
  const Vec x_over_scale = div(x, q.scale);
  const Vec v = add(x_over_scale, q.zero_point);
  const Vec code = quantize<kRounding>(x_over_scale, q);
  const Mask inside = in_range(v, q.low, q.high);
  return {select(inside, grad, zero), mul(grad, sub(code, select(inside, v, q.zero_point))),
          select(inside, zero, negate(mul(grad, q.scale)))};
}

inline Mask inside_grid(const Vec& x, const VecQuantizer& q) {
  return in_range(add(div(x, q.scale), q.zero_point), q.low, q.high);
}

inline VecGrad clip_grad(const Vec& grad, const Vec& x, const VecClip& c) {
  const Vec zero = broadcast(0.0f);
  const Vec clamped = min(c.upper, max(c.lower, x));
  const Mask inside = equal(clamped, x);  // with the upper end
  const Mask above = equal(clamped, c.upper);
  // What is neither lies below, where the difference is zero, or is NaN, as the difference is.
  const Vec below = mul(grad, add(c.low, sub(clamped, c.lower)));
  return {select(above, zero, select(inside, grad, zero)),
          select(above, mul(grad, c.high), select(inside, zero, below)),
          select(above, negate(mul(grad, c.scale)), select(inside, zero, negate(mul(grad, c.scale))))};
}
inline uint16_t unclipped_bits(const Vec& x, const VecClip& c) {
  return static_cast<uint16_t>(to_bits(in_range(x, c.lower, c.upper)) & ~to_bits(equal(x, c.upper)));
}

// `positive` is max(x, 0): on an unsigned grid it is clamped below once for all candidates.
template <Grid kGrid>
inline Vec quantization_error(const Vec& x, const Vec& positive, const NoiseQuantizer& q) {
  Vec code;
  if constexpr (kGrid == Grid::kSymmetric) {
    code = clamp_magnitude(round_half_even(mul(x, q.inverse)), q.high);
  } else if constexpr (kGrid == Grid::kUnsigned) {
    code = min(q.high, round_half_even(mul(positive, q.inverse)));
  } else if constexpr (kGrid == Grid::kAny) {
    code = min(q.high, max(q.low, round_half_even(mul(x, q.inverse))));
  } else {
    code = min(q.high, max(q.low, round_half_even(div(x, q.scale))));
  }
  return sub(x, mul(code, q.scale));
}

// A division by a number known before costs one multiplication and two fused ones: with the rounded inverse and the
// exact remainder, the corrected quotient is the rounded one (Markstein 1990; Brisebarre, Muller, Raina, IEEE Trans.
// Computers 53(8), 2004). That holds without overflow and underflow, see multiplies().
template <Quotient kQuotient>
inline Vec quotient(const Vec& x, const VecGrid& grid) {
  static_assert(kQuotient != Quotient::kShift, "only for_each_level knows the last grid");
  if constexpr (kQuotient == Quotient::kDivide) {
    return div(x, grid.scale);
  } else {
    const Vec near = mul(x, grid.inverse);
    return fma(fnma(near, grid.scale, x), grid.inverse, near);
  }
}
// v is quotient(x), which the compiler would compute again for each use.
inline Vec clamp_to(const Vec& v, const VecGrid& grid) { return min(grid.high, max(grid.low, v)); }
inline Vec level_code(const Vec&, const Vec& v, const VecGrid& grid) { return round_half_even(clamp_to(v, grid)); }
template <Quotient kQuotient>
inline Vec residual_code(const Vec& x, const Vec& code, const Vec& level, const VecGrid& grid) {
  const Vec rest = round_half_even(quotient<kQuotient>(sub(x, level), grid));
  return clamp_to(add(mul(code, grid.ratio), rest), grid);
}
// The clamped v is at hand: one comparison.
inline Mask inside_grid(const Vec&, const Vec& v, const VecGrid& grid) { return equal(clamp_to(v, grid), v); }
inline Vec step_gradient(const Vec&, const Vec& v, const Vec& code, Mask inside, const VecGrid&) {
  return sub_where(inside, code, v);
}
// NaN comes through.
inline Vec clamp_lanes(const Vec& x, const Vec& bound) { return min(bound, max(negate(bound), x)); }
constexpr bool kMayMultiply = true;

// Each lane's own grid: a product with 2^-e is the quotient by 2^e, also where that is next to underflow.
inline VecQuantizer extra_grid(const Extra& extra, const ExtraQuantizer& q) {
  const Vec half = mul(q.half, extra.parts);
  return {mul(q.scale, extra.fraction), broadcast(0.0f), add(negate(half), q.left_out), sub(half, broadcast(1.0f))};
}
template <Rounding kRounding>
inline Vec extra_level_fake_quantize(const Vec& x, const Extra& extra, const ExtraQuantizer& q) {
  return fake_quantize<kRounding>(x, extra_grid(extra, q));
}
template <Rounding kRounding>
inline VecGrad extra_level_fake_quantize_grad(const Vec& grad, const Vec& x, const Extra& extra,
                                              const ExtraQuantizer& q) {
  const VecGrad g = fake_quantize_grad<kRounding>(grad, x, extra_grid(extra, q));
  return {g.dx, mul(g.dscale, extra.fraction), g.dzero_point};
}

inline Vec divide(const Vec& a, const Vec& b) { return div(a, b); }

// exp_negative of common/steps.h.
inline Vec exp_negative(const Vec& given) {
  const Vec y = max(broadcast(-87.0f), given);
  const Vec shifted = fma(y, broadcast(0x1.715476p+0f), broadcast(0x1.8p+23f));
  const Vec k = sub(shifted, broadcast(0x1.8p+23f));
  const Vec r = fnma(k, broadcast(-0x1.05c61p-29f), fnma(k, broadcast(0x1.62e43p-1f), y));
  Vec p = broadcast(0x1.6c16c2p-10f);
  p = fma(p, r, broadcast(0x1.111112p-7f));
  p = fma(p, r, broadcast(0x1.555556p-5f));
  p = fma(p, r, broadcast(0x1.555556p-3f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, exp2_of_low_bits(shifted));
}

// extra_bits: of sixteen weights, or null.
inline Vec step_multiplier(const Vec& w, const uint8_t* extra_bits, const VecMultiplier& m) {
  const Vec one = broadcast(1.0f);
  if (m.multiplier.shape == StepShape::kOff) return one;
  Vec step = m.scale;
  Vec low = m.low;
  Vec high = m.high;
  if (extra_bits != nullptr) {
    const Vec levels = load_extra(extra_bits).parts;
    const Vec half = mul(m.half, levels);
    step = div(step, levels);  // exact, as is the multiplication by the inverse
    low = add(sub(m.left_out, half), broadcast(0.5f));
    high = sub(sub(half, one), broadcast(0.5f));
  }
  const Vec v = div(w, step);
  const Vec offset = sub(v, min(high, max(low, add(floor(v), broadcast(0.5f)))));
  // NaN counts as far: min returns its second operand.
  const Vec farthest = broadcast(mixbit::kFarthest);
  const Vec d = min(max(negate(offset), offset), farthest);
  switch (m.multiplier.shape) {
    case StepShape::kStep:
      return select(in_range(d, m.rho, farthest), one, m.alpha);
    case StepShape::kLinear:
      return select(in_range(d, m.rho, farthest), one, fma(m.alpha_left, div(d, m.rho), m.alpha));
    default: {
      const Vec x = div(d, m.rho);
      return fnma(m.alpha_left, exp_negative(negate(mul(x, x))), one);
    }
  }
}

inline Vec scaled_update(const Vec& before, const Vec& after, const Vec& g) {
  return select(equal(g, broadcast(1.0f)), after, fma(g, sub(after, before), before));
}

inline Vec decayed_gradient(const Vec& given, const Vec& w, const Vec* g, float weight_decay, bool maximize) {
  Vec grad = maximize ? negate(given) : given;
  if (g != nullptr) grad = mul(grad, *g);
  return weight_decay != 0.0f ? fma(broadcast(weight_decay), w, grad) : grad;
}

inline VecState sgd_step(const Vec& w, const Vec& grad, const Vec& given, const Vec& g, const SgdRule& rule) {
  const Vec gradient = decayed_gradient(grad, w, rule.on_grad ? &g : nullptr, rule.weight_decay, rule.maximize);
  const Vec lr = broadcast(rule.lr);
  Vec momentum = given;
  Vec update = gradient;
  if (rule.momentum != 0.0f) {
    const Vec factor = broadcast(rule.momentum);
    momentum = rule.first ? gradient : fma(broadcast(rule.undampened), gradient, mul(factor, momentum));
    update = rule.nesterov ? fma(factor, momentum, gradient) : momentum;
  }
  return {fnma(rule.on_grad ? lr : mul(lr, g), update, w), momentum, momentum, momentum};
}

inline VecState adam_step(const Vec& w, const Vec& grad, const Vec& given1, const Vec& given2,
                          const Vec& given_largest2, bool amsgrad, const Vec& g, const AdamRule& rule) {
  const Vec gradient = decayed_gradient(grad, w, rule.on_grad ? &g : nullptr, rule.weight_decay, rule.maximize);
  const Vec change = sub(gradient, given1);
  const Vec moment1 = rule.beta1_left < 0.5f ? fma(broadcast(rule.beta1_left), change, given1)
                                             : fma(broadcast(rule.beta1_left - 1.0f), change, gradient);
  const Vec moment2 = fma(mul(broadcast(rule.beta2_left), gradient), gradient, mul(broadcast(rule.beta2), given2));
  const Vec largest2 = max(given_largest2, moment2);
  const Vec root = square_root(amsgrad ? largest2 : moment2);
  const Vec denominator = add(div(root, broadcast(rule.correction2_sqrt)), broadcast(rule.epsilon));
  const Vec after =
      add(mul(w, broadcast(rule.weight_kept)), div(mul(broadcast(-rule.step_size), moment1), denominator));
  return {rule.on_grad ? after : scaled_update(w, after, g), moment1, moment2, largest2};
}

#endif

// What gradients fake_quantize has: of each element, and where that of x passes (one bit a lane).
template <Rounding kRounding>
struct LearnedStep {
  explicit LearnedStep(const Quantizer& quantizer) : q(widen(quantizer)) {}
  VecGrad gradients(const Vec& grad, const Vec& x) const { return fake_quantize_grad<kRounding>(grad, x, q); }
  uint16_t passing(const Vec& x) const { return to_bits(inside_grid(x, q)); }
  VecQuantizer q;
};
struct Clipping {
  explicit Clipping(const Quantizer& quantizer) : c(widen_clip(quantizer)) {}
  VecGrad gradients(const Vec& grad, const Vec& x) const { return clip_grad(grad, x, c); }
  uint16_t passing(const Vec& x) const { return unclipped_bits(x, c); }
  VecClip c;
};

// Stores that bypass the cache want whole vectors: 64 bytes of fp32, 32 of the 16-bit types.
template <typename S>
inline bool can_stream(const typename S::Element* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(typename S::Element) * kLanes) == 0;
}

template <typename S, Rounding kRounding>
void fake_quantize_body(const void* x_data, void* y_data, int64_t n, const Quantizer& quantizer, bool stream) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* y = static_cast<typename S::Element*>(y_data);
  const VecQuantizer q = widen(quantizer);
  int64_t i = 0;
  if (stream && can_stream<S>(y)) {
    for (; i + kLanes <= n; i += kLanes) {
      S::write_past_cache(y + i, fake_quantize<kRounding>(S::read(x + i), q));
    }
    stream_fence();
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      S::write(y + i, fake_quantize<kRounding>(S::read(x + i), q));
    }
  }
  if (i < n) {
    write_partial<S>(y + i, fake_quantize<kRounding>(read_partial<S>(x + i, n - i), q), n - i);
  }
}

// What a backward is asked for, known at compile time: nothing is computed in vain.
enum class Sums { kNone, kScale, kBoth };

template <typename S, typename Rule, Sums kSums, bool kStream>
void fake_quantize_backward_loop(const typename S::Element* grad, const typename S::Element* x, typename S::Element* dx,
                                 int64_t n, const Quantizer& quantizer, double* dscale, double* dzero_point) {
  const Rule rule(quantizer);
  Vec scale_sum = broadcast(0.0f);
  Vec zero_point_sum = scale_sum;
  auto step = [&](const Vec& g, const Vec& value) {
    const VecGrad d = rule.gradients(g, value);
    if constexpr (kSums != Sums::kNone) scale_sum = add(scale_sum, d.dscale);
    if constexpr (kSums == Sums::kBoth) zero_point_sum = add(zero_point_sum, d.dzero_point);
    return d.dx;
  };
  int64_t i = 0;
  if (dx == nullptr) {
    for (; i + kLanes <= n; i += kLanes) step(S::read(grad + i), S::read(x + i));
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      const Vec d = step(S::read(grad + i), S::read(x + i));
      if constexpr (kStream) {
        S::write_past_cache(dx + i, d);
      } else {
        S::write(dx + i, d);
      }
    }
  }
  if (i < n) {
    const Vec d = step(read_partial<S>(grad + i, n - i), read_partial<S>(x + i, n - i));
    if (dx != nullptr) write_partial<S>(dx + i, d, n - i);
  }
  if constexpr (kStream) stream_fence();
  if constexpr (kSums != Sums::kNone) *dscale = sum_lanes(scale_sum);
  if constexpr (kSums == Sums::kBoth) *dzero_point = sum_lanes(zero_point_sum);
}

template <typename S, typename Rule, Sums kSums>
void fake_quantize_backward_body(const void* grad_data, const void* x_data, void* dx_data, int64_t n,
                                 const Quantizer& quantizer, double* dscale, double* dzero_point, bool stream) {
  const auto* grad = static_cast<const typename S::Element*>(grad_data);
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* dx = static_cast<typename S::Element*>(dx_data);
  if (stream && dx != nullptr && can_stream<S>(dx)) {
    fake_quantize_backward_loop<S, Rule, kSums, true>(grad, x, dx, n, quantizer, dscale, dzero_point);
  } else {
    fake_quantize_backward_loop<S, Rule, kSums, false>(grad, x, dx, n, quantizer, dscale, dzero_point);
  }
}

template <typename S, Rounding kRounding, typename Rule>
void fake_quantize_mask_body(const void* x_data, void* y_data, uint8_t* mask, int64_t n, const Quantizer& quantizer) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* y = static_cast<typename S::Element*>(y_data);
  const VecQuantizer q = widen(quantizer);
  const Rule rule(quantizer);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = S::read(x + i);
    const uint16_t bits = rule.passing(v);
    std::memcpy(mask + i / 8, &bits, 2);
    S::write(y + i, fake_quantize<kRounding>(v, q));
  }
  if (i < n) {
    const Vec v = read_partial<S>(x + i, n - i);
    const auto bits = static_cast<uint16_t>(rule.passing(v) & ((1u << (n - i)) - 1u));
    std::memcpy(mask + i / 8, &bits, static_cast<size_t>((n - i + 7) / 8));
    write_partial<S>(y + i, fake_quantize<kRounding>(v, q), n - i);
  }
}

template <typename S>
void apply_mask_body(const void* grad_data, const uint8_t* mask, void* dx_data, int64_t n) {
  const auto* grad = static_cast<const typename S::Element*>(grad_data);
  auto* dx = static_cast<typename S::Element*>(dx_data);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint16_t bits;
    std::memcpy(&bits, mask + i / 8, 2);
    S::write(dx + i, keep(from_bits(bits), S::read(grad + i)));
  }
  if (i < n) {
    uint16_t bits = 0;
    std::memcpy(&bits, mask + i / 8, static_cast<size_t>((n - i + 7) / 8));
    write_partial<S>(dx + i, keep(from_bits(bits), read_partial<S>(grad + i, n - i)), n - i);
  }
}

// Sums of squared errors of exactly kCount candidates, so that they live in registers.
template <typename S, Grid kGrid, int64_t kCount>
void noise_of(const typename S::Element* x, int64_t n, const Quantizer* quantizers, double* signal, double* noise) {
  NoiseQuantizer q[kCount > 0 ? kCount : 1];
  Vec sums[kCount > 0 ? kCount : 1];
  for (int64_t k = 0; k < kCount; ++k) {
    q[k] = noise_quantizer(quantizers[k]);
    sums[k] = broadcast(0.0f);
  }
  Vec signal_sum = broadcast(0.0f);
  auto step = [&](const Vec& value) {
    signal_sum = fma(value, value, signal_sum);
    const Vec positive = max(broadcast(0.0f), value);
    for (int64_t k = 0; k < kCount; ++k) {
      const Vec error = quantization_error<kGrid>(value, positive, q[k]);
      sums[k] = fma(error, error, sums[k]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(S::read(x + i));
  // Zeros in the other lanes: a zero is a level of every grid with zero_point 0, its error is zero.
  if (i < n) step(read_partial<S>(x + i, n - i));
  for (int64_t k = 0; k < kCount; ++k) noise[k] = sum_lanes(sums[k]);
  *signal = sum_lanes(signal_sum);
}

template <typename S, Grid kGrid>
void quantization_noise_loop(const typename S::Element* x, int64_t n, const Quantizer* q, int64_t count, double* signal,
                             double* noise) {
  // Groups of eight and one rest: a block of x stays in the cache meanwhile.
  for (; count > 8; count -= 8, q += 8, noise += 8) noise_of<S, kGrid, 8>(x, n, q, signal, noise);
  switch (count) {
    case 0:
      return noise_of<S, kGrid, 0>(x, n, q, signal, noise);
    case 1:
      return noise_of<S, kGrid, 1>(x, n, q, signal, noise);
    case 2:
      return noise_of<S, kGrid, 2>(x, n, q, signal, noise);
    case 3:
      return noise_of<S, kGrid, 3>(x, n, q, signal, noise);
    case 4:
      return noise_of<S, kGrid, 4>(x, n, q, signal, noise);
    case 5:
      return noise_of<S, kGrid, 5>(x, n, q, signal, noise);
    case 6:
      return noise_of<S, kGrid, 6>(x, n, q, signal, noise);
    case 7:
      return noise_of<S, kGrid, 7>(x, n, q, signal, noise);
    default:
      return noise_of<S, kGrid, 8>(x, n, q, signal, noise);
  }
}

template <typename S>
void quantization_noise_body(const void* x_data, int64_t n, const Quantizer* quantizers, int64_t count, double* signal,
                             double* noise) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  bool normal = true;
  bool symmetric = true;
  bool is_unsigned = true;
  for (int64_t k = 0; k < count; ++k) {
    const Quantizer& q = quantizers[k];
    normal = normal && mixbit::has_normal_inverse(q.scale);
    symmetric = symmetric && q.range.quant_min == -q.range.quant_max;
    is_unsigned = is_unsigned && q.range.quant_min == 0.0f;
  }
  if (!normal) {
    quantization_noise_loop<S, Grid::kDivide>(x, n, quantizers, count, signal, noise);
  } else if (symmetric) {
    quantization_noise_loop<S, Grid::kSymmetric>(x, n, quantizers, count, signal, noise);
  } else if (is_unsigned) {
    quantization_noise_loop<S, Grid::kUnsigned>(x, n, quantizers, count, signal, noise);
  } else {
    quantization_noise_loop<S, Grid::kAny>(x, n, quantizers, count, signal, noise);
  }
}

template <typename S>
void noise_power_body(const void* x_data, const void* reference_data, int64_t n, double* signal, double* noise) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  const auto* reference = static_cast<const typename S::Element*>(reference_data);
  Vec signal_sum = broadcast(0.0f);
  Vec noise_sum = broadcast(0.0f);
  auto step = [&](const Vec& a, const Vec& b) {
    const Vec error = sub(a, b);
    signal_sum = add(signal_sum, mul(b, b));
    noise_sum = add(noise_sum, mul(error, error));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(S::read(x + i), S::read(reference + i));
  if (i < n) step(read_partial<S>(x + i, n - i), read_partial<S>(reference + i, n - i));
  *signal = sum_lanes(signal_sum);
  *noise = sum_lanes(noise_sum);
}

template <typename S>
void observe_body(const void* x_data, int64_t n, Moments* moments) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  typename S::Element head[kLanes];
  // The first element in every lane is a neutral start for min and max.
  for (int64_t i = 0; i < kLanes; ++i) head[i] = x[0];
  Vec low = S::read(head);
  Vec high = low;
  Vec sum = broadcast(0.0f);
  Vec squares = sum;
  bool nan = false;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = S::read(x + i);
    nan = nan || any_nan(v);
    low = min(v, low);
    high = max(v, high);
    sum = add(sum, v);
    squares = add(squares, mul(v, v));
  }
  if (i < n) {
    const Vec v = read_partial<S>(x + i, n - i);
    sum = add(sum, v);
    squares = add(squares, mul(v, v));
    std::memcpy(head, x + i, static_cast<size_t>(n - i) * sizeof(head[0]));
    const Vec padded = S::read(head);
    nan = nan || any_nan(padded);
    low = min(padded, low);
    high = max(padded, high);
  }
  float lows[kLanes];
  float highs[kLanes];
  to_array(low, lows);
  to_array(high, highs);
  float least = lows[0];
  float most = highs[0];
  for (int64_t k = 1; k < kLanes; ++k) {
    least = lows[k] < least ? lows[k] : least;
    most = highs[k] > most ? highs[k] : most;
  }
  const double quiet_nan = __builtin_nan("");
  moments->min = nan ? quiet_nan : static_cast<double>(least);
  moments->max = nan ? quiet_nan : static_cast<double>(most);
  moments->sum = sum_lanes(sum);
  moments->sum_squares = sum_lanes(squares);
}

// Loops are written once for several uses; without this their bodies become functions that keep their sums in memory.
#define MIXBIT_INLINE __attribute__((always_inline))

// kCount grids known at compile time live in registers; 0 stands for any number.
template <int64_t kCount>
constexpr int64_t kGridSlots = kCount > 0 ? kCount : kMaxGrids;

// The grids of a mixture as vectors.
template <int64_t kCount, bool kResidual, Quotient kQuotient>
struct VecMixture {
  int64_t count;
  VecGrid grids[kGridSlots<kCount>];
  Vec weights[kGridSlots<kCount>];
  Vec bound;  // beyond the ends of every grid

  explicit VecMixture(const Mixture& m) : count(kCount > 0 ? kCount : m.count) {
    float farthest = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const Quantizer& q = m.quantizers[k];
      const float ratio = k == 0 ? 0.0f : mixbit::grid_ratio(q.range, m.quantizers[k - 1].range);
      grids[k] = {broadcast(q.scale), broadcast(1.0f / q.scale), broadcast(q.range.quant_min),
                  broadcast(q.range.quant_max), broadcast(ratio)};
      weights[k] = broadcast(m.weights[k]);
      const float end = (q.range.quant_max - q.range.quant_min) * q.scale;
      farthest = end > farthest ? end : farthest;
    }
    bound = broadcast(4.0f * farthest);
    if constexpr (kQuotient == Quotient::kShift) {
      const float last = m.quantizers[count - 1].scale;
      for (int64_t k = 0; k + 1 < count; ++k) grids[k].inverse = broadcast(last / m.quantizers[k].scale);
    }
  }

  // x as quotient() may take it: what lies far outside has the codes and gradients of what lies outside, and -0, whose
  // sign only a division keeps, becomes 0.
  Vec bounded(const Vec& x) const {
    const Vec plain = add(x, broadcast(0.0f));
    if constexpr (kQuotient == Quotient::kDivide) {
      return plain;
    } else {
      return clamp_lanes(plain, bound);
    }
  }

  // Calls f(k, level, code, v) for the levels of x on each grid, v as inside_grid and step_gradient want it.
  template <typename F>
  MIXBIT_INLINE void for_each_level(const Vec& x, const F& f) const {
    constexpr bool kIsShift = kQuotient == Quotient::kShift;
    constexpr Quotient kOne = kIsShift ? Quotient::kMultiply : kQuotient;
    const int64_t last = (kCount > 0 ? kCount : count) - 1;
    const Vec widest = quotient<kOne>(x, grids[last]);
    Vec code = broadcast(0.0f);
    Vec level = code;
    for (int64_t k = 0; k <= last; ++k) {
      const Vec v = k == last ? widest : kIsShift ? mul(widest, grids[k].inverse) : quotient<kOne>(x, grids[k]);
      code = kResidual && k > 0 ? residual_code<kOne>(x, code, level, grids[k]) : level_code(x, v, grids[k]);
      level = mul(code, grids[k].scale);
      f(k, level, code, v);
    }
  }
};

// Whether quotient() may multiply: 4 quant_max scale / scale' neither overflows nor do remainders of an x that is not
// itself next to underflow, where every code is 0.
inline bool multiplies(const Mixture& m) {
  bool fits = kMayMultiply;
  for (int64_t k = 0; k < m.count; ++k) {
    fits = fits && m.quantizers[k].scale >= 0x1p-40f && m.quantizers[k].scale <= 0x1p+40f;
  }
  return fits;
}

// Whether each scale is the last one times a power of two, as those of two's complement over one range: then x / scale
// is the last quotient times its inverse, exactly (or both are so small that the code is 0).
inline bool shifts(const Mixture& m) {
  const float last = m.quantizers[m.count - 1].scale;
  bool powers = true;
  for (int64_t k = 0; k < m.count; ++k) {
    const float ratio = m.quantizers[k].scale / last;
    uint32_t bits;
    std::memcpy(&bits, &ratio, 4);
    powers = powers && ratio >= 1.0f && (bits & 0x7fffffu) == 0 && ratio * last == m.quantizers[k].scale;
  }
  return powers;
}

template <typename S, int64_t kCount, bool kResidual, Quotient kQuotient>
void mixture_loop(const void* x_data, void* y_data, int64_t n, const Mixture& m, bool stream) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* y = static_cast<typename S::Element*>(y_data);
  const VecMixture<kCount, kResidual, kQuotient> mixture(m);
  auto mix = [&](const Vec& value) MIXBIT_INLINE {
    Vec sum = broadcast(0.0f);
    mixture.for_each_level(mixture.bounded(value),
                           [&](int64_t k, const Vec& level, const Vec&, const Vec&) MIXBIT_INLINE {
                             const Vec part = mul(mixture.weights[k], level);
                             sum = k == 0 ? part : add(sum, part);
                           });
    return sum;
  };
  const bool past_cache = stream && can_stream<S>(y);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = mix(S::read(x + i));
    past_cache ? S::write_past_cache(y + i, v) : S::write(y + i, v);
  }
  if (past_cache) stream_fence();
  if (i < n) write_partial<S>(y + i, mix(read_partial<S>(x + i, n - i)), n - i);
}

// Calls f with the number of grids and the kind of quotient as types: few grids by multiplication are worth loops of
// their own.
template <int64_t kGrids, Quotient kKind>
struct MixtureKind {
  static constexpr int64_t kCount = kGrids;
  static constexpr Quotient kQuotient = kKind;
};
template <bool kMayShift, typename F>
void with_mixture_kind(const Mixture& m, const F& f) {
  if constexpr (kMayMultiply) {
    if (multiplies(m)) {
      switch (m.count) {
        case 1:
          return f(MixtureKind<1, Quotient::kMultiply>());
        case 2:
          return f(MixtureKind<2, Quotient::kMultiply>());
        case 3:
          if constexpr (kMayShift) {
            if (shifts(m)) return f(MixtureKind<3, Quotient::kShift>());
          }
          return f(MixtureKind<3, Quotient::kMultiply>());
        default:
          return f(MixtureKind<0, Quotient::kMultiply>());
      }
    }
  }
  f(MixtureKind<0, Quotient::kDivide>());
}

template <typename S>
void mixture_body(const void* x, void* y, int64_t n, const Mixture& m, bool stream) {
  // A weight of 0 adds nothing (levels are finite, and NaN in x comes through any grid): open and shut gates leave one
  // grid. The residual form needs those below the last one.
  Quantizer quantizers[kMaxGrids];
  float weights[kMaxGrids];
  int64_t count = 0;
  const bool residual = m.form == MixtureForm::kGatedResidual;
  int64_t kept = 0;
  for (int64_t k = 0; k < m.count; ++k) {
    if (residual || m.weights[k] != 0.0f) {
      quantizers[count] = m.quantizers[k];
      weights[count++] = m.weights[k];
      kept = m.weights[k] != 0.0f ? count : kept;
    }
  }
  if (count == 0) {
    quantizers[0] = m.quantizers[0];
    weights[0] = 0.0f;
  }
  const Mixture used{quantizers, weights, kept > 0 ? kept : 1, m.form};
  const auto run = [&]<bool kResidual>() {
    with_mixture_kind<!kResidual>(used, [&](auto kind) {
      using Kind = decltype(kind);
      mixture_loop<S, Kind::kCount, kResidual, Kind::kQuotient>(x, y, n, used, stream);
    });
  };
  residual ? run.template operator()<true>() : run.template operator()<false>();
}

enum class MixtureSums { kNone, kLevels, kSteps };

template <typename S, int64_t kCount, Quotient kQuotient, MixtureForm kForm, MixtureSums kSums>
void mixture_backward_loop(const void* grad_data, const void* x_data, void* dx_data, int64_t n, const Mixture& m,
                           double* levels, double* steps, bool stream) {
  const auto* grad = static_cast<const typename S::Element*>(grad_data);
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* dx = static_cast<typename S::Element*>(dx_data);
  constexpr bool kIsMixture = kForm == MixtureForm::kMixture;
  const VecMixture<kCount, kForm == MixtureForm::kGatedResidual, kQuotient> mixture(m);
  const int64_t last = (kCount > 0 ? kCount : m.count) - 1;
  Vec level_sums[kGridSlots<kCount>];
  Vec step_sums[kGridSlots<kCount>];
  for (int64_t k = 0; k <= last; ++k) level_sums[k] = step_sums[k] = broadcast(0.0f);
  auto step = [&](const Vec& g, const Vec& given) MIXBIT_INLINE {
    const Vec value = mixture.bounded(given);
    Vec result = broadcast(0.0f);
    Vec before = result;
    mixture.for_each_level(value, [&](int64_t k, const Vec& level, const Vec& code, const Vec& v) MIXBIT_INLINE {
      if constexpr (kSums != MixtureSums::kNone) {
        if (kIsMixture) {
          level_sums[k] = fma(g, level, level_sums[k]);
        } else if (k > 0) {
          level_sums[k - 1] = fma(g, sub(level, before), level_sums[k - 1]);
        }
      }
      before = level;
      if (kIsMixture || k == last) {
        const Mask inside = inside_grid(value, v, mixture.grids[k]);
        if constexpr (kSums == MixtureSums::kSteps) {
          Vec& sum = step_sums[kIsMixture ? k : 0];
          sum = fma(g, step_gradient(value, v, code, inside, mixture.grids[k]), sum);
        }
        result = kIsMixture ? add(result, keep(inside, mixture.weights[k])) : keep(inside, g);
      }
    });
    return kIsMixture ? mul(result, g) : result;
  };
  const bool past_cache = stream && dx != nullptr && can_stream<S>(dx);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec d = step(S::read(grad + i), S::read(x + i));
    if (past_cache) {
      S::write_past_cache(dx + i, d);
    } else if (dx != nullptr) {
      S::write(dx + i, d);
    }
  }
  if (past_cache) stream_fence();
  if (i < n) {
    const Vec d = step(read_partial<S>(grad + i, n - i), read_partial<S>(x + i, n - i));
    if (dx != nullptr) write_partial<S>(dx + i, d, n - i);
  }
  if constexpr (kSums != MixtureSums::kNone) {
    for (int64_t k = 0; k < (kIsMixture ? last + 1 : last); ++k) levels[k] = sum_lanes(level_sums[k]);
  }
  if constexpr (kSums == MixtureSums::kSteps) {
    for (int64_t k = 0; k < (kIsMixture ? last + 1 : 1); ++k) steps[k] = sum_lanes(step_sums[k]);
  }
}

template <typename S, MixtureForm kForm, MixtureSums kSums>
void mixture_backward_body(const void* grad, const void* x, void* dx, int64_t n, const Mixture& m, double* levels,
                           double* steps, bool stream) {
  with_mixture_kind<kForm != MixtureForm::kGatedResidual>(m, [&](auto kind) {
    using Kind = decltype(kind);
    mixture_backward_loop<S, Kind::kCount, Kind::kQuotient, kForm, kSums>(grad, x, dx, n, m, levels, steps, stream);
  });
}

// --- Levels that weights switch between. Codes and marks are small integers, held as floats while they are computed.

template <typename T>
inline T* at(T* p, int64_t i) {
  return p == nullptr ? p : p + i;
}
inline SwitchStates at(const SwitchStates& s, int64_t i) {
  return {at(s.codes, i), at(s.marks, i), at(s.counts, i), at(s.runs, i), at(s.frequencies, i)};
}
inline FreezeStates at(const FreezeStates& s, int64_t i) {
  return {at(s.codes, i), at(s.marks, i), at(s.frequencies, i), at(s.averages, i)};
}

// The states of the last n < 16 weights with lanes to spare, which are 0 and stay so: a weight of 0 has the code 0.
template <typename T>
inline void copy_lanes(T* to, const T* from, int64_t n) {
  if (to != nullptr && from != nullptr) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}
inline void copy_lanes(const SwitchStates& to, const SwitchStates& from, int64_t n) {
  copy_lanes(to.codes, from.codes, n);
  copy_lanes(to.marks, from.marks, n);
  copy_lanes(to.counts, from.counts, n);
  copy_lanes(to.runs, from.runs, n);
  copy_lanes(to.frequencies, from.frequencies, n);
}
inline void copy_lanes(const FreezeStates& to, const FreezeStates& from, int64_t n) {
  copy_lanes(to.codes, from.codes, n);
  copy_lanes(to.marks, from.marks, n);
  copy_lanes(to.frequencies, from.frequencies, n);
  copy_lanes(to.averages, from.averages, n);
}
struct LaneStates {
  int8_t codes[kLanes] = {}, marks[kLanes] = {};
  int16_t counts[kLanes] = {}, runs[kLanes] = {};
  float frequencies[kLanes] = {}, averages[kLanes] = {};
  uint8_t extra_bits[kLanes] = {};
  SwitchStates switches() { return {codes, marks, counts, runs, frequencies}; }
  FreezeStates freezing() { return {codes, marks, frequencies, averages}; }
};

inline int32_t most_extra_bits(const uint8_t* extra_bits, int64_t n) {
  uint8_t most = 0;
  for (int64_t i = 0; extra_bits != nullptr && i < n; ++i) most = extra_bits[i] > most ? extra_bits[i] : most;
  return most;
}

#if defined(MIXBIT_SIMD_SCALAR)

inline int lane_extra_bits(const uint8_t* extra_bits, int i) {
  if (extra_bits == nullptr) return 0;
  return extra_bits[i] < mixbit::kMaxExtraBits ? extra_bits[i] : mixbit::kMaxExtraBits;
}

// Sixteen weights: how many switched.
template <Rounding kRounding, SwitchScore kScore, bool kExtra>
inline int64_t count_lanes(const Vec& x, const uint8_t* extra_bits, const VecQuantizer& q, float momentum,
                           const SwitchStates& s) {
  int64_t switches = 0;
  for (int i = 0; i < kLanes; ++i) {
    mixbit::SwitchState state{s.codes[i], s.marks == nullptr ? 0 : s.marks[i], s.counts == nullptr ? 0 : s.counts[i],
                              s.runs == nullptr ? 0 : s.runs[i], s.frequencies == nullptr ? 0.0f : s.frequencies[i]};
    const int code = mixbit::counted_code(x.lane[i], q.scale.lane[0], {q.low.lane[0], q.high.lane[0]},
                                          lane_extra_bits(extra_bits, i), kRounding, state.code);
    switches += mixbit::count_switch<kScore>(code, momentum, state) ? 1 : 0;
    s.codes[i] = static_cast<int8_t>(state.code);
    if (s.marks != nullptr) s.marks[i] = static_cast<int8_t>(state.mark);
    if (s.counts != nullptr) s.counts[i] = static_cast<int16_t>(state.count);
    if (s.runs != nullptr) s.runs[i] = static_cast<int16_t>(state.run);
    if (s.frequencies != nullptr) s.frequencies[i] = state.frequency;
  }
  return switches;
}

// Sixteen weights, held where they are frozen: which ones are.
template <Rounding kRounding, bool kExtra>
inline Mask freeze_lanes(Vec& x, const uint8_t* extra_bits, const VecQuantizer& q, float momentum, float threshold,
                         const FreezeStates& s) {
  Mask frozen = 0;
  for (int i = 0; i < kLanes; ++i) {
    mixbit::FreezeState state{s.codes[i], s.marks[i], s.frequencies[i], s.averages[i]};
    x.lane[i] = mixbit::freeze_oscillating(x.lane[i], q.scale.lane[0], {q.low.lane[0], q.high.lane[0]},
                                           lane_extra_bits(extra_bits, i), kRounding, momentum, threshold, state);
    s.codes[i] = static_cast<int8_t>(state.code);
    s.marks[i] = static_cast<int8_t>(state.mark);
    s.frequencies[i] = state.frequency;
    s.averages[i] = state.average;
    frozen = static_cast<Mask>(frozen | (state.mark == mixbit::kFrozen ? 1u << i : 0u));
  }
  return frozen;
}

#else

// The codes of x on the grids of the weights; NaN comes through.
template <Rounding kRounding, bool kExtra>
inline Vec level_codes(const Vec& x, const Extra& extra, const VecQuantizer& q) {
  if constexpr (kExtra) {
    const Vec one = broadcast(1.0f);
    const VecQuantizer own = extra_grid(extra, {{}, q.scale, add(q.high, one), add(add(q.low, q.high), one)});
    return quantize<kRounding>(div(x, own.scale), own);
  } else {
    return quantize<kRounding>(div(x, q.scale), q);
  }
}
template <bool kExtra>
inline Extra extra_of(const uint8_t* extra_bits) {
  if constexpr (kExtra) return load_extra(extra_bits);
  return {broadcast(1.0f), broadcast(1.0f)};
}

// -1, 0 or 1.
inline Vec direction_of(const Vec& change) {
  const Vec one = broadcast(1.0f);
  return min(one, max(negate(one), change));
}
inline Vec updated_frequency(Mask oscillates, const Vec& momentum, const Vec& kept, const float* frequencies) {
  const Vec updated = add(keep(oscillates, momentum), mul(kept, load(frequencies)));
  return keep(in_range(updated, broadcast(mixbit::kSmallestFrequency), broadcast(2.0f)), updated);
}

template <Rounding kRounding, SwitchScore kScore, bool kExtra>
inline int64_t count_lanes(const Vec& x, const uint8_t* extra_bits, const VecQuantizer& q, float momentum,
                           const SwitchStates& s) {
  const Vec zero = broadcast(0.0f);
  const Vec one = broadcast(1.0f);
  const Vec before = load_int8(s.codes);
  const Vec level = level_codes<kRounding, kExtra>(x, extra_of<kExtra>(extra_bits), q);
  const Vec code = select(equal(level, level), level, before);
  const uint32_t same = to_bits(equal(code, before));
  if (same == 0xffffu) {
    // Most weights of most steps: nothing is written.
    if constexpr (kScore == SwitchScore::kEma) {
      const Mask none = equal(one, zero);
      store(s.frequencies, updated_frequency(none, zero, broadcast(1.0f - momentum), s.frequencies));
    }
    return 0;
  }
  const Vec change = sub(code, before);
  if constexpr (kScore == SwitchScore::kAdjacent || kScore == SwitchScore::kPair) {
    const Vec limit = broadcast(static_cast<float>(mixbit::kMaxSwitchCount));
    const Mask adjacent = equal(mul(change, change), one);
    const Vec count = load_int16(s.counts);
    if constexpr (kScore == SwitchScore::kAdjacent) {
      store_int16(s.counts, min(limit, add(count, keep(adjacent, one))));
    } else {
      const Vec pair = min(code, before);
      const Vec mark = load_int8(s.marks);
      const Vec run = load_int16(s.runs);
      const Vec next = select(adjacent, select(equal(pair, mark), min(limit, add(run, one)), one), run);
      store_int8(s.marks, select(adjacent, pair, mark));
      store_int16(s.runs, next);
      store_int16(s.counts, max(count, next));
    }
  } else {
    const Vec direction = direction_of(change);
    const Vec mark = load_int8(s.marks);
    const Mask oscillates = equal(mul(direction, mark), negate(one));
    if constexpr (kScore == SwitchScore::kOscillation) {
      const Vec limit = broadcast(static_cast<float>(mixbit::kMaxSwitchCount));
      store_int16(s.counts, min(limit, add(load_int16(s.counts), keep(oscillates, one))));
    } else {
      store(s.frequencies,
            updated_frequency(oscillates, broadcast(momentum), broadcast(1.0f - momentum), s.frequencies));
    }
    store_int8(s.marks, select(equal(direction, zero), mark, direction));
  }
  store_int8(s.codes, code);
  return kLanes - __builtin_popcount(same);
}

template <Rounding kRounding, bool kExtra>
inline Mask freeze_lanes(Vec& x, const uint8_t* extra_bits, const VecQuantizer& q, float momentum, float threshold,
                         const FreezeStates& s) {
  const Vec zero = broadcast(0.0f);
  const Vec finest = broadcast(mixbit::extra_steps(mixbit::kMaxExtraBits));
  const Vec step = div(q.scale, finest);
  const Extra extra = extra_of<kExtra>(extra_bits);
  const Vec units = mul(finest, extra.fraction);
  const Vec before = load_int8(s.codes);
  const Vec mark = load_int8(s.marks);
  const Vec held = broadcast(static_cast<float>(mixbit::kFrozen));
  const Mask was_frozen = equal(mark, held);
  const Vec level = mul(level_codes<kRounding, kExtra>(x, extra, q), units);
  const Vec code = select(equal(level, level), level, before);
  const Vec direction = direction_of(sub(code, before));
  const Mask oscillates = equal(mul(direction, mark), broadcast(-1.0f));
  const Vec kept = broadcast(1.0f - momentum);
  const Vec frequency = updated_frequency(oscillates, broadcast(momentum), kept, s.frequencies);
  const Vec average = load(s.averages);
  // Frequencies are at most 1: a threshold of 2 is beyond reach.
  const Mask above =
      in_range(frequency, broadcast(threshold > 0.0f ? __builtin_nextafterf(threshold, 2.0f) : 2.0f), broadcast(2.0f));
  const Vec level_of_average = mul(round_half_even(div(average, units)), units);
  // What a weight that stays free would have, then what a frozen one has.
  Vec next_mark = select(above, held, select(equal(direction, zero), mark, direction));
  Vec next_code = select(above, level_of_average, code);
  Vec next_average = select(above, average, add(mul(broadcast(momentum), code), mul(kept, average)));
  next_mark = select(was_frozen, mark, next_mark);
  next_code = select(was_frozen, before, next_code);
  next_average = select(was_frozen, average, next_average);
  store_int8(s.marks, next_mark);
  store_int8(s.codes, next_code);
  store(s.averages, next_average);
  store(s.frequencies, select(was_frozen, load(s.frequencies), frequency));
  const Mask frozen = equal(next_mark, held);
  x = select(frozen, mul(add(next_code, zero), step), x);  // -0 becomes 0, as codes that were integers have it
  return frozen;
}

#endif

template <typename S, Rounding kRounding, SwitchScore kScore, bool kExtra>
int64_t count_switches_loop(const typename S::Element* x, const uint8_t* extra_bits, int64_t n, const VecQuantizer& q,
                            float momentum, const SwitchStates& s) {
  const auto count = [&](const Vec& value, const uint8_t* bits, const SwitchStates& states) {
    return count_lanes<kRounding, kScore, kExtra>(value, bits, q, momentum, states);
  };
  int64_t switches = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) switches += count(S::read(x + i), at(extra_bits, i), at(s, i));
  if (i < n) {
    LaneStates rest;
    copy_lanes(rest.extra_bits, at(extra_bits, i), n - i);
    copy_lanes(rest.switches(), at(s, i), n - i);
    switches += count(read_partial<S>(x + i, n - i), rest.extra_bits, rest.switches());
    copy_lanes(at(s, i), rest.switches(), n - i);
  }
  return switches;
}

template <typename S, Rounding kRounding>
LevelFindings count_switches_body(const void* x_data, const uint8_t* extra_bits, int64_t n, const Quantizer& quantizer,
                                  SwitchScore score, float momentum, const SwitchStates& s) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  const VecQuantizer q = widen(quantizer);
  const auto run = [&]<SwitchScore kScore>() -> int64_t {
    return extra_bits == nullptr ? count_switches_loop<S, kRounding, kScore, false>(x, extra_bits, n, q, momentum, s)
                                 : count_switches_loop<S, kRounding, kScore, true>(x, extra_bits, n, q, momentum, s);
  };
  int64_t switches = 0;
  switch (score) {
    case SwitchScore::kAdjacent:
      switches = run.template operator()<SwitchScore::kAdjacent>();
      break;
    case SwitchScore::kPair:
      switches = run.template operator()<SwitchScore::kPair>();
      break;
    case SwitchScore::kOscillation:
      switches = run.template operator()<SwitchScore::kOscillation>();
      break;
    case SwitchScore::kEma:
      switches = run.template operator()<SwitchScore::kEma>();
      break;
  }
  return {switches, most_extra_bits(extra_bits, n)};
}

template <typename S, Rounding kRounding, bool kExtra>
int64_t freeze_loop(typename S::Element* x, const uint8_t* extra_bits, int64_t n, const VecQuantizer& q, float momentum,
                    float threshold, const FreezeStates& s) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec v = S::read(x + i);
    const uint32_t frozen =
        to_bits(freeze_lanes<kRounding, kExtra>(v, at(extra_bits, i), q, momentum, threshold, at(s, i)));
    if (frozen != 0) S::write(x + i, v);
    count += __builtin_popcount(frozen);
  }
  if (i < n) {
    LaneStates rest;
    copy_lanes(rest.extra_bits, at(extra_bits, i), n - i);
    copy_lanes(rest.freezing(), at(s, i), n - i);
    Vec v = read_partial<S>(x + i, n - i);
    const uint32_t frozen =
        to_bits(freeze_lanes<kRounding, kExtra>(v, rest.extra_bits, q, momentum, threshold, rest.freezing()));
    if (frozen != 0) write_partial<S>(x + i, v, n - i);
    copy_lanes(at(s, i), rest.freezing(), n - i);
    count += __builtin_popcount(frozen);
  }
  return count;
}

template <typename S, Rounding kRounding>
LevelFindings freeze_body(void* x_data, const uint8_t* extra_bits, int64_t n, const Quantizer& quantizer,
                          float momentum, float threshold, const FreezeStates& s) {
  auto* x = static_cast<typename S::Element*>(x_data);
  const VecQuantizer q = widen(quantizer);
  const int64_t count = extra_bits == nullptr
                            ? freeze_loop<S, kRounding, false>(x, extra_bits, n, q, momentum, threshold, s)
                            : freeze_loop<S, kRounding, true>(x, extra_bits, n, q, momentum, threshold, s);
  return {count, most_extra_bits(extra_bits, n)};
}

// Calls f(i, n) for the packs of a run: n = 16 elements from i on, less in the last one.
template <typename F>
MIXBIT_INLINE inline void for_each_pack(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}
template <typename S>
MIXBIT_INLINE inline Vec read_pack(const typename S::Element* p, int64_t n) {
  return n == kLanes ? S::read(p) : read_partial<S>(p, n);
}
template <typename S>
MIXBIT_INLINE inline void write_pack(typename S::Element* p, const Vec& v, int64_t n) {
  n == kLanes ? S::write(p, v) : write_partial<S>(p, v, n);
}

// g of the n weights from i on.
MIXBIT_INLINE inline Vec multiplier_of(const Vec& w, const uint8_t* extra_bits, int64_t i, int64_t n,
                                       const VecMultiplier& m) {
  if (extra_bits == nullptr || n == kLanes) {
    return step_multiplier(w, extra_bits == nullptr ? nullptr : extra_bits + i, m);
  }
  uint8_t last[kLanes] = {};
  std::memcpy(last, extra_bits + i, static_cast<size_t>(n));
  return step_multiplier(w, last, m);
}

// Gradients, divided by the scale that they were multiplied with.
template <typename S>
MIXBIT_INLINE inline Vec unscaled(typename S::Element* grad, int64_t n, float grad_scale) {
  Vec g = read_pack<S>(grad, n);
  if (grad_scale != 1.0f) {
    g = divide(g, broadcast(grad_scale));
    write_pack<S>(grad, g, n);
  }
  return g;
}

template <typename S>
void sgd_step_body(const StepRun& run, const Quantizer& quantizer, const StepMultiplier& multiplier,
                   const SgdRule& rule, float grad_scale) {
  auto* weight = static_cast<typename S::Element*>(run.weight);
  auto* grad = static_cast<typename S::Element*>(run.grad);
  auto* momentum = static_cast<typename S::Element*>(run.momentum);
  const VecMultiplier m = widen(quantizer, multiplier);
  const bool keeps = rule.momentum != 0.0f;
  for_each_pack(run.n, [&](int64_t i, int64_t n) MIXBIT_INLINE {
    const Vec w = read_pack<S>(weight + i, n);
    const Vec g = unscaled<S>(grad + i, n, grad_scale);
    const Vec before = keeps && !rule.first ? read_pack<S>(momentum + i, n) : g;
    const VecState state = sgd_step(w, g, before, multiplier_of(w, run.extra_bits, i, n, m), rule);
    write_pack<S>(weight + i, state.weight, n);
    if (keeps) write_pack<S>(momentum + i, state.momentum, n);
  });
}

template <typename S>
void adam_step_body(const StepRun& run, const Quantizer& quantizer, const StepMultiplier& multiplier,
                    const AdamRule& rule, float grad_scale) {
  auto* weight = static_cast<typename S::Element*>(run.weight);
  auto* grad = static_cast<typename S::Element*>(run.grad);
  auto* moment1 = static_cast<typename S::Element*>(run.momentum);
  auto* moment2 = static_cast<typename S::Element*>(run.moment2);
  auto* largest2 = static_cast<typename S::Element*>(run.largest_moment2);
  const VecMultiplier m = widen(quantizer, multiplier);
  const bool amsgrad = largest2 != nullptr;
  for_each_pack(run.n, [&](int64_t i, int64_t n) MIXBIT_INLINE {
    const Vec w = read_pack<S>(weight + i, n);
    const Vec g = unscaled<S>(grad + i, n, grad_scale);
    const Vec second = read_pack<S>(moment2 + i, n);
    const VecState state =
        adam_step(w, g, read_pack<S>(moment1 + i, n), second, amsgrad ? read_pack<S>(largest2 + i, n) : second, amsgrad,
                  multiplier_of(w, run.extra_bits, i, n, m), rule);
    write_pack<S>(weight + i, state.weight, n);
    write_pack<S>(moment1 + i, state.momentum, n);
    write_pack<S>(moment2 + i, state.moment2, n);
    if (amsgrad) write_pack<S>(largest2 + i, state.largest_moment2, n);
  });
}

template <typename S>
void scale_updates_body(const void* before_data, void* weight_data, const uint8_t* extra_bits, int64_t count,
                        const Quantizer& quantizer, const StepMultiplier& multiplier) {
  const auto* before = static_cast<const typename S::Element*>(before_data);
  auto* weight = static_cast<typename S::Element*>(weight_data);
  const VecMultiplier m = widen(quantizer, multiplier);
  for_each_pack(count, [&](int64_t i, int64_t n) MIXBIT_INLINE {
    const Vec w = read_pack<S>(before + i, n);
    write_pack<S>(weight + i, scaled_update(w, read_pack<S>(weight + i, n), multiplier_of(w, extra_bits, i, n, m)), n);
  });
}

template <typename S>
void step_multipliers_body(const void* weight_data, void* out_data, const uint8_t* extra_bits, int64_t count,
                           const Quantizer& quantizer, const StepMultiplier& multiplier) {
  const auto* weight = static_cast<const typename S::Element*>(weight_data);
  auto* out = static_cast<typename S::Element*>(out_data);
  const VecMultiplier m = widen(quantizer, multiplier);
  for_each_pack(count, [&](int64_t i, int64_t n) MIXBIT_INLINE {
    write_pack<S>(out + i, multiplier_of(read_pack<S>(weight + i, n), extra_bits, i, n, m), n);
  });
}

#undef MIXBIT_INLINE

// Extra bits of the last n < 16 elements.
inline Extra extra_partial(const uint8_t* p, int64_t n) {
  uint8_t buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n));
  return load_extra(buffer);
}

template <typename S, Rounding kRounding>
void extra_levels_body(const void* x_data, const uint8_t* extra, void* y_data, int64_t n, const Quantizer& quantizer,
                       bool stream) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* y = static_cast<typename S::Element*>(y_data);
  const ExtraQuantizer q = widen_extra(quantizer);
  const bool past_cache = stream && can_stream<S>(y);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = extra_level_fake_quantize<kRounding>(S::read(x + i), load_extra(extra + i), q);
    past_cache ? S::write_past_cache(y + i, v) : S::write(y + i, v);
  }
  if (past_cache) stream_fence();
  if (i < n) {
    const Vec v =
        extra_level_fake_quantize<kRounding>(read_partial<S>(x + i, n - i), extra_partial(extra + i, n - i), q);
    write_partial<S>(y + i, v, n - i);
  }
}

template <typename S, Rounding kRounding>
void extra_levels_backward_body(const void* grad_data, const void* x_data, const uint8_t* extra, void* dx_data,
                                int64_t n, const Quantizer& quantizer, double* dscale, bool stream) {
  const auto* grad = static_cast<const typename S::Element*>(grad_data);
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* dx = static_cast<typename S::Element*>(dx_data);
  const ExtraQuantizer q = widen_extra(quantizer);
  Vec sum = broadcast(0.0f);
  const bool past_cache = stream && dx != nullptr && can_stream<S>(dx);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecGrad d =
        extra_level_fake_quantize_grad<kRounding>(S::read(grad + i), S::read(x + i), load_extra(extra + i), q);
    sum = add(sum, d.dscale);
    if (past_cache) {
      S::write_past_cache(dx + i, d.dx);
    } else if (dx != nullptr) {
      S::write(dx + i, d.dx);
    }
  }
  if (past_cache) stream_fence();
  if (i < n) {
    const VecGrad d = extra_level_fake_quantize_grad<kRounding>(
        read_partial<S>(grad + i, n - i), read_partial<S>(x + i, n - i), extra_partial(extra + i, n - i), q);
    sum = add(sum, d.dscale);
    if (dx != nullptr) write_partial<S>(dx + i, d.dx, n - i);
  }
  if (dscale != nullptr) *dscale = sum_lanes(sum);
}

// Runtime storage type and rounding to template arguments.
#define MIXBIT_DISPATCH_STORAGE(storage, call) \
  switch (storage) {                           \
    case StorageType::kFloat32: {              \
      using S = Float32;                       \
      call;                                    \
      break;                                   \
    }                                          \
    case StorageType::kFloat16: {              \
      using S = Float16;                       \
      call;                                    \
      break;                                   \
    }                                          \
    case StorageType::kBFloat16: {             \
      using S = BFloat16;                      \
      call;                                    \
      break;                                   \
    }                                          \
  }
#define MIXBIT_DISPATCH_ROUNDING(rounding, call)        \
  if ((rounding) == Rounding::kHalfEven) {              \
    constexpr Rounding kRounding = Rounding::kHalfEven; \
    call;                                               \
  } else {                                              \
    constexpr Rounding kRounding = Rounding::kHalfUp;   \
    call;                                               \
  }

void fake_quantize_entry(StorageType storage, const void* x, void* y, int64_t n, const Quantizer& q, bool stream) {
  MIXBIT_DISPATCH_STORAGE(storage,
                          MIXBIT_DISPATCH_ROUNDING(q.rounding, (fake_quantize_body<S, kRounding>(x, y, n, q, stream))));
}
template <typename S, typename Rule>
void fake_quantize_backward_of(const void* grad, const void* x, void* dx, int64_t n, const Quantizer& q, double* dscale,
                               double* dzero_point, bool stream) {
  if (dscale == nullptr) {
    fake_quantize_backward_body<S, Rule, Sums::kNone>(grad, x, dx, n, q, nullptr, nullptr, stream);
  } else if (dzero_point == nullptr) {
    fake_quantize_backward_body<S, Rule, Sums::kScale>(grad, x, dx, n, q, dscale, nullptr, stream);
  } else {
    fake_quantize_backward_body<S, Rule, Sums::kBoth>(grad, x, dx, n, q, dscale, dzero_point, stream);
  }
}
void fake_quantize_backward_entry(StorageType storage, const void* grad, const void* x, void* dx, int64_t n,
                                  const Quantizer& q, double* dscale, double* dzero_point, bool stream) {
  if (q.gradient == Gradient::kClip) {
    MIXBIT_DISPATCH_STORAGE(storage,
                            (fake_quantize_backward_of<S, Clipping>(grad, x, dx, n, q, dscale, dzero_point, stream)));
  } else {
    MIXBIT_DISPATCH_STORAGE(storage,
                            MIXBIT_DISPATCH_ROUNDING(q.rounding, (fake_quantize_backward_of<S, LearnedStep<kRounding>>(
                                                                     grad, x, dx, n, q, dscale, dzero_point, stream))));
  }
}
void fake_quantize_mask_entry(StorageType storage, const void* x, void* y, uint8_t* mask, int64_t n,
                              const Quantizer& q) {
  if (q.gradient == Gradient::kClip) {
    MIXBIT_DISPATCH_STORAGE(
        storage,
        MIXBIT_DISPATCH_ROUNDING(q.rounding, (fake_quantize_mask_body<S, kRounding, Clipping>(x, y, mask, n, q))));
  } else {
    MIXBIT_DISPATCH_STORAGE(
        storage, MIXBIT_DISPATCH_ROUNDING(
                     q.rounding, (fake_quantize_mask_body<S, kRounding, LearnedStep<kRounding>>(x, y, mask, n, q))));
  }
}
void apply_mask_entry(StorageType storage, const void* grad, const uint8_t* mask, void* dx, int64_t n) {
  MIXBIT_DISPATCH_STORAGE(storage, (apply_mask_body<S>(grad, mask, dx, n)));
}
void quantization_noise_entry(StorageType storage, const void* x, int64_t n, const Quantizer* q, int64_t count,
                              double* signal, double* noise) {
  MIXBIT_DISPATCH_STORAGE(storage, (quantization_noise_body<S>(x, n, q, count, signal, noise)));
}
void noise_power_entry(StorageType storage, const void* x, const void* reference, int64_t n, double* signal,
                       double* noise) {
  MIXBIT_DISPATCH_STORAGE(storage, (noise_power_body<S>(x, reference, n, signal, noise)));
}
void observe_entry(StorageType storage, const void* x, int64_t n, Moments* moments) {
  MIXBIT_DISPATCH_STORAGE(storage, (observe_body<S>(x, n, moments)));
}
void mixture_entry(StorageType storage, const void* x, void* y, int64_t n, const Mixture& mixture, bool stream) {
  MIXBIT_DISPATCH_STORAGE(storage, (mixture_body<S>(x, y, n, mixture, stream)));
}
template <MixtureForm kForm>
void mixture_backward_of(StorageType storage, const void* grad, const void* x, void* dx, int64_t n, const Mixture& m,
                         double* levels, double* steps, bool stream) {
  if (levels == nullptr) {
    MIXBIT_DISPATCH_STORAGE(
        storage, (mixture_backward_body<S, kForm, MixtureSums::kNone>(grad, x, dx, n, m, nullptr, nullptr, stream)));
  } else if (steps == nullptr) {
    MIXBIT_DISPATCH_STORAGE(
        storage, (mixture_backward_body<S, kForm, MixtureSums::kLevels>(grad, x, dx, n, m, levels, nullptr, stream)));
  } else {
    MIXBIT_DISPATCH_STORAGE(
        storage, (mixture_backward_body<S, kForm, MixtureSums::kSteps>(grad, x, dx, n, m, levels, steps, stream)));
  }
}
void mixture_backward_entry(StorageType storage, const void* grad, const void* x, void* dx, int64_t n, const Mixture& m,
                            double* levels, double* steps, bool stream) {
  switch (m.form) {
    case MixtureForm::kMixture:
      return mixture_backward_of<MixtureForm::kMixture>(storage, grad, x, dx, n, m, levels, steps, stream);
    case MixtureForm::kGated:
      return mixture_backward_of<MixtureForm::kGated>(storage, grad, x, dx, n, m, levels, steps, stream);
    case MixtureForm::kGatedResidual:
      return mixture_backward_of<MixtureForm::kGatedResidual>(storage, grad, x, dx, n, m, levels, steps, stream);
  }
}
LevelFindings count_switches_entry(StorageType storage, const void* x, const uint8_t* extra_bits, int64_t n,
                                   const Quantizer& q, SwitchScore score, float momentum, const SwitchStates& s) {
  LevelFindings found{};
  MIXBIT_DISPATCH_STORAGE(
      storage, MIXBIT_DISPATCH_ROUNDING(
                   q.rounding, (found = count_switches_body<S, kRounding>(x, extra_bits, n, q, score, momentum, s))));
  return found;
}
LevelFindings freeze_entry(StorageType storage, void* x, const uint8_t* extra_bits, int64_t n, const Quantizer& q,
                           float momentum, float threshold, const FreezeStates& s) {
  LevelFindings found{};
  MIXBIT_DISPATCH_STORAGE(
      storage, MIXBIT_DISPATCH_ROUNDING(
                   q.rounding, (found = freeze_body<S, kRounding>(x, extra_bits, n, q, momentum, threshold, s))));
  return found;
}

void extra_levels_entry(StorageType storage, const void* x, const uint8_t* extra, void* y, int64_t n,
                        const Quantizer& q, bool stream) {
  MIXBIT_DISPATCH_STORAGE(
      storage, MIXBIT_DISPATCH_ROUNDING(q.rounding, (extra_levels_body<S, kRounding>(x, extra, y, n, q, stream))));
}
void extra_levels_backward_entry(StorageType storage, const void* grad, const void* x, const uint8_t* extra, void* dx,
                                 int64_t n, const Quantizer& q, double* dscale, bool stream) {
  MIXBIT_DISPATCH_STORAGE(
      storage, MIXBIT_DISPATCH_ROUNDING(
                   q.rounding, (extra_levels_backward_body<S, kRounding>(grad, x, extra, dx, n, q, dscale, stream))));
}

void sgd_step_entry(StorageType storage, const StepRun& run, const Quantizer& quantizer,
                    const StepMultiplier& multiplier, const SgdRule& rule, float grad_scale) {
  MIXBIT_DISPATCH_STORAGE(storage, (sgd_step_body<S>(run, quantizer, multiplier, rule, grad_scale)));
}
void adam_step_entry(StorageType storage, const StepRun& run, const Quantizer& quantizer,
                     const StepMultiplier& multiplier, const AdamRule& rule, float grad_scale) {
  MIXBIT_DISPATCH_STORAGE(storage, (adam_step_body<S>(run, quantizer, multiplier, rule, grad_scale)));
}
void scale_updates_entry(StorageType storage, const void* before, void* weight, const uint8_t* extra_bits, int64_t n,
                         const Quantizer& quantizer, const StepMultiplier& multiplier) {
  MIXBIT_DISPATCH_STORAGE(storage, (scale_updates_body<S>(before, weight, extra_bits, n, quantizer, multiplier)));
}
void step_multipliers_entry(StorageType storage, const void* weight, void* out, const uint8_t* extra_bits, int64_t n,
                            const Quantizer& quantizer, const StepMultiplier& multiplier) {
  MIXBIT_DISPATCH_STORAGE(storage, (step_multipliers_body<S>(weight, out, extra_bits, n, quantizer, multiplier)));
}

#undef MIXBIT_DISPATCH_STORAGE
#undef MIXBIT_DISPATCH_ROUNDING

constexpr KernelTable table_of(Isa isa) {
  return {isa,
          fake_quantize_entry,
          fake_quantize_backward_entry,
          fake_quantize_mask_entry,
          apply_mask_entry,
          quantization_noise_entry,
          noise_power_entry,
          observe_entry,
          mixture_entry,
          mixture_backward_entry,
          extra_levels_entry,
          extra_levels_backward_entry,
          count_switches_entry,
          freeze_entry,
          sgd_step_entry,
          adam_step_entry,
          scale_updates_entry,
          step_multipliers_entry};
}

}  // namespace
