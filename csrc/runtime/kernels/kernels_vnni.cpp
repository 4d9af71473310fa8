// AVX-512 with VNNI: products by 4-way dot products of unsigned and signed bytes; signed activations become unsigned
// ones by an offset of 128. What AMX has no use for (depthwise, few rows, element-wise) is taken from here.

#include "avx512-inl.h"
#include "tables.h"

namespace mixbit::runtime {
namespace {

// ----------------------------------------------------------------------------------------------------------- products

// Sum of n bytes.
inline int32_t sum_bytes(const uint8_t* p, int64_t n) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask64(n - i), p + i), ones);
  }
  return _mm512_reduce_add_epi32(sum);
}

template <int kWidth, int kRows>
void multiply_rows(const PanelProduct& product, int64_t first, const PanelFinish& finish) {
  constexpr int kStepBytes = 128 * kWidth / 2;  // of a panel in 16 k
  // Few rows: a sum for each of the four groups of a step, or the latency of the dot product would show.
  constexpr int kSums = kRows <= 2 ? 4 : 1;
  __m512i total[kRows][2][kSums];
  const __m512i offset[2] = {offset_of(product.data, 0, product.zero), offset_of(product.data, 16, product.zero)};
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = product.a + (first + r) * product.stride;
    // Fields are codes + 2^(width - 1).
    const __m512i shift = kWidth == 8 ? _mm512_setzero_si512()
                                      : _mm512_set1_epi32(sum_bytes(rows[r], product.depth) * (1 << (kWidth - 1)));
    for (int t = 0; t < 2; ++t) {
      for (int s = 0; s < kSums; ++s) {
        total[r][t][s] = s == 0 ? _mm512_sub_epi32(offset[t], shift) : _mm512_setzero_si512();
      }
    }
  }
  const uint8_t* codes = product.codes;
  for (int64_t k = 0; k < product.depth; k += 16, codes += kStepBytes) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m512i w0 = weights_of<kWidth>(codes, g), w1 = weights_of<kWidth>(codes + 64, g);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, rows[r] + k + 4 * g, 4);
        const __m512i values = _mm512_set1_epi32(four);
        constexpr int kLast = kSums - 1;
        total[r][0][g & kLast] = _mm512_dpbusd_epi32(total[r][0][g & kLast], values, w0);
        total[r][1][g & kLast] = _mm512_dpbusd_epi32(total[r][1][g & kLast], values, w1);
      }
    }
  }
  __m512i sums[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < 2; ++t) {
      sums[r][t] = total[r][t][0];
      for (int s = 1; s < kSums; ++s) {
        sums[r][t] = _mm512_add_epi32(sums[r][t], total[r][t][s]);
      }
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

template <int kWidth>
void multiply_width(const PanelProduct& product, int64_t rows, const PanelFinish& finish) {
  int64_t r = 0;
  for (; r + 12 <= rows; r += 12) multiply_rows<kWidth, 12>(product, r, finish);
  if (r + 6 <= rows) {
    multiply_rows<kWidth, 6>(product, r, finish);
    r += 6;
  }
  if (r + 4 <= rows) {
    multiply_rows<kWidth, 4>(product, r, finish);
    r += 4;
  }
  for (; r + 2 <= rows; r += 2) multiply_rows<kWidth, 2>(product, r, finish);
  if (r < rows) multiply_rows<kWidth, 1>(product, r, finish);
}

void multiply_vnni(int32_t width, const PanelProduct& product, int64_t rows, const PanelFinish& finish) {
  if (width == 8) {
    multiply_width<8>(product, rows, finish);
  } else if (width == 4) {
    multiply_width<4>(product, rows, finish);
  } else {
    multiply_width<2>(product, rows, finish);
  }
}

// Whether a layer needs its windows copied: signed bytes become unsigned ones on the way.
inline bool copies_windows(const Convolution& c) { return c.x.is_signed || !reads_rows(c); }

// ---------------------------------------------------------------------------------------------------------- depthwise

// Scratch of a depthwise layer: a register of padding, then one pointer a tap.
int64_t depthwise_scratch(const Convolution& c) {
  return 64 + round_up(depthwise_layout(c).depth * static_cast<int64_t>(sizeof(void*)), kAlignment);
}

void convolve_depthwise(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                        void* scratch) {
  const PanelLayout layout = depthwise_layout(c);
  const Finish finish(c.y);
  auto* padding = static_cast<uint8_t*>(scratch);
  auto** taps = reinterpret_cast<const uint8_t**>(padding + 64);
  // Padding is told by pointers into `padding`, which stay where they are while channels advance.
  _mm512_storeu_si512(padding, _mm512_set1_epi8(static_cast<char>(byte_of(c.x.zero_point))));
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(c.x.is_signed ? 0x80 : 0));
  const __m512i zero = _mm512_set1_epi32(c.x.zero_point + (c.x.is_signed ? 128 : 0));
  const int64_t pixel = c.in_channels, line = c.in_width * pixel, count = c.taps();
  for (int64_t k = count; k < layout.depth; ++k) {
    taps[k] = nullptr;  // weights of 0
  }
  int64_t column = part.first_position % c.out_width, row = part.first_position / c.out_width % c.out_height;
  const uint8_t* image = x + part.first_position / (c.out_width * c.out_height) * c.in_height * line;
  for (int64_t p = part.first_position; p < part.last_position; ++p) {
    const uint8_t** tap = taps;
    for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
      const int64_t h = row * c.stride_height - c.pad_top + kh * c.dilation_height;
      for (int64_t kw = 0; kw < c.kernel_width; ++kw) {
        const int64_t w = column * c.stride_width - c.pad_left + kw * c.dilation_width;
        const bool inside = h >= 0 && h < c.in_height && w >= 0 && w < c.in_width;
        *tap++ = inside ? image + h * line + w * pixel : nullptr;
      }
    }
    for (int64_t channel = part.first_channel; channel < part.last_channel; channel += kDepthwiseBlock) {
      const uint8_t* weights = layout.codes(packed, channel / kDepthwiseBlock);
      const ChannelData data = layout.data(packed, channel);
      __m512i total[4];
      for (int q = 0; q < 4; ++q) {
        total[q] = _mm512_sub_epi32(_mm512_loadu_si512(data.bias + 16 * q),
                                    _mm512_mullo_epi32(_mm512_loadu_si512(data.weight_sum + 16 * q), zero));
      }
      for (int64_t k = 0; k < layout.depth; k += 4, weights += 4 * kDepthwiseBlock) {
        __m512i rows[4];
        for (int i = 0; i < 4; ++i) {
          const uint8_t* from = taps[k + i] != nullptr ? taps[k + i] + channel : padding;
          rows[i] = _mm512_xor_si512(_mm512_loadu_si512(from), flip);
        }
        const __m512i low01 = _mm512_unpacklo_epi8(rows[0], rows[1]), high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(rows[2], rows[3]), high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
        total[0] = _mm512_dpbusd_epi32(total[0], _mm512_unpacklo_epi16(low01, low23), _mm512_loadu_si512(weights));
        total[1] = _mm512_dpbusd_epi32(total[1], _mm512_unpackhi_epi16(low01, low23), _mm512_loadu_si512(weights + 64));
        total[2] =
            _mm512_dpbusd_epi32(total[2], _mm512_unpacklo_epi16(high01, high23), _mm512_loadu_si512(weights + 128));
        total[3] =
            _mm512_dpbusd_epi32(total[3], _mm512_unpackhi_epi16(high01, high23), _mm512_loadu_si512(weights + 192));
      }
      for (int q = 0; q < 4; ++q) {
        total[q] = finish.rounded(total[q], _mm512_loadu_ps(data.multiplier + 16 * q));
      }
      _mm512_mask_storeu_epi8(y + p * c.out_channels + channel, mask64(part.last_channel - channel),
                              finish.bytes(total[0], total[1], total[2], total[3]));
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

void convolve_panels(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                     void* scratch) {
  const PanelLayout layout = panel_layout(c);
  const Finish finish(c.y);
  const bool copies = copies_windows(c);
  const int64_t block = rows_of_block(layout), outputs = c.group_outputs();
  auto* windows = static_cast<uint8_t*>(scratch);
  for (int64_t first = part.first_position; first < part.last_position; first += block) {
    const int64_t rows = part.last_position - first < block ? part.last_position - first : block;
    for (int64_t group = part.first_channel / outputs; group * outputs < part.last_channel; ++group) {
      PanelProduct product = {};
      product.a = x + first * c.in_channels + group * c.group_inputs();
      product.stride = c.in_channels;
      if (copies) {
        fill_windows(c, x, group, first, rows, c.x.is_signed ? 0x80 : 0, windows, layout.depth);
        product.a = windows;
        product.stride = layout.depth;
      }
      product.depth = c.taps();
      product.zero = c.x.zero_point + (c.x.is_signed ? 128 : 0);
      product.y_stride = c.out_channels;
      const int64_t from = c.groups == 1 ? part.first_channel : 0;
      const int64_t to = c.groups == 1 ? part.last_channel : outputs;
      for (int64_t channel = from; channel < to; channel += kPanel) {
        const int64_t panel = group * layout.panels_of_group + channel / kPanel;
        product.codes = layout.codes(packed, panel);
        product.data = layout.data(packed, panel * kPanel);
        product.y = y + first * c.out_channels + group * outputs + channel;
        multiply_vnni(layout.width, product, rows, PanelFinish(finish, product.data, to - channel));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- element-wise

inline __m512i load_codes(const uint8_t* p, bool is_signed, __mmask16 lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, p);
  return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
}

inline __m512 real_of(__m512i codes, const CodeGrid& grid) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(grid.zero_point))),
                       _mm512_set1_ps(grid.scale));
}

// code_of of 16 values, as bytes.
inline __m128i bytes_of(__m512 v, const CodeGrid& y) {
  v = _mm512_max_ps(v, _mm512_set1_ps(static_cast<float>(y.low - y.zero_point)));  // the second where v is NaN
  v = _mm512_min_ps(v, _mm512_set1_ps(static_cast<float>(y.high - y.zero_point)));
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(y.zero_point)));
}

