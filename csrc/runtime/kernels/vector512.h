#pragma once

// Vectors of 512 bits: AVX-512 (F, DQ, BW, VL, VNNI).

#include <immintrin.h>

#include <cstdint>

namespace mixbit::runtime {
namespace {

// The lower n bits.
inline __mmask64 mask64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
inline __mmask16 mask16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask32 mask32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

struct Vector512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int64_t kBytes = 64;

  static Int zero() { return _mm512_setzero_si512(); }
  static Int all8(uint8_t v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static Int all16(int16_t v) { return _mm512_set1_epi16(v); }
  static Float all_float(float v) { return _mm512_set1_ps(v); }
  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static Float load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_first(uint8_t* p, int64_t n, Int v) { _mm512_mask_storeu_epi8(p, mask64(n), v); }
  static Int exclusive_or(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static Int unpack_low8(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static Int unpack_high8(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static Int unpack_low16(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static Int unpack_high16(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
  // Sums of four products of unsigned and signed bytes.
  static Int dot(Int sum, Int a, Int b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Int to_int(Float v) { return _mm512_cvtps_epi32(v); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Int pack32(Int a, Int b) { return _mm512_packs_epi32(a, b); }
  static Int pack_signed16(Int a, Int b) { return _mm512_packs_epi16(a, b); }
  static Int pack_unsigned16(Int a, Int b) { return _mm512_packus_epi16(a, b); }
  static Int add_saturated16(Int a, Int b) { return _mm512_adds_epi16(a, b); }
  static Int max_signed8(Int a, Int b) { return _mm512_max_epi8(a, b); }
  static Int max_unsigned8(Int a, Int b) { return _mm512_max_epu8(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where a is NaN
  static Int all32(int32_t v) { return _mm512_set1_epi32(v); }
  static Int add32(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int sub32(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static void store(void* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Int add_saturated_unsigned8(Int a, Int b) { return _mm512_adds_epu8(a, b); }
  // In each 128 bits: byte b[i] % 16 of a, 0 where the top bit of b[i] is set.
  static Int shuffle8(Int a, Int b) { return _mm512_shuffle_epi8(a, b); }
  static Int repeat16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  // The first n elements, zeros behind.
  static Int load_first(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8(mask64(n), p); }
  static Float load_floats_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask16(n), p); }
  static void store_floats_first(float* p, int64_t n, Float v) { _mm512_mask_storeu_ps(p, mask16(n), v); }
  // Up to kBytes / 4 codes as 32-bit integers, and back (the lowest byte of each).
  static Int load_codes(const uint8_t* p, int64_t n, bool is_signed) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask16(n), p);
    return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
  }
  static void store_codes(uint8_t* p, int64_t n, Int v) { _mm_mask_storeu_epi8(p, mask16(n), _mm512_cvtepi32_epi8(v)); }
};

}  // namespace
}  // namespace mixbit::runtime
