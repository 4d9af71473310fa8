// AVX-512 with VNNI: products by 4-way dot products of unsigned and signed bytes; signed activations become unsigned
// ones by an offset of 128. What AMX has no use for (depthwise, few rows, element-wise) is taken from here.

#include "avx512-inl.h"
#include "depthwise-inl.h"
#include "elementwise-inl.h"
#include "tables.h"
#include "vector256.h"

namespace mixbit::runtime {
namespace {

// ----------------------------------------------------------------------------------------------------------- products

template <int kWidth>
void multiply_width(const PanelProduct& product, int64_t rows, const PanelFinish& finish) {
  int64_t r = 0;
  for (; r + 12 <= rows; r += 12) multiply_rows<kWidth, 12, false>(product, r, finish);
  if (r + 6 <= rows) {
    multiply_rows<kWidth, 6, false>(product, r, finish);
    r += 6;
  }
  if (r + 4 <= rows) {
    multiply_rows<kWidth, 4, false>(product, r, finish);
    r += 4;
  }
  for (; r + 2 <= rows; r += 2) multiply_rows<kWidth, 2, false>(product, r, finish);
  if (r < rows) multiply_rows<kWidth, 1, false>(product, r, finish);
}

// From this many rows on a panel of fields is expanded before it is multiplied.
constexpr int64_t kManyRows = 24;

template <int kWidth>
void expand_panel(const uint8_t* codes, int64_t depth, int64_t padded_depth, uint8_t* to) {
  const __m512i offset = _mm512_set1_epi8(1 << (kWidth - 1));
  constexpr int kFields = 8 / kWidth, kStepBytes = 128 * kWidth / 2;
  uint8_t* out = to;
  for (int64_t k = 0; k < padded_depth; k += 16, codes += kStepBytes) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g, out += 128) {
      for (int half = 0; half < 2; ++half) {
        const __m512i stored = weights_of<kWidth>(codes + 64 * half, g);
        _mm512_storeu_si512(out + 64 * half, g % kFields < kFields - 1 ? _mm512_sub_epi8(stored, offset) : stored);
      }
    }
  }
  clear_beyond(depth, padded_depth, to);
}

// `expanded`: room for a panel of int8 codes.
template <int kWidth>
void multiply_fields(PanelProduct product, int64_t padded_depth, int64_t rows, const PanelFinish& finish,
                     uint8_t* expanded) {
  if (rows < kManyRows) {
    multiply_width<kWidth>(product, rows, finish);
    return;
  }
  expand_panel<kWidth>(product.codes, product.depth, padded_depth, expanded);
  product.codes = expanded;
  multiply_width<8>(product, rows, finish);
}

// ---------------------------------------------------------------------------------------------------------- depthwise

// Half as wide, for the last channels.
struct NarrowVector : Vector256 {
  static void store_first(uint8_t* p, int64_t n, Int v) { _mm256_mask_storeu_epi8(p, mask32(n), v); }
  static Int dot(Int sum, Int a, Int b) { return _mm256_dpbusd_epi32(sum, a, b); }
};

void convolve_depthwise(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                        void* memory) {
  const PanelLayout layout = depthwise_layout(c, 64);
  const DepthwiseScratch scratch(layout, memory);
  prepare_depthwise(c, layout, packed, part, scratch);
  Part wide = part, narrow = part;
  wide.last_channel = layout.channels / 64 * 64;
  if (wide.last_channel > part.last_channel) wide.last_channel = part.last_channel;
  narrow.first_channel = wide.last_channel;
  if (wide.first_channel < wide.last_channel) {
    depthwise_channels<Vector512>(c, layout, packed, x, y, wide, scratch);
  }
  if (narrow.first_channel < narrow.last_channel) {
    depthwise_channels<NarrowVector>(c, layout, packed, x, y, narrow, scratch);
  }
}

void convolve_panels(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                     void* scratch) {
  const Finish<Vector512> finish(c.y);
  const int64_t padded_depth = panel_layout(c).depth;
  uint8_t* expanded = static_cast<uint8_t*>(scratch) + round_up(windows_bytes(c), kAlignment);
  walk_panels<Vector512>(c, packed, x, y, part, scratch,
                         [&](int32_t width, const PanelProduct& product, int64_t rows, int64_t valid) {
                           const PanelFinish panel_finish(finish, product.data, valid);
                           if (width == 8) {
                             multiply_width<8>(product, rows, panel_finish);
                           } else if (width == 4) {
                             multiply_fields<4>(product, padded_depth, rows, panel_finish, expanded);
                           } else {
                             multiply_fields<2>(product, padded_depth, rows, panel_finish, expanded);
                           }
                         });
}

}  // namespace

namespace vnni {

int64_t packed_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.packed_bytes(c);
  }
  return c.depthwise() ? depthwise_layout(c, 64).bytes : panel_layout(c).bytes;
}

void pack(const Convolution& c, const Weights& weights, void* packed) {
  if (!fits_simd(c)) {
    kKernels_scalar.pack(c, weights, packed);
  } else if (c.depthwise()) {
    pack_depthwise(c, weights, packed, 64);
  } else {
    pack_panels(c, weights, packed);
  }
}

int64_t scratch_bytes(const Convolution& c) {
  if (!fits_simd(c)) {
    return kKernels_scalar.scratch_bytes(c);
  }
  if (c.depthwise()) {
    return DepthwiseScratch(depthwise_layout(c, 64), nullptr).bytes;
  }
  const PanelLayout layout = panel_layout(c);
  return round_up(windows_bytes(c), kAlignment) + (layout.width == 8 ? 0 : layout.depth * kPanel);
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
  add_codes<Vector512>(a, a_grid, b, b_grid, y, y_grid, n);
}
void quantize(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n) {
  quantize_values<Vector512>(x, y, y_grid, n);
}
void quantize_image(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels) {
  quantize_planes<Vector512>(x, y, y_grid, channels, pixels);
}
void dequantize(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n) {
  dequantize_codes<Vector512>(x, x_grid, y, n);
}
void average_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  average_windows<Vector512>(pool, x, y, first, last);
}
void max_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  largest_of_windows<Vector512>(pool, x, y, first, last);
}
void lookup(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n) { look_up<Vector512>(table, x, y, n); }

}  // namespace vnni

const KernelTable kKernels_vnni = {Isa::kVnni,     vnni::packed_bytes, vnni::pack,           vnni::scratch_bytes,
                                   vnni::convolve, vnni::average_pool, vnni::max_pool,       vnni::add,
                                   vnni::lookup,   vnni::quantize,     vnni::quantize_image, vnni::dequantize};

}  // namespace mixbit::runtime
