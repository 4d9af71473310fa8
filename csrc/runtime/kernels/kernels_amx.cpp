// AMX: tiles of 16 rows and 64 k, two by two. A few rows go to the dot products of VNNI.

#include "avx512-inl.h"
#include "tables.h"

namespace mixbit::runtime {
namespace {

// Fewer rows than this do not fill a tile well enough.
constexpr int64_t kFewRows = 4;
// Rows behind full tiles that dot products take.
constexpr int64_t kFewBeyond = 2;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of a panel: 64 k, how many such steps are expanded before the tiles read them, and room for them.
constexpr int64_t kStepBytes = kDepthStep * kPanel;
constexpr int64_t kAhead = 2;
constexpr int64_t kRing = 4;
// Up to this k an expanded panel is kept for all rows; a longer one would not stay in the first-level cache.
constexpr int64_t kKeptDepth = 512;

inline int64_t ring_steps(int64_t depth) { return depth <= kKeptDepth ? depth / kDepthStep : kRing; }

// Scratch: windows, steps of an expanded panel, totals of a block, offsets of a panel.
struct Scratch {
  uint8_t* windows;
  uint8_t* ring;
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
    ring = take(layout.width == 8 ? 0 : ring_steps(layout.depth) * kStepBytes);
    windows = take(rows_of_block(layout) * windows_stride(layout) + 64);
    bytes = size;
  }
};

// Matrix over bits that cuts field `field` out of each byte and extends its sign: bit i of the result is bit field *
// width + min(i, width - 1) (row i of GF2P8AFFINEQB is byte 7 - i).
constexpr uint64_t field_matrix(int width, int field) {
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) {
    const int bit = field * width + (i < width - 1 ? i : width - 1);
    matrix |= uint64_t{1} << (8 * (7 - i) + bit);
  }
  return matrix;
}

// 64 k of a panel of 4- or 2-bit fields as int8 codes; k beyond `depth` become 0.
template <int kWidth>
inline void expand_step(const uint8_t* codes, int64_t k, int64_t depth, uint8_t* to) {
  constexpr int kFields = 8 / kWidth;
  // Lower fields hold code + 2^(width - 1): their sign is the opposite of the top bit.
  constexpr int kOpposite = 0xff & ~((1 << (kWidth - 1)) - 1);
  codes += k * kPanel * kWidth / 8;
  uint8_t* out = to;
  for (int step = 0; step < 16 / kFields; ++step, codes += 128) {
    const __m512i fields[2] = {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64)};
#pragma GCC unroll 4
    for (int f = 0; f < kFields; ++f, out += 128) {
      const __m512i matrix = _mm512_set1_epi64(static_cast<int64_t>(field_matrix(kWidth, f)));
      for (int half = 0; half < 2; ++half) {
        _mm512_storeu_si512(out + 64 * half, f < kFields - 1
                                                 ? _mm512_gf2p8affine_epi64_epi8(fields[half], matrix, kOpposite)
                                                 : _mm512_gf2p8affine_epi64_epi8(fields[half], matrix, 0));
      }
    }
  }
  clear_beyond(depth - k, kDepthStep, to);
}

// A panel as tiles read it: int8 codes, or fields that are expanded on the way, kAhead steps before the tiles: the
// vector units work while the tile unit does, and what they store has reached the cache.
struct TilePanel {
  const uint8_t* codes;
  uint8_t* ring;
  int64_t depth;         // without padding
  int64_t padded_depth;  // in steps of 64
};

