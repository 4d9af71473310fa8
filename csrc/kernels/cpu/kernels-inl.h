#pragma once

// One body per kernel over the sixteen-lane vector that the including file has defined (simd_*.h). Everything is in an
// anonymous namespace and free of inline templates of the standard library: the linker must not pick one instruction
// set's copy for all.

#include <cstdint>
#include <cstring>

#include <mixbit/kernels/cpu.h>

namespace {

using mixbit::Rounding;
using mixbit::kernels::cpu::Isa;
using mixbit::kernels::cpu::KernelTable;
using mixbit::kernels::cpu::kLanes;
using mixbit::kernels::cpu::Moments;
using mixbit::kernels::cpu::Quantizer;
using mixbit::kernels::cpu::StorageType;

// Storage types: how sixteen elements are read and written.
struct Float32 {
  using Element = float;
  static Vec read(const float* p) { return load(p); }
  static void write(float* p, const Vec& v) { store(p, v); }
};
struct Float16 {
  using Element = uint16_t;
  static Vec read(const uint16_t* p) { return load_half(p); }
  static void write(uint16_t* p, const Vec& v) { store_half(p, v); }
};
struct BFloat16 {
  using Element = uint16_t;
  static Vec read(const uint16_t* p) { return load_bfloat16(p); }
  static void write(uint16_t* p, const Vec& v) { store_bfloat16(p, v); }
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

// Adds the lanes in a fixed order, in double.
inline double sum_lanes(const Vec& v) {
  float lanes[kLanes];
  to_array(v, lanes);
  double sum = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
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

#endif

template <typename S, Rounding kRounding>
void fake_quantize_body(const void* x_data, void* y_data, int64_t n, const Quantizer& quantizer) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* y = static_cast<typename S::Element*>(y_data);
  const VecQuantizer q = widen(quantizer);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    S::write(y + i, fake_quantize<kRounding>(S::read(x + i), q));
  }
  if (i < n) {
    write_partial<S>(y + i, fake_quantize<kRounding>(read_partial<S>(x + i, n - i), q), n - i);
  }
}

template <typename S, Rounding kRounding>
void fake_quantize_backward_body(const void* grad_data, const void* x_data, void* dx_data, int64_t n,
                                 const Quantizer& quantizer, double* dscale, double* dzero_point) {
  const auto* grad = static_cast<const typename S::Element*>(grad_data);
  const auto* x = static_cast<const typename S::Element*>(x_data);
  auto* dx = static_cast<typename S::Element*>(dx_data);
  const VecQuantizer q = widen(quantizer);
  Vec scale_sum = broadcast(0.0f);
  Vec zero_point_sum = scale_sum;
  auto step = [&](const Vec& g, const Vec& value) {
    const VecGrad d = fake_quantize_grad<kRounding>(g, value, q);
    scale_sum = add(scale_sum, d.dscale);
    zero_point_sum = add(zero_point_sum, d.dzero_point);
    return d.dx;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec d = step(S::read(grad + i), S::read(x + i));
    if (dx != nullptr) S::write(dx + i, d);
  }
  if (i < n) {
    const Vec d = step(read_partial<S>(grad + i, n - i), read_partial<S>(x + i, n - i));
    if (dx != nullptr) write_partial<S>(dx + i, d, n - i);
  }
  *dscale = sum_lanes(scale_sum);
  *dzero_point = sum_lanes(zero_point_sum);
}

// Candidates that are summed side by side while a vector of x is in a register.
constexpr int64_t kCandidates = 8;

template <typename S, Rounding kRounding>
void quantization_noise_body(const void* x_data, int64_t n, const Quantizer* quantizers, int64_t count, double* signal,
                             double* noise) {
  const auto* x = static_cast<const typename S::Element*>(x_data);
  Vec signal_sum = broadcast(0.0f);
  for (int64_t first = 0; first == 0 || first < count; first += kCandidates) {
    const int64_t here = count - first < kCandidates ? count - first : kCandidates;
    VecQuantizer q[kCandidates];
    Vec sums[kCandidates];
    for (int64_t k = 0; k < here; ++k) {
      q[k] = widen(quantizers[first + k]);
      sums[k] = broadcast(0.0f);
    }
    auto step = [&](const Vec& value) {
      if (first == 0) signal_sum = add(signal_sum, mul(value, value));
      for (int64_t k = 0; k < here; ++k) {
        const Vec error = sub(value, fake_quantize<kRounding>(value, q[k]));
        sums[k] = add(sums[k], mul(error, error));
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(S::read(x + i));
    // Zeros in the other lanes: a zero is a level of every grid with zero_point 0, its error is zero.
    if (i < n) step(read_partial<S>(x + i, n - i));
    for (int64_t k = 0; k < here; ++k) noise[first + k] = sum_lanes(sums[k]);
  }
  *signal = sum_lanes(signal_sum);
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

void fake_quantize_entry(StorageType storage, const void* x, void* y, int64_t n, const Quantizer& q) {
  MIXBIT_DISPATCH_STORAGE(storage,
                          MIXBIT_DISPATCH_ROUNDING(q.rounding, (fake_quantize_body<S, kRounding>(x, y, n, q))));
}
void fake_quantize_backward_entry(StorageType storage, const void* grad, const void* x, void* dx, int64_t n,
                                  const Quantizer& q, double* dscale, double* dzero_point) {
  MIXBIT_DISPATCH_STORAGE(storage, MIXBIT_DISPATCH_ROUNDING(q.rounding, (fake_quantize_backward_body<S, kRounding>(
                                                                            grad, x, dx, n, q, dscale, dzero_point))));
}
void quantization_noise_entry(StorageType storage, const void* x, int64_t n, const Quantizer* q, int64_t count,
                              double* signal, double* noise) {
  const Rounding rounding = count > 0 ? q[0].rounding : Rounding::kHalfEven;
  MIXBIT_DISPATCH_STORAGE(
      storage,
      MIXBIT_DISPATCH_ROUNDING(rounding, (quantization_noise_body<S, kRounding>(x, n, q, count, signal, noise))));
}
void noise_power_entry(StorageType storage, const void* x, const void* reference, int64_t n, double* signal,
                       double* noise) {
  MIXBIT_DISPATCH_STORAGE(storage, (noise_power_body<S>(x, reference, n, signal, noise)));
}
void observe_entry(StorageType storage, const void* x, int64_t n, Moments* moments) {
  MIXBIT_DISPATCH_STORAGE(storage, (observe_body<S>(x, n, moments)));
}

#undef MIXBIT_DISPATCH_STORAGE
#undef MIXBIT_DISPATCH_ROUNDING

constexpr KernelTable table_of(Isa isa) {
  return {isa,          fake_quantize_entry, fake_quantize_backward_entry, quantization_noise_entry, noise_power_entry,
          observe_entry};
}

}  // namespace