// Calls f(pixel) for the pixels of output position p that lie inside the image; returns their number.
template <typename F>
int32_t for_window(const Pool& pool, const uint8_t* x, int64_t p, const F& f) {
  const int64_t column = p % pool.out_width, row = p / pool.out_width % pool.out_height;
  const uint8_t* image = x + p / (pool.out_width * pool.out_height) * pool.in_height * pool.in_width * pool.channels;
  int32_t inside = 0;
  for (int64_t kh = 0; kh < pool.kernel_height; ++kh) {
    const int64_t h = row * pool.stride_height - pool.pad_top + kh * pool.dilation_height;
    for (int64_t kw = 0; kw < pool.kernel_width; ++kw) {
      const int64_t w = column * pool.stride_width - pool.pad_left + kw * pool.dilation_width;
      if (h >= 0 && h < pool.in_height && w >= 0 && w < pool.in_width) {
        f(image + (h * pool.in_width + w) * pool.channels);
        ++inside;
      }
    }
  }
  return inside;
}

}  // namespace

namespace vnni {

int64_t packed_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.packed_bytes(c);
  }
  return c.depthwise() ? depthwise_layout(c).bytes : panel_layout(c).bytes;
}

void pack(const Convolution& c, const Weights& weights, void* packed) {
  if (!fits_simd(c)) {
    kKernels_scalar.pack(c, weights, packed);
  } else if (c.depthwise()) {
    pack_depthwise(c, weights, packed, 4);
  } else {
    pack_panels(c, weights, packed);
  }
}

