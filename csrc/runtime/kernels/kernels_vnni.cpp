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

void multiply_vnni(int32_t width, const PanelProduct& product, int64_t rows, const PanelFinish& finish) {
  if (width == 8) {
    multiply_width<8>(product, rows, finish);
  } else if (width == 4) {
    multiply_width<4>(product, rows, finish);
  } else {
    multiply_width<2>(product, rows, finish);
  }
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
  walk_panels<Vector512>(c, packed, x, y, part, scratch,
                         [&](int32_t width, const PanelProduct& product, int64_t rows, int64_t valid) {
                           multiply_vnni(width, product, rows, PanelFinish(finish, product.data, valid));
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
  return windows_bytes(c);
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
