#pragma once

// Vectors of 256 bits: AVX2.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mixbit::runtime {
namespace {

struct Vector256 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int64_t kBytes = 32;

  static Int zero() { return _mm256_setzero_si256(); }
  static Int all8(uint8_t v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static Int all16(int16_t v) { return _mm256_set1_epi16(v); }
  static Int all32(int32_t v) { return _mm256_set1_epi32(v); }
  static Float all_float(float v) { return _mm256_set1_ps(v); }
  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Float load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Int repeat16(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }

  // The first n elements, zeros behind.
  static Int load_first(const uint8_t* p, int64_t n) {
    if (n >= 32) return load(p);
    alignas(32) uint8_t bytes[32] = {};
    std::memcpy(bytes, p, static_cast<size_t>(n));
    return load(bytes);
  }
  static void store_first(uint8_t* p, int64_t n, Int v) {
    if (n >= 32) {
      store(p, v);
      return;
    }
    alignas(32) uint8_t bytes[32];
    store(bytes, v);
    std::memcpy(p, bytes, static_cast<size_t>(n));
  }
  static Float load_floats_first(const float* p, int64_t n) {
    if (n >= 8) return load_floats(p);
    alignas(32) float values[8] = {};
    std::memcpy(values, p, static_cast<size_t>(n) * 4);
    return load_floats(values);
  }
  static void store_floats_first(float* p, int64_t n, Float v) {
    alignas(32) float values[8];
    _mm256_store_ps(values, v);
    std::memcpy(p, values, static_cast<size_t>(n < 8 ? n : 8) * 4);
  }
  // Up to kBytes / 4 codes as 32-bit integers, and back (codes of one byte).
  static Int load_codes(const uint8_t* p, int64_t n, bool is_signed) {
    uint64_t eight = 0;
    std::memcpy(&eight, p, static_cast<size_t>(n < 8 ? n : 8));
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(eight));
    return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
  }
  static void store_codes(uint8_t* p, int64_t n, Int v) {
    const __m256i low = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));  // the lowest bytes of four, repeated
    const uint64_t first = static_cast<uint32_t>(_mm256_extract_epi32(low, 0));
    const uint64_t eight = first | static_cast<uint64_t>(static_cast<uint32_t>(_mm256_extract_epi32(low, 4))) << 32;
    std::memcpy(p, &eight, static_cast<size_t>(n < 8 ? n : 8));
  }

  static Int exclusive_or(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
  static Int unpack_low8(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static Int unpack_high8(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static Int unpack_low16(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static Int unpack_high16(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
  // Sums of four products of unsigned and signed bytes, in 16-bit factors: nothing saturates.
  static Int dot(Int sum, Int a, Int b) {
    const Int even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), even_signed(b));
    const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
  static Int even_signed(Int bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Int to_int(Float v) { return _mm256_cvtps_epi32(v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }  // b where a is NaN
  static Int add32(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int sub32(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int pack32(Int a, Int b) { return _mm256_packs_epi32(a, b); }
  static Int pack_signed16(Int a, Int b) { return _mm256_packs_epi16(a, b); }
  static Int pack_unsigned16(Int a, Int b) { return _mm256_packus_epi16(a, b); }
  static Int add_saturated16(Int a, Int b) { return _mm256_adds_epi16(a, b); }
  static Int add_saturated_unsigned8(Int a, Int b) { return _mm256_adds_epu8(a, b); }
  static Int max_signed8(Int a, Int b) { return _mm256_max_epi8(a, b); }
  static Int max_unsigned8(Int a, Int b) { return _mm256_max_epu8(a, b); }
  // In each 128 bits: byte b[i] % 16 of a, 0 where the top bit of b[i] is set.
  static Int shuffle8(Int a, Int b) { return _mm256_shuffle_epi8(a, b); }
};

}  // namespace
}  // namespace mixbit::runtime
