#pragma once

// What the VNNI and AMX kernels share: finishing the totals of a panel, expanding weights. Each includes its own copy
// (internal linkage).

#include <immintrin.h>

#include <cstdint>

#include "finish-inl.h"
#include "panels-inl.h"
#include "vector512.h"

namespace mixbit::runtime {
namespace {

// Multipliers of a panel, and totals of two rows of it to 32 bytes each.
struct PanelFinish {
  const Finish<Vector512>& finish;
  __m512 multiplier[2];
  __mmask32 channels;
  bool full;

  PanelFinish(const Finish<Vector512>& given, const ChannelData& data, int64_t valid)
      : finish(given),
        multiplier{_mm512_loadu_ps(data.multiplier), _mm512_loadu_ps(data.multiplier + 16)},
        channels(mask32(valid)),
        full(valid >= kPanel) {}

  void store(uint8_t* y, __m256i bytes) const {
    if (full) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), bytes);
    } else {
      _mm256_mask_storeu_epi8(y, channels, bytes);
    }
  }
  __m512i two_rows(const __m512i row0[2], const __m512i row1[2]) const {
    const __m512i mixed = finish.bytes(finish.rounded(row0[0], multiplier[0]), finish.rounded(row0[1], multiplier[1]),
                                       finish.rounded(row1[0], multiplier[0]), finish.rounded(row1[1], multiplier[1]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, mixed);
  }
  void pair(const __m512i row0[2], const __m512i row1[2], uint8_t* y0, uint8_t* y1) const {
    const __m512i rows = two_rows(row0, row1);
    store(y0, _mm512_castsi512_si256(rows));
    store(y1, _mm512_extracti64x4_epi64(rows, 1));
  }
  void single(const __m512i row[2], uint8_t* y) const { store(y, _mm512_castsi512_si256(two_rows(row, row))); }
};

// bias - zero * sum of weights, modulo 2^32: what a total starts with.
inline __m512i offset_of(const ChannelData& data, int64_t first, int32_t zero) {
  return _mm512_sub_epi32(_mm512_loadu_si512(data.bias + first),
                          _mm512_mullo_epi32(_mm512_loadu_si512(data.weight_sum + first), _mm512_set1_epi32(zero)));
}

// Register g of four: weights of k 4 g ... 4 g + 3 of a step of 16 k, for half a panel.
template <int kWidth>
inline __m512i weights_of(const uint8_t* half, int g) {
  if constexpr (kWidth == 8) {
    return _mm512_loadu_si512(half + g * 128);
  } else if constexpr (kWidth == 4) {
    const __m512i fields = _mm512_loadu_si512(half + g / 2 * 128);
    return _mm512_and_si512(g % 2 == 0 ? fields : _mm512_srli_epi16(fields, 4), _mm512_set1_epi8(0x0f));
  } else {
    const __m512i fields = _mm512_loadu_si512(half);
    return _mm512_and_si512(_mm512_srli_epi16(fields, static_cast<unsigned>(2 * g)), _mm512_set1_epi8(0x03));
  }
}

}  // namespace
}  // namespace mixbit::runtime
