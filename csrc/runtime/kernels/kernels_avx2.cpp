// AVX2. Products of 8-bit codes are made in 16-bit factors, since sums of two of them do not fit 16 bits; fields of 4
// and 2 bits do.

#include "depthwise-inl.h"
#include "elementwise-inl.h"
#include "finish-inl.h"
#include "panels-inl.h"
#include "tables.h"
#include "vector256.h"

namespace mixbit::runtime {
namespace {

constexpr int64_t kHalf = 16;  // channels at a time

// Sum of the bytes of a row that meet lower fields.
template <int kWidth>
inline int32_t lower_sum(const uint8_t* p, int64_t n) {
  constexpr int kFields = 8 / kWidth;
  const __m256i lower = kWidth == 4 ? _mm256_set1_epi64x(0xffffffff) : _mm256_setr_epi32(-1, -1, -1, 0, -1, -1, -1, 0);
  __m256i sums = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_and_si256(Vector256::load(p + i), lower);
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
  }
  alignas(32) int64_t parts[4];
  Vector256::store(parts, sums);
  int64_t sum = parts[0] + parts[1] + parts[2] + parts[3];
  for (; i < n; ++i) {
    sum += i / 4 % kFields < kFields - 1 ? p[i] : 0;
  }
  return static_cast<int32_t>(sum);
}

// Weights of k 4 g ... 4 g + 3 of a step of 16 k, for eight channels; lower fields as they are stored.
template <int kWidth>
inline __m256i weights_of(const uint8_t* codes, int g) {
  if constexpr (kWidth == 8) {
    return Vector256::load(codes + g * 128);
  } else {
    constexpr int kFields = 8 / kWidth;
    const int field = g % kFields;
    const __m256i shifted = _mm256_srli_epi16(Vector256::load(codes + g / kFields * 128), field * kWidth);
    const __m256i value = _mm256_and_si256(shifted, _mm256_set1_epi8((1 << kWidth) - 1));
    if (field < kFields - 1) {
      return value;
    }
    const __m256i sign = _mm256_set1_epi8(1 << (kWidth - 1));
    return _mm256_sub_epi8(_mm256_xor_si256(value, sign), sign);
  }
}

struct HalfFinish {
  const Finish<Vector256>& finish;
  __m256 multiplier[2];
  int64_t valid;

