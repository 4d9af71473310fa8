#pragma once

// What the VNNI and AMX kernels share: finishing totals, windows as rows, expanding weights. Each includes its own copy
// (internal linkage).

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "panels.h"

namespace mixbit::runtime {
namespace {

// ---------------------------------------------------------------------------------------------------------- finishing

// Totals to bytes: clamped above in fp32 (where a conversion would overflow), below by saturation and in bytes.
struct Finish {
  __m512 largest;      // high - zero_point
  __m512i zero_point;  // 16 bits
  __m512i low;         // 8 bits
  bool is_signed;

  explicit Finish(const CodeGrid& y)
      : largest(_mm512_set1_ps(static_cast<float>(y.high - y.zero_point))),
        zero_point(_mm512_set1_epi16(static_cast<int16_t>(y.zero_point))),
        low(_mm512_set1_epi8(static_cast<char>(y.low))),
        is_signed(y.is_signed) {}

  __m512i rounded(__m512i total, __m512 multiplier) const {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(total), multiplier);
    return _mm512_cvtps_epi32(_mm512_min_ps(scaled, largest));
  }
  // Four registers of rounded values; lane l of the result has dword l of a, b, c, d.
  __m512i bytes(__m512i a, __m512i b, __m512i c, __m512i d) const {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero_point);
    const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero_point);
    return is_signed ? _mm512_max_epi8(_mm512_packs_epi16(ab, cd), low)
                     : _mm512_max_epu8(_mm512_packus_epi16(ab, cd), low);
  }
};

// The lower n bits.
inline __mmask64 mask64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
inline __mmask16 mask16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask32 mask32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

// Multipliers of a panel, and totals of two rows of it to 32 bytes each.
struct PanelFinish {
  const Finish& finish;
  __m512 multiplier[2];
  __mmask32 channels;
  bool full;

  PanelFinish(const Finish& given, const ChannelData& data, int64_t valid)
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

// ------------------------------------------------------------------------------------------------------------ windows

// Copies n bytes, changed by XOR; writes up to 63 bytes too many and reads as many.
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t n, __m512i flip) {
  if (n <= 16) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), _mm512_castsi512_si128(flip)));
    return;
  }
  if (n <= 32) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to),
        _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), _mm512_castsi512_si256(flip)));
    return;
  }
  for (int64_t i = 0; i < n; i += 64) {
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), flip));
  }
}
inline void fill_bytes(uint8_t* to, int64_t n, __m512i value) {
  for (int64_t i = 0; i < n; i += 64) {
    _mm512_storeu_si512(to + i, value);
  }
}

// Rows of A for positions first ... first + rows - 1 of one group, `stride` bytes apart, each byte changed by `flip`;
// writes up to 64 bytes behind the last row.
void fill_windows(const Convolution& c, const uint8_t* x, int64_t group, int64_t first, int64_t rows, uint8_t flip_byte,
                  uint8_t* panel, int64_t stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(flip_byte));
  const __m512i pad = _mm512_set1_epi8(static_cast<char>(byte_of(c.x.zero_point) ^ flip_byte));
  const int64_t inputs = c.group_inputs(), pixel = c.in_channels, line = c.in_width * pixel;
  int64_t column = first % c.out_width, row = first / c.out_width % c.out_height;
  const uint8_t* image = x + first / (c.out_width * c.out_height) * c.in_height * line + group * inputs;
  // A kernel row is one run of bytes where its pixels are neighbours.
  const bool runs = c.dilation_width == 1 && c.groups == 1;
  for (int64_t p = 0; p < rows; ++p) {
    uint8_t* to = panel + p * stride;
    const int64_t left = column * c.stride_width - c.pad_left;
    const int64_t top = row * c.stride_height - c.pad_top;
    for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
      const int64_t h = top + kh * c.dilation_height;
      if (h < 0 || h >= c.in_height) {
        fill_bytes(to, c.kernel_width * inputs, pad);
        to += c.kernel_width * inputs;
        continue;
      }
      const uint8_t* from = image + h * line;
      if (runs) {
        const int64_t before = left < 0 ? (-left < c.kernel_width ? -left : c.kernel_width) : 0;
        const int64_t beyond = left + c.kernel_width - c.in_width;
        const int64_t after = beyond > 0 ? (beyond < c.kernel_width ? beyond : c.kernel_width) : 0;
        const int64_t inside = c.kernel_width - before - after;
        if (before > 0) {
          fill_bytes(to, before * inputs, pad);
        }
        if (inside > 0) {
          copy_bytes(to + before * inputs, from + (left + before) * pixel, inside * inputs, flip);
        }
        if (after > 0) {
          fill_bytes(to + (c.kernel_width - after) * inputs, after * inputs, pad);
        }
        to += c.kernel_width * inputs;
        continue;
      }
      for (int64_t kw = 0; kw < c.kernel_width; ++kw, to += inputs) {
        const int64_t w = left + kw * c.dilation_width;
        if (w < 0 || w >= c.in_width) {
          fill_bytes(to, inputs, pad);
        } else {
          copy_bytes(to, from + w * pixel, inputs, flip);
        }
      }
    }
    if (++column == c.out_width) {
      column = 0;
      if (++row == c.out_height) {
        row = 0;
        image += c.in_height * line;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- products

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

struct PanelProduct {
  const uint8_t* a;  // rows, `stride` bytes apart; 15 bytes beyond the last k are read
  int64_t stride;
  int64_t depth;  // k without padding
  const uint8_t* codes;
  ChannelData data;
  int32_t zero;
  uint8_t* y;
  int64_t y_stride;
};

// Rows of windows kept at a time: about a quarter of the second-level cache, in steps of an AMX block.
inline int64_t rows_of_block(const PanelLayout& layout) {
  const int64_t rows = (int64_t{384} << 10) / layout.depth / 32 * 32;
  return rows < 32 ? 32 : rows > 256 ? 256 : rows;
}

}  // namespace
}  // namespace mixbit::runtime
