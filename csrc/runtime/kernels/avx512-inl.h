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
  // Four rows of the first 16 channels.
  __m512i four_halves(const __m512i rows[4]) const {
    const __m512i mixed = finish.bytes(finish.rounded(rows[0], multiplier[0]), finish.rounded(rows[1], multiplier[0]),
                                       finish.rounded(rows[2], multiplier[0]), finish.rounded(rows[3], multiplier[0]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, mixed);
  }
  void store_half(uint8_t* y, __m128i bytes) const {
    if (channels == 0xffff) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
    } else {
      _mm_mask_storeu_epi8(y, static_cast<__mmask16>(channels), bytes);
    }
  }
  void single(const __m512i row[2], uint8_t* y) const { store(y, _mm512_castsi512_si256(two_rows(row, row))); }
};

// bias - zero * sum of weights, modulo 2^32: what a total starts with.
inline __m512i offset_of(const ChannelData& data, int64_t first, int32_t zero) {
  return _mm512_sub_epi32(_mm512_loadu_si512(data.bias + first),
                          _mm512_mullo_epi32(_mm512_loadu_si512(data.weight_sum + first), _mm512_set1_epi32(zero)));
}

// Register g of four: weights of k 4 g ... 4 g + 3 of a step of 16 k, for half a panel; lower fields as they are
// stored.
template <int kWidth>
inline __m512i weights_of(const uint8_t* half, int g) {
  if constexpr (kWidth == 8) {
    return _mm512_loadu_si512(half + g * 128);
  } else {
    constexpr int kFields = 8 / kWidth;
    const int field = g % kFields;
    const __m512i shifted =
        _mm512_srli_epi16(_mm512_loadu_si512(half + g / kFields * 128), static_cast<unsigned>(field * kWidth));
    const __m512i value = _mm512_and_si512(shifted, _mm512_set1_epi8((1 << kWidth) - 1));
    if (field < kFields - 1) {
      return value;
    }
    const __m512i sign = _mm512_set1_epi8(1 << (kWidth - 1));
    return _mm512_sub_epi8(_mm512_xor_si512(value, sign), sign);
  }
}

// The same where they lie: times 2^(kWidth (g % fields)).
template <int kWidth>
inline __m512i weights_in_place(const uint8_t* half, int g) {
  if constexpr (kWidth == 8) {
    return _mm512_loadu_si512(half + g * 128);
  } else {
    constexpr int kFields = 8 / kWidth;
    const __m512i fields = _mm512_loadu_si512(half + g / kFields * 128);
    return _mm512_and_si512(fields, _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << (g % kFields * kWidth))));
  }
}

// Sum of the bytes of a row that meet lower fields.
template <int kWidth>
inline int32_t lower_sum(const uint8_t* p, int64_t n, bool flips) {
  const __mmask64 lower = kWidth == 4 ? 0x0f0f0f0f0f0f0f0f : 0x0fff0fff0fff0fff;
  const __m512i ones = _mm512_set1_epi8(1), flip = _mm512_set1_epi8(static_cast<char>(flips ? 0x80 : 0));
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 bytes = lower & mask64(n - i);
    const __m512i flipped = _mm512_xor_si512(_mm512_maskz_loadu_epi8(bytes, p + i), flip);
    sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_mov_epi8(bytes, flipped), ones);
  }
  return _mm512_reduce_add_epi32(sum);
}

// int8 codes of a panel [k / 4][channel][k % 4]: those of k from `depth` on become 0, up to `end`.
inline void clear_beyond(int64_t depth, int64_t end, uint8_t* codes) {
  for (int64_t k = depth > 0 ? depth / 4 * 4 : 0; k < end; k += 4) {
    const int64_t valid = depth > k ? depth - k : 0;
    const __m512i keep = _mm512_set1_epi32(valid >= 4 ? -1 : static_cast<int32_t>((uint32_t{1} << (8 * valid)) - 1));
    for (int half = 0; half < 2; ++half) {
      uint8_t* at = codes + k * kPanel + half * 64;
      _mm512_storeu_si512(at, _mm512_and_si512(_mm512_loadu_si512(at), keep));
    }
  }
}

