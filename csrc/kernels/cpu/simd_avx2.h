#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Two registers are the sixteen lanes.
struct Vec {
  __m256 low;
  __m256 high;
};
using Mask = Vec;

inline Vec broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// c - a b, one rounding.
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Vec round_half_even(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kMode), _mm256_round_ps(a.high, kMode)};
}
inline Vec floor(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kMode), _mm256_round_ps(a.high, kMode)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vec negate(Vec a) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MIN));
  return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
}
inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline __m256 exp2_of_integers(__m256i k) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
}
// 2^k where the low bits of the lanes are those of the integer k.
inline Vec exp2_of_low_bits(Vec a) {
  return {exp2_of_integers(_mm256_castps_si256(a.low)), exp2_of_integers(_mm256_castps_si256(a.high))};
}
// Between -limit and limit.
inline Vec clamp_magnitude(Vec a, Vec limit) { return min(limit, max(negate(limit), a)); }
inline Mask in_range(Vec v, Vec low, Vec high) {
  return {_mm256_and_ps(_mm256_cmp_ps(v.low, low.low, _CMP_GE_OQ), _mm256_cmp_ps(v.low, high.low, _CMP_LE_OQ)),
          _mm256_and_ps(_mm256_cmp_ps(v.high, low.high, _CMP_GE_OQ), _mm256_cmp_ps(v.high, high.high, _CMP_LE_OQ))};
}
inline Mask equal(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.low, yes.low, m.low), _mm256_blendv_ps(no.high, yes.high, m.high)};
}
inline Vec keep(Mask m, Vec v) { return {_mm256_and_ps(v.low, m.low), _mm256_and_ps(v.high, m.high)}; }
// a - b in the lanes of m, a in the others.
inline Vec sub_where(Mask m, Vec a, Vec b) { return sub(a, keep(m, b)); }
inline uint16_t to_bits(Mask m) {
  return static_cast<uint16_t>(_mm256_movemask_ps(m.low) | (_mm256_movemask_ps(m.high) << 8));
}
inline __m256 lanes_of(int bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane));
}
inline Mask from_bits(uint16_t bits) { return {lanes_of(bits & 0xff), lanes_of(bits >> 8)}; }
inline bool any_nan(Vec v) {
  return _mm256_movemask_ps(
             _mm256_or_ps(_mm256_cmp_ps(v.low, v.low, _CMP_UNORD_Q), _mm256_cmp_ps(v.high, v.high, _CMP_UNORD_Q))) != 0;
}
inline void to_array(Vec v, float* out) {
  _mm256_storeu_ps(out, v.low);
  _mm256_storeu_ps(out + 8, v.high);
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) { to_array(v, p); }
inline void stream(float* p, Vec v) {
  _mm256_stream_ps(p, v.low);
  _mm256_stream_ps(p + 8, v.high);
}
inline void stream_fence() { _mm_sfence(); }
inline __m128i load8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Vec load_half(const uint16_t* p) { return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))}; }
inline void store_half(uint16_t* p, Vec v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.low, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.high, kMode));
}
inline void stream_half(uint16_t* p, Vec v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.low, kMode));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.high, kMode));
}
inline __m256 widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load_bfloat16(const uint16_t* p) { return {widen_bfloat16(load8(p)), widen_bfloat16(load8(p + 8))}; }
inline __m256i narrow_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline __m256i pack_bfloat16(Vec v) {
  // packus works inside 128-bit halves; the permutation puts the quarters back in order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow_bfloat16(v.low), narrow_bfloat16(v.high)), 0xd8);
}
inline void store_bfloat16(uint16_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bfloat16(v)); }
inline void stream_bfloat16(uint16_t* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_bfloat16(v));
}

// Small integers as floats and back; what is stored is a whole number, or saturates.
inline __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Vec load_int8(const int8_t* p) {
  const __m128i bytes = load_bytes(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vec load_int16(const int16_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(load_bytes(p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(load_bytes(p + 8)))};
}
inline __m256i narrow_int16(Vec v) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high)), 0xd8);
}
inline void store_int16(int16_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_int16(v)); }
inline void store_int8(int8_t* p, Vec v) {
  const __m256i words = narrow_int16(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Extra bits e of sixteen elements as 2^e and 2^-e, made of their exponents.
struct Extra {
  Vec parts;
  Vec fraction;
};
inline Extra load_extra(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i low = _mm256_cvtepu8_epi32(bytes);
  const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  const __m256i zero = _mm256_setzero_si256();
  return {{exp2_of_integers(low), exp2_of_integers(high)},
          {exp2_of_integers(_mm256_sub_epi32(zero, low)), exp2_of_integers(_mm256_sub_epi32(zero, high))}};
}

}  // namespace
