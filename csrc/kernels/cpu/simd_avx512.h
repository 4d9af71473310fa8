#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using Vec = __m512;
using Mask = __mmask16;

inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b, one rounding
inline Vec round_half_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec floor(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// Between -limit and limit.
inline Vec clamp_magnitude(Vec a, Vec limit) {
  constexpr int kSmallerMagnitudeSignOfFirst = 2;
  return _mm512_range_ps(a, limit, kSmallerMagnitudeSignOfFirst);
}
inline Vec negate(Vec a) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
inline Vec square_root(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec exp2_of_integers(__m512i k) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(k, _mm512_set1_epi32(127)), 23));
}
// 2^k where the low bits of the lanes are those of the integer k.
inline Vec exp2_of_low_bits(Vec a) { return exp2_of_integers(_mm512_castps_si512(a)); }
inline Mask in_range(Vec v, Vec low, Vec high) {
  return _mm512_cmp_ps_mask(v, low, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, high, _CMP_LE_OQ);
}
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Vec keep(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
// a - b in the lanes of m, a in the others.
inline Vec sub_where(Mask m, Vec a, Vec b) { return _mm512_mask_sub_ps(a, m, a, b); }
inline uint16_t to_bits(Mask m) { return m; }
inline Mask from_bits(uint16_t bits) { return bits; }
inline bool any_nan(Vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
inline void to_array(Vec v, float* out) { _mm512_storeu_ps(out, v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline void stream_fence() { _mm_sfence(); }
inline Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i narrow_half(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_half(uint16_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(v)); }
inline void stream_half(uint16_t* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_half(v)); }
inline Vec load_bfloat16(const uint16_t* p) {
  const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i index = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, index, packed));
}
// The upper halves of the lanes, rounded to nearest even: half a unit less one is added, one more where the last bit
// that stays is odd. One permutation gathers the halves.
inline __m256i narrow_bfloat16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_sub_epi32(rounded, odd, rounded, _mm512_set1_epi32(-1));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
}
inline void store_bfloat16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(v));
}
inline void stream_bfloat16(uint16_t* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(v));
}

// Small integers as floats and back; what is stored is a whole number, or saturates.
inline __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Vec load_int8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p))); }
inline Vec load_int16(const int16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline void store_int16(int16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
inline void store_int8(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

// Extra bits e of sixteen elements as 2^e and 2^-e, made of their exponents.
struct Extra {
  Vec parts;
  Vec fraction;
};
inline Extra load_extra(const uint8_t* p) {
  const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {exp2_of_integers(bits), exp2_of_integers(_mm512_sub_epi32(_mm512_setzero_si512(), bits))};
}

}  // namespace