  void store(uint8_t* y, __m128i bytes) const {
    if (valid >= kHalf) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
      return;
    }
    alignas(16) uint8_t copy[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(copy), bytes);
    std::memcpy(y, copy, static_cast<size_t>(valid));
  }
  __m256i two_rows(const __m256i row0[2], const __m256i row1[2]) const {
    const __m256i mixed = finish.bytes(finish.rounded(row0[0], multiplier[0]), finish.rounded(row0[1], multiplier[1]),
                                       finish.rounded(row1[0], multiplier[0]), finish.rounded(row1[1], multiplier[1]));
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
};

template <int kWidth, int kRows>
void multiply_rows(const PanelProduct& product, int64_t first, int64_t half, const HalfFinish& finish) {
  constexpr int kStepBytes = 128 * kWidth / 2;  // of a panel in 16 k
  __m256i total[kRows][2];
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = product.a + (first + r) * product.stride;
    int32_t surplus = 0;
    if constexpr (kWidth < 8) {
      surplus = lower_sum<kWidth>(rows[r], product.depth) << (kWidth - 1);
    }
    for (int t = 0; t < 2; ++t) {
      const int64_t at = half * kHalf + 8 * t;
      const __m256i sums =
          _mm256_mullo_epi32(Vector256::load(product.data.weight_sum + at), _mm256_set1_epi32(product.zero));
      total[r][t] =
          Vector256::sub32(Vector256::sub32(Vector256::load(product.data.bias + at), sums), _mm256_set1_epi32(surplus));
    }
  }
  const __m256i low_byte = _mm256_set1_epi16(0xff), ones = _mm256_set1_epi16(1);
  const uint8_t* codes = product.codes + half * 64;
  for (int64_t k = 0; k < product.depth; k += 16, codes += kStepBytes) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m256i w[2] = {weights_of<kWidth>(codes, g), weights_of<kWidth>(codes + 32, g)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, rows[r] + k + 4 * g, 4);
        const __m256i values = _mm256_set1_epi32(four);
        if constexpr (kWidth == 8) {
          const __m256i even = _mm256_and_si256(values, low_byte), odd = _mm256_srli_epi16(values, 8);
          for (int t = 0; t < 2; ++t) {
            total[r][t] = _mm256_add_epi32(total[r][t], _mm256_madd_epi16(even, Vector256::even_signed(w[t])));
            total[r][t] = _mm256_add_epi32(total[r][t], _mm256_madd_epi16(odd, _mm256_srai_epi16(w[t], 8)));
          }
        } else {
          for (int t = 0; t < 2; ++t) {
            const __m256i pairs = _mm256_maddubs_epi16(values, w[t]);  // at most 2 * 255 * 15
            total[r][t] = _mm256_add_epi32(total[r][t], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
  }
  uint8_t* y = product.y + first * product.y_stride + half * kHalf;
  for (int r = 0; r < kRows; r += 2) {
    const int other = r + 1 < kRows ? r + 1 : r;
    const __m256i bytes = finish.two_rows(total[r], total[other]);
    finish.store(y + r * product.y_stride, _mm256_castsi256_si128(bytes));
    if (other != r) {
      finish.store(y + other * product.y_stride, _mm256_extracti128_si256(bytes, 1));
    }
  }
}

template <int kWidth>
void multiply_width(const PanelProduct& product, int64_t rows, int64_t valid, const Finish<Vector256>& finish) {
  for (int64_t half = 0; half * kHalf < valid && half < 2; ++half) {
    const float* multiplier = product.data.multiplier + half * kHalf;
    const HalfFinish half_finish = {
        finish, {_mm256_loadu_ps(multiplier), _mm256_loadu_ps(multiplier + 8)}, valid - half * kHalf};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<kWidth, 4>(product, r, half, half_finish);
    if (r + 2 <= rows) {
      multiply_rows<kWidth, 2>(product, r, half, half_finish);
      r += 2;
    }
    if (r < rows) multiply_rows<kWidth, 1>(product, r, half, half_finish);
  }
}

void convolve_panels(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                     void* scratch) {
  const Finish<Vector256> finish(c.y);
  walk_panels<Vector256>(c, packed, x, y, part, scratch,
                         [&](int32_t width, const PanelProduct& product, int64_t rows, int64_t valid) {
                           if (width == 8) {
                             multiply_width<8>(product, rows, valid, finish);
                           } else if (width == 4) {
                             multiply_width<4>(product, rows, valid, finish);
                           } else {
                             multiply_width<2>(product, rows, valid, finish);
                           }
                         });
}

int64_t packed_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.packed_bytes(c);
  }
  return c.depthwise() ? depthwise_layout(c, 32).bytes : panel_layout(c).bytes;
}

void pack(const Convolution& c, const Weights& weights, void* packed) {
  if (!fits_simd(c)) {
    kKernels_scalar.pack(c, weights, packed);
  } else if (c.depthwise()) {
    pack_depthwise(c, weights, packed, 32);
  } else {
    pack_panels(c, weights, packed);
  }
}

int64_t scratch_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.scratch_bytes(c);
  }
  return c.depthwise() ? DepthwiseScratch(depthwise_layout(c, 32), nullptr).bytes : windows_bytes(c);
}

void convolve(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part, void* scratch) {
  if (part.first_position >= part.last_position || part.first_channel >= part.last_channel) {
    return;
  }
  if (!fits_simd(c)) {
    kKernels_scalar.convolve(c, packed, x, y, part, scratch);
  } else if (c.depthwise()) {
    const PanelLayout layout = depthwise_layout(c, 32);
    const DepthwiseScratch memory(layout, scratch);
    prepare_depthwise(c, layout, packed, part, memory);
    depthwise_channels<Vector256>(c, layout, packed, x, y, part, memory);
  } else {
    convolve_panels(c, packed, x, y, part, scratch);
  }
}

}  // namespace

const KernelTable kKernels_avx2 = {Isa::kAvx2,
                                   packed_bytes,
                                   pack,
                                   scratch_bytes,
                                   convolve,
                                   average_windows<Vector256>,
                                   largest_of_windows<Vector256>,
                                   add_codes<Vector256>,
                                   look_up<Vector256>,
                                   quantize_values<Vector256>,
                                   quantize_planes<Vector256>,
                                   dequantize_codes<Vector256>};

}  // namespace mixbit::runtime
