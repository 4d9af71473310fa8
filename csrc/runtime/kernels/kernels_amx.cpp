// AMX: tiles of 16 rows and 64 k, two by two. A few rows go to the dot products of VNNI.

#include "avx512-inl.h"
#include "tables.h"

namespace mixbit::runtime {
namespace {

// Fewer rows than this do not fill a tile well enough.
constexpr int64_t kFewRows = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scratch: windows, an expanded panel, totals of a block, offsets of a panel.
struct Scratch {
  uint8_t* windows;
  uint8_t* panel;
  int32_t* totals;   // [32][32]
  int32_t* offsets;  // [32]
  int64_t bytes;

  Scratch(const PanelLayout& layout, void* base) {
    auto* at = static_cast<uint8_t*>(base);
    int64_t size = 0;
    const auto take = [&](int64_t wanted) {
      uint8_t* taken = at == nullptr ? nullptr : at + size;
      size += round_up(wanted, kAlignment);
      return taken;
    };
    totals = reinterpret_cast<int32_t*>(take(32 * 32 * 4));
    offsets = reinterpret_cast<int32_t*>(take(32 * 4));
    panel = take(layout.width == 8 ? 0 : layout.depth * kPanel);
    windows = take(rows_of_block(layout) * layout.depth + 64);
    bytes = size;
  }
};

// A panel of 4- or 2-bit fields as int8 codes; k beyond `depth` become 0.
template <int kWidth>
void expand_panel(const PanelLayout& layout, int64_t depth, const uint8_t* codes, uint8_t* to) {
  const __m512i offset = _mm512_set1_epi8(1 << (kWidth - 1));
  constexpr int kStepBytes = 128 * kWidth / 2;
  for (int64_t k = 0; k < layout.depth; k += 16, codes += kStepBytes) {
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        _mm512_storeu_si512(to + k * kPanel + g * 128 + half * 64,
                            _mm512_sub_epi8(weights_of<kWidth>(codes + half * 64, g), offset));
      }
    }
  }
  for (int64_t k = depth / 4 * 4; k < layout.depth; k += 4) {
    const int64_t valid = depth > k ? depth - k : 0;
    const __m512i keep = _mm512_set1_epi32(static_cast<int32_t>((uint32_t{1} << (8 * valid)) - 1));
    for (int half = 0; half < 2; ++half) {
      uint8_t* at = to + k * kPanel + half * 64;
      _mm512_storeu_si512(at, _mm512_and_si512(_mm512_loadu_si512(at), keep));
    }
  }
}

// Totals of 16 or 32 rows (kTiles) and a panel: tiles 0 ... 3 are the sums, 4 and 5 rows, 6 and 7 weights.
template <bool kSigned, int kTiles>
inline void multiply_tiles(const uint8_t* a, int64_t stride, int64_t depth, const uint8_t* codes,
                           const int32_t* offsets, int32_t* totals) {
  // The compiler does not know that tile loads read memory.
  asm volatile("" ::: "memory");
  _tile_loadd(0, offsets, 0);  // every row the same
  _tile_loadd(1, offsets + 16, 0);
  if constexpr (kTiles == 2) {
    _tile_loadd(2, offsets, 0);
    _tile_loadd(3, offsets + 16, 0);
  }
  for (int64_t k = 0; k < depth; k += kDepthStep, codes += kDepthStep * kPanel) {
    _tile_loadd(6, codes, 128);
    _tile_loadd(7, codes + 64, 128);
    _tile_loadd(4, a + k, stride);
    if constexpr (kSigned) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (kTiles == 2) {
      _tile_loadd(5, a + 16 * stride + k, stride);
      if constexpr (kSigned) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    }
  }
  _tile_stored(0, totals, 128);
  _tile_stored(1, totals + 16, 128);
  if constexpr (kTiles == 2) {
    _tile_stored(2, totals + 16 * 32, 128);
    _tile_stored(3, totals + 16 * 32 + 16, 128);
  }
}

inline void finish_rows(const int32_t* totals, int64_t rows, const PanelFinish& finish, uint8_t* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; r += 2, totals += 64, y += 2 * y_stride) {
    const __m512i row0[2] = {_mm512_load_si512(totals), _mm512_load_si512(totals + 16)};
    const __m512i row1[2] = {_mm512_load_si512(totals + 32), _mm512_load_si512(totals + 48)};
    if (r + 1 < rows) {
      finish.pair(row0, row1, y, y + y_stride);
    } else {
      finish.single(row0, y);
    }
  }
}

