#pragma once

// Sixteen lanes in plain C++: the oracle of the other instruction sets.

#include <cstdint>

#include <mixbit/common/half.h>

#define MIXBIT_SIMD_SCALAR

namespace {

struct Vec {
  float lane[16];
};

template <typename F>
inline Vec map(F f) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
  return r;
}

inline Vec broadcast(float v) {
  return map([&](int) { return v; });
}
inline Vec add(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
// One rounding.
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return map([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// `b` where either is NaN, as the x86 instructions have it.
inline Vec max(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
  return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline bool any_nan(const Vec& v) {
  bool found = false;
  for (int i = 0; i < 16; ++i) found = found || v.lane[i] != v.lane[i];
  return found;
}
inline void to_array(const Vec& v, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = v.lane[i];
}

using Mask = uint16_t;  // lane i is bit i
inline Vec keep(Mask m, const Vec& v) {
  return map([&](int i) { return (m >> i & 1) != 0 ? v.lane[i] : 0.0f; });
}
inline uint16_t to_bits(Mask m) { return m; }
inline Mask from_bits(uint16_t bits) { return bits; }

inline Vec load(const float* p) {
  return map([&](int i) { return p[i]; });
}
inline void store(float* p, const Vec& v) { to_array(v, p); }
inline void stream(float* p, const Vec& v) { to_array(v, p); }
inline void stream_fence() {}
inline Vec load_half(const uint16_t* p) {
  return map([&](int i) { return mixbit::half_to_float(p[i]); });
}
inline void store_half(uint16_t* p, const Vec& v) {
  for (int i = 0; i < 16; ++i) p[i] = mixbit::float_to_half(v.lane[i]);
}
inline Vec load_bfloat16(const uint16_t* p) {
  return map([&](int i) { return mixbit::bfloat16_to_float(p[i]); });
}
inline void store_bfloat16(uint16_t* p, const Vec& v) {
  for (int i = 0; i < 16; ++i) p[i] = mixbit::float_to_bfloat16(v.lane[i]);
}

// Extra bits of sixteen elements, each 0 ... 2.
struct Extra {
  uint8_t bits[16];
};
inline Extra load_extra(const uint8_t* p) {
  Extra e;
  for (int i = 0; i < 16; ++i) e.bits[i] = p[i];
  return e;
}

inline void stream_half(uint16_t* p, const Vec& v) { store_half(p, v); }
inline void stream_bfloat16(uint16_t* p, const Vec& v) { store_bfloat16(p, v); }

}  // namespace