int64_t scratch_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.scratch_bytes(c);
  }
  if (c.depthwise()) {
    return depthwise_scratch(c);
  }
  const PanelLayout layout = panel_layout(c);
  return copies_windows(c) ? rows_of_block(layout) * layout.depth + 64 : 0;
}

void convolve(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part, void* scratch) {
  if (part.first_position >= part.last_position || part.first_channel >= part.last_channel) {
    return;
  }
  if (!fits_simd(c)) {
    kKernels_scalar.convolve(c, packed, x, y, part, scratch);
  } else if (c.depthwise()) {
    convolve_depthwise(c, packed, x, y, part, scratch);
  } else {
    convolve_panels(c, packed, x, y, part, scratch);
  }
}

void add(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
         const CodeGrid& y_grid, int64_t n) {
  const __m512 scale = _mm512_set1_ps(y_grid.scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = mask16(n - i);
    const __m512 sum = _mm512_add_ps(real_of(load_codes(a + i, a_grid.is_signed, lanes), a_grid),
                                     real_of(load_codes(b + i, b_grid.is_signed, lanes), b_grid));
    _mm_mask_storeu_epi8(y + i, lanes, bytes_of(_mm512_div_ps(sum, scale), y_grid));
  }
}

void quantize(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n) {
  const __m512 scale = _mm512_set1_ps(y_grid.scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = mask16(n - i);
    _mm_mask_storeu_epi8(y + i, lanes, bytes_of(_mm512_div_ps(_mm512_maskz_loadu_ps(lanes, x + i), scale), y_grid));
  }
}