// Totals of 16 or 32 rows (kTiles) and half a panel or all of it (kHalves): tiles 0 ... 3 are the sums, 4 and 5 rows, 6
// and 7 weights.
template <bool kSigned, int kTiles, int kHalves, int kWidth>
inline void multiply_tiles(const uint8_t* a, int64_t stride, const TilePanel& panel, const int32_t* offsets,
                           int32_t* totals) {
  if constexpr (kWidth < 8) {
    for (int64_t k = 0; k < kAhead * kDepthStep && k < panel.padded_depth; k += kDepthStep) {
      expand_step<kWidth>(panel.codes, k, panel.depth, panel.ring + k * kPanel);
    }
  }
  // The compiler does not know that tile loads read memory.
  asm volatile("" ::: "memory");
  _tile_loadd(0, offsets, 0);  // every row the same
  if constexpr (kHalves == 2) _tile_loadd(1, offsets + 16, 0);
  if constexpr (kTiles == 2) _tile_loadd(2, offsets, 0);
  if constexpr (kTiles == 2 && kHalves == 2) _tile_loadd(3, offsets + 16, 0);
  const uint8_t* codes = panel.codes;
  const int64_t steps = ring_steps(panel.padded_depth);
  int64_t slot = 0, next_slot = kAhead % steps;
  for (int64_t k = 0; k < panel.padded_depth; k += kDepthStep, codes += kStepBytes) {
    if constexpr (kWidth < 8) {
      const int64_t next = k + kAhead * kDepthStep;
      if (next < panel.padded_depth) {
        expand_step<kWidth>(panel.codes, next, panel.depth, panel.ring + next_slot * kStepBytes);
        next_slot = next_slot + 1 == steps ? 0 : next_slot + 1;
      }
      codes = panel.ring + slot * kStepBytes;
      slot = slot + 1 == steps ? 0 : slot + 1;
      asm volatile("" ::: "memory");
    }
    _tile_loadd(6, codes, 128);
    if constexpr (kHalves == 2) _tile_loadd(7, codes + 64, 128);
    _tile_loadd(4, a + k, stride);
    if constexpr (kTiles == 2) _tile_loadd(5, a + 16 * stride + k, stride);
    if constexpr (kSigned) {
      _tile_dpbssd(0, 4, 6);
      if constexpr (kHalves == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (kTiles == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (kTiles == 2 && kHalves == 2) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      if constexpr (kHalves == 2) _tile_dpbusd(1, 4, 7);
      if constexpr (kTiles == 2) _tile_dpbusd(2, 5, 6);
      if constexpr (kTiles == 2 && kHalves == 2) _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, totals, 128);
  if constexpr (kHalves == 2) _tile_stored(1, totals + 16, 128);
  if constexpr (kTiles == 2) _tile_stored(2, totals + 16 * 32, 128);
  if constexpr (kTiles == 2 && kHalves == 2) _tile_stored(3, totals + 16 * 32 + 16, 128);
}

// kHalves of a panel: two rows of 32 channels at a time, or four of 16.
template <int kHalves>
inline void finish_rows(const int32_t* totals, int64_t rows, const PanelFinish& finish, uint8_t* y, int64_t y_stride) {
  if constexpr (kHalves == 1) {
    for (int64_t r = 0; r < rows; r += 4, totals += 128, y += 4 * y_stride) {
      const __m512i four[4] = {_mm512_load_si512(totals), _mm512_load_si512(totals + 32),
                               _mm512_load_si512(totals + 64), _mm512_load_si512(totals + 96)};
      const __m512i bytes = finish.four_halves(four);
      finish.store_half(y, _mm512_castsi512_si128(bytes));
      if (r + 1 < rows) finish.store_half(y + y_stride, _mm512_extracti32x4_epi32(bytes, 1));
      if (r + 2 < rows) finish.store_half(y + 2 * y_stride, _mm512_extracti32x4_epi32(bytes, 2));
      if (r + 3 < rows) finish.store_half(y + 3 * y_stride, _mm512_extracti32x4_epi32(bytes, 3));
    }
    return;
  }
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

// Rows of A times a panel. `readable`: rows of A that may be read; more than `rows` where they are windows in scratch.
template <bool kSigned, int kHalves, int kWidth>
void multiply_panel(PanelProduct product, const TilePanel& panel, int64_t rows, int64_t readable,
                    const Scratch& scratch, const PanelFinish& finish) {
  const bool keeps = kWidth < 8 && panel.padded_depth <= kKeptDepth;
  const TilePanel kept = {panel.ring, nullptr, panel.depth, panel.padded_depth};
  // One or two rows beyond the last tile are not worth a tile.
  const int64_t few = rows > 16 && rows % 16 <= kFewBeyond ? rows % 16 : 0;
  const int64_t tiled = rows - few;
  for (int64_t r = 0; r < tiled;) {
    const bool two = tiled - r > 16;
    const int64_t height = two ? 32 : 16;
    // The last rows: again some of those before where no others can be read.
    const int64_t start = r + height <= readable ? r : tiled - height;
    const uint8_t* a = product.a + start * product.stride;
    const bool is_kept = keeps && r > 0;
    if (two && is_kept) {
      multiply_tiles<kSigned, 2, kHalves, 8>(a, product.stride, kept, scratch.offsets, scratch.totals);
    } else if (two) {
      multiply_tiles<kSigned, 2, kHalves, kWidth>(a, product.stride, panel, scratch.offsets, scratch.totals);
    } else if (is_kept) {
      multiply_tiles<kSigned, 1, kHalves, 8>(a, product.stride, kept, scratch.offsets, scratch.totals);
    } else {
      multiply_tiles<kSigned, 1, kHalves, kWidth>(a, product.stride, panel, scratch.offsets, scratch.totals);
    }
    const int64_t skipped = r - start;
    const int64_t valid = tiled - r < height - skipped ? tiled - r : height - skipped;
    finish_rows<kHalves>(scratch.totals + skipped * 32, valid, finish, product.y + r * product.y_stride,
                         product.y_stride);
    r += valid;
  }
  product.zero += kSigned ? 128 : 0;
  if (few == 2) {
    multiply_rows<kWidth, 2, kSigned>(product, tiled, finish);
  } else if (few == 1) {
    multiply_rows<kWidth, 1, kSigned>(product, tiled, finish);
  }
}

template <bool kSigned, int kHalves>
void multiply_width(int32_t width, const PanelProduct& product, const TilePanel& panel, int64_t rows, int64_t readable,
                    const Scratch& scratch, const PanelFinish& finish) {
  if (width == 8) {
    multiply_panel<kSigned, kHalves, 8>(product, panel, rows, readable, scratch, finish);
  } else if (width == 4) {
    multiply_panel<kSigned, kHalves, 4>(product, panel, rows, readable, scratch, finish);
  } else {
    multiply_panel<kSigned, kHalves, 2>(product, panel, rows, readable, scratch, finish);
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
  const bool direct = reads_rows(c) && c.in_channels % 512 != 0;
  const int64_t block = rows_of_block(layout), outputs = c.group_outputs();
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
        fill_windows<Vector512>(c, x, group, first, rows, 0, scratch.windows, windows_stride(layout));
        product.a = scratch.windows;
        product.stride = windows_stride(layout);
        readable = block;
      }
      const int64_t from = c.groups == 1 ? part.first_channel : 0;
      const int64_t to = c.groups == 1 ? part.last_channel : outputs;
      for (int64_t channel = from; channel < to; channel += kPanel) {
        const int64_t panel = group * layout.panels_of_group + channel / kPanel;
        product.codes = layout.codes(packed, panel);
        const TilePanel tile_panel = {product.codes, scratch.ring, product.depth, layout.depth};
        product.data = layout.data(packed, panel * kPanel);
        product.y = y + first * c.out_channels + group * outputs + channel;
        _mm512_store_si512(scratch.offsets, offset_of(product.data, 0, product.zero));
        _mm512_store_si512(scratch.offsets + 16, offset_of(product.data, 16, product.zero));
        const PanelFinish panel_finish(finish, product.data, to - channel);
        const bool half = to - channel <= kPanel / 2;
        const auto multiply = c.x.is_signed ? (half ? multiply_width<true, 1> : multiply_width<true, 2>)
                                            : (half ? multiply_width<false, 1> : multiply_width<false, 2>);
        multiply(layout.width, product, tile_panel, rows, readable, scratch, panel_finish);
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