// Up to this many k, the sums of few rows (see below) fit 32 bits however much too large they are: 2^16 products of at
// most 255 * 128 each.
constexpr int64_t kExactDepth = int64_t{1} << 18;

// kRows rows times a panel by dot products. Rows are unsigned bytes, or with kFlip signed ones that become unsigned by
// an offset of 128, which product.zero includes.
template <int kWidth, int kRows, bool kFlip>
void multiply_rows(const PanelProduct& product, int64_t first, const PanelFinish& finish) {
  constexpr int kStepBytes = 128 * kWidth / 2;  // of a panel in 16 k
  // Few rows: a sum for each of the four groups of a step, or the latency of the dot product would show. Weights then
  // stay where they lie, and the sums are shifted at the end.
  constexpr bool kFew = kRows <= 2;
  constexpr int kSums = kFew ? 4 : 1;
  __m512i total[kRows][2][kSums], sums[kRows][2];
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = product.a + (first + r) * product.stride;
    for (int t = 0; t < 2; ++t) {
      sums[r][t] = _mm512_setzero_si512();
      for (int s = 0; s < kSums; ++s) {
        total[r][t][s] = _mm512_setzero_si512();
      }
    }
  }
  const auto take_totals = [&] {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < 2; ++t) {
        for (int s = 0; s < kSums; ++s) {
          const unsigned shift = kFew && kWidth < 8 ? static_cast<unsigned>(s % (8 / kWidth) * kWidth) : 0;
          sums[r][t] = _mm512_add_epi32(sums[r][t], _mm512_srai_epi32(total[r][t][s], shift));
          total[r][t][s] = _mm512_setzero_si512();
        }
      }
    }
  };
  const uint8_t* codes = product.codes;
  for (int64_t k = 0; k < product.depth; k += 16, codes += kStepBytes) {
    if constexpr (kFew && kWidth < 8) {
      if (k != 0 && k % kExactDepth == 0) take_totals();
    }
    if constexpr (kFew) {
      // Few rows wait for their weights, which lie one after the other, those of the next panel too.
      for (int line = 0; line < kStepBytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + 4096 + line), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m512i w0 = kFew ? weights_in_place<kWidth>(codes, g) : weights_of<kWidth>(codes, g);
      const __m512i w1 = kFew ? weights_in_place<kWidth>(codes + 64, g) : weights_of<kWidth>(codes + 64, g);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        uint32_t four;
        std::memcpy(&four, rows[r] + k + 4 * g, 4);
        const __m512i values = _mm512_set1_epi32(static_cast<int32_t>(kFlip ? four ^ 0x80808080u : four));
        constexpr int kLast = kSums - 1;
        total[r][0][g & kLast] = _mm512_dpbusd_epi32(total[r][0][g & kLast], values, w0);
        total[r][1][g & kLast] = _mm512_dpbusd_epi32(total[r][1][g & kLast], values, w1);
      }
    }
  }
  take_totals();
  for (int r = 0; r < kRows; ++r) {
    const __m512i surplus = kWidth == 8
                                ? _mm512_setzero_si512()
                                : _mm512_set1_epi32(lower_sum<kWidth>(rows[r], product.depth, kFlip) << (kWidth - 1));
    for (int t = 0; t < 2; ++t) {
      sums[r][t] =
          _mm512_add_epi32(sums[r][t], _mm512_sub_epi32(offset_of(product.data, 16 * t, product.zero), surplus));
    }
  }
  uint8_t* y = product.y + first * product.y_stride;
  for (int r = 0; r + 1 < kRows; r += 2) {
    finish.pair(sums[r], sums[r + 1], y + r * product.y_stride, y + (r + 1) * product.y_stride);
  }
  if (kRows % 2 != 0) {
    finish.single(sums[kRows - 1], y + (kRows - 1) * product.y_stride);
  }
}

}  // namespace
}  // namespace mixbit::runtime