// Up to 4 channels (images) are interleaved in registers; more are quantized plane by plane.
void quantize_image(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels) {
  const __m512 scale = _mm512_set1_ps(y_grid.scale);
  if (channels == 1) {
    quantize(x, y, y_grid, pixels);
    return;
  }
  alignas(64) uint8_t codes[4][16];
  for (int64_t first = 0; first < channels; first += 4) {
    const int64_t count = channels - first < 4 ? channels - first : 4;
    for (int64_t p = 0; p < pixels; p += 16) {
      const __mmask16 lanes = mask16(pixels - p);
      for (int64_t c = 0; c < count; ++c) {
        const __m512 values = _mm512_maskz_loadu_ps(lanes, x + (first + c) * pixels + p);
        _mm_store_si128(reinterpret_cast<__m128i*>(codes[c]), bytes_of(_mm512_div_ps(values, scale), y_grid));
      }
      const int64_t valid = pixels - p < 16 ? pixels - p : 16;
      for (int64_t i = 0; i < valid; ++i) {
        for (int64_t c = 0; c < count; ++c) {
          y[(p + i) * channels + first + c] = codes[c][i];
        }
      }
    }
  }
}

void dequantize(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = mask16(n - i);
    _mm512_mask_storeu_ps(y + i, lanes, real_of(load_codes(x + i, x_grid.is_signed, lanes), x_grid));
  }
}

void average_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; c += 16) {
      const __mmask16 lanes = mask16(pool.channels - c);
      __m512i sum = _mm512_setzero_si512();
      int32_t n = for_window(pool, x, p, [&](const uint8_t* pixel) {
        sum = _mm512_add_epi32(sum, load_codes(pixel + c, pool.x.is_signed, lanes));
      });
      sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(n * pool.x.zero_point));
      if (pool.count_include_pad) {
        n = static_cast<int32_t>(pool.kernel_height * pool.kernel_width);
      }
      const __m512 multiplier = _mm512_set1_ps(average_multiplier(pool.x.scale, pool.y.scale, n));
      _mm_mask_storeu_epi8(y + p * pool.channels + c, lanes,
                           bytes_of(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier), pool.y));
    }
  }
}

void max_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  const __m512i lowest = _mm512_set1_epi8(static_cast<char>(pool.x.is_signed ? -128 : 0));
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; c += 64) {
      const __mmask64 lanes = mask64(pool.channels - c);
      __m512i largest = lowest;
      for_window(pool, x, p, [&](const uint8_t* pixel) {
        const __m512i codes = _mm512_maskz_loadu_epi8(lanes, pixel + c);
        largest = pool.x.is_signed ? _mm512_max_epi8(largest, codes) : _mm512_max_epu8(largest, codes);
      });
      _mm512_mask_storeu_epi8(y + p * pool.channels + c, lanes, largest);
    }
  }
}

// Sixteen shuffles, one for each upper half of an index.
void lookup(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n) {
  if (n <= 0) {
    return;
  }
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) {
    rows[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
  }
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 lanes = mask64(n - i);
    const __m512i index = _mm512_maskz_loadu_epi8(lanes, x + i);
    __m512i result = _mm512_setzero_si512();
    for (int r = 0; r < 16; ++r) {
      // The shuffle yields 0 where the top bit is set: here wherever the upper half of the index is not r.
      const __m512i own = _mm512_xor_si512(index, _mm512_set1_epi8(static_cast<char>(r << 4)));
      const __m512i here = _mm512_adds_epu8(own, _mm512_set1_epi8(0x70));
      result = _mm512_or_si512(result, _mm512_shuffle_epi8(rows[r], here));
    }
    _mm512_mask_storeu_epi8(y + i, lanes, result);
  }
}

}  // namespace vnni

const KernelTable kKernels_vnni = {Isa::kVnni,     vnni::packed_bytes, vnni::pack,           vnni::scratch_bytes,
                                   vnni::convolve, vnni::average_pool, vnni::max_pool,       vnni::add,
                                   vnni::lookup,   vnni::quantize,     vnni::quantize_image, vnni::dequantize};

}  // namespace mixbit::runtime