// `readable`: rows of A that may be read; more than `rows` where they are windows in scratch.
template <bool kSigned>
void multiply_amx(const PanelProduct& product, const uint8_t* codes, int64_t depth, int64_t rows, int64_t readable,
                  const Scratch& scratch, const PanelFinish& finish) {
  for (int64_t r = 0; r < rows;) {
    const bool two = rows - r > 16;
    const int64_t height = two ? 32 : 16;
    // The last rows: again some of those before where no others can be read.
    const int64_t start = r + height <= readable ? r : rows - height;
    const uint8_t* a = product.a + start * product.stride;
    if (two) {
      multiply_tiles<kSigned, 2>(a, product.stride, depth, codes, scratch.offsets, scratch.totals);
    } else {
      multiply_tiles<kSigned, 1>(a, product.stride, depth, codes, scratch.offsets, scratch.totals);
    }
    const int64_t skipped = r - start;
    const int64_t valid = rows - r < height - skipped ? rows - r : height - skipped;
    finish_rows(scratch.totals + skipped * 32, valid, finish, product.y + r * product.y_stride, product.y_stride);
    r += valid;
  }
}

int64_t scratch_bytes(const Convolution& c) {
  const int64_t others = vnni::scratch_bytes(c);
  if (!fits_simd(c) || c.depthwise()) {
    return others;
  }
  const int64_t own = Scratch(panel_layout(c), nullptr).bytes;
  return own > others ? own : others;
}

void convolve_tiles(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                    void* memory) {
  const PanelLayout layout = panel_layout(c);
  const Scratch scratch(layout, memory);
  const Finish<Vector512> finish(c.y);
  const bool direct = reads_rows(c);
  const int64_t block = rows_of_block(layout), outputs = c.group_outputs();
  const int64_t tile_depth = layout.depth;
  static const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t first = part.first_position; first < part.last_position; first += block) {
    const int64_t rows = part.last_position - first < block ? part.last_position - first : block;
    for (int64_t group = part.first_channel / outputs; group * outputs < part.last_channel; ++group) {
      PanelProduct product = {};
      product.depth = c.taps();
      product.zero = c.x.zero_point;
      product.y_stride = c.out_channels;
      int64_t readable = rows;
      if (direct && rows >= 32) {
        product.a = x + first * c.in_channels + group * c.group_inputs();
        product.stride = c.in_channels;
      } else {
        fill_windows<Vector512>(c, x, group, first, rows, 0, scratch.windows, layout.depth);
        product.a = scratch.windows;
        product.stride = layout.depth;
        readable = block;
      }
      const int64_t from = c.groups == 1 ? part.first_channel : 0;
      const int64_t to = c.groups == 1 ? part.last_channel : outputs;
      for (int64_t channel = from; channel < to; channel += kPanel) {
        const int64_t panel = group * layout.panels_of_group + channel / kPanel;
        const uint8_t* codes = layout.codes(packed, panel);
        if (layout.width == 4) {
          expand_panel<4>(layout, product.depth, codes, scratch.panel);
        } else if (layout.width == 2) {
          expand_panel<2>(layout, product.depth, codes, scratch.panel);
        }
        if (layout.width != 8) {
          codes = scratch.panel;
        }
        product.data = layout.data(packed, panel * kPanel);
        product.y = y + first * c.out_channels + group * outputs + channel;
        _mm512_store_si512(scratch.offsets, offset_of(product.data, 0, product.zero));
        _mm512_store_si512(scratch.offsets + 16, offset_of(product.data, 16, product.zero));
        const PanelFinish panel_finish(finish, product.data, to - channel);
        if (c.x.is_signed) {
          multiply_amx<true>(product, codes, tile_depth, rows, readable, scratch, panel_finish);
        } else {
          multiply_amx<false>(product, codes, tile_depth, rows, readable, scratch, panel_finish);
        }
      }
    }
  }
  _tile_release();
}

void convolve(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part, void* scratch) {
  if (part.first_channel >= part.last_channel || part.last_position - part.first_position < kFewRows || !fits_simd(c) ||
      c.depthwise()) {
    vnni::convolve(c, packed, x, y, part, scratch);
  } else {
    convolve_tiles(c, packed, x, y, part, scratch);
  }
}

}  // namespace

const KernelTable kKernels_amx = {Isa::kAmx,    vnni::packed_bytes, vnni::pack,           scratch_bytes,
                                  convolve,     vnni::average_pool, vnni::max_pool,       vnni::add,
                                  vnni::lookup, vnni::quantize,     vnni::quantize_image, vnni::dequantize};

}  // namespace mixbit::runtime
