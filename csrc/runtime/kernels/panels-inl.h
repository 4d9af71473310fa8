#pragma once

// Windows as rows of a product, and the walk over the panels of a layer, for any vector V. Each instruction set
// includes its own copy (internal linkage).

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "panels.h"

namespace mixbit::runtime {
namespace {

// Copies n bytes, changed by XOR; writes up to 63 bytes too many and reads as many.
template <typename V>
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t n, typename V::Int flip) {
  if (n <= 16) {
    __m128i first;
    std::memcpy(&first, &flip, 16);
    first = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), first);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), first);
    return;
  }
  for (int64_t i = 0; i < n; i += V::kBytes) {
    V::store(to + i, V::exclusive_or(V::load(from + i), flip));
  }
}
template <typename V>
inline void fill_bytes(uint8_t* to, int64_t n, typename V::Int value) {
  for (int64_t i = 0; i < n; i += V::kBytes) {
    V::store(to + i, value);
  }
}

// A piece of the windows of neighbouring positions of one output row: `pixels` neighbouring pixels of an input line.
struct WindowPiece {
  const uint8_t* line;  // its first pixel; null: outside the image
  int64_t line_pixels;
  int64_t pixel;       // bytes
  int64_t left, step;  // the first pixel that the first position reads, and how far the next position's is
  int64_t pixels;
  int64_t inputs;  // bytes taken of a pixel; of several pixels at once only all of them
};

// The piece for `count` positions, `stride` bytes apart; up to 63 bytes too many are written behind each.
template <typename V>
void fill_piece(const WindowPiece& piece, int64_t count, typename V::Int flip, typename V::Int pad, uint8_t* to,
                int64_t stride) {
  const int64_t bytes = piece.pixels * piece.inputs;
  int64_t p = 0, left = piece.left;
  const auto edge = [&] {
    const int64_t before = left < 0 ? (-left < piece.pixels ? -left : piece.pixels) : 0;
    const int64_t beyond = left + piece.pixels - piece.line_pixels;
    const int64_t after = beyond > 0 ? (beyond < piece.pixels ? beyond : piece.pixels) : 0;
    const int64_t inside = piece.pixels - before - after;
    fill_bytes<V>(to, before * piece.inputs, pad);
    if (inside > 0) {
      copy_bytes<V>(to + before * piece.inputs, piece.line + (left + before) * piece.pixel, inside * piece.inputs,
                    flip);
    }
    fill_bytes<V>(to + (piece.pixels - after) * piece.inputs, after * piece.inputs, pad);
  };
  if (piece.line == nullptr) {
    for (; p < count; ++p, to += stride) fill_bytes<V>(to, bytes, pad);
    return;
  }
  for (; p < count && left < 0; ++p, left += piece.step, to += stride) edge();
  const int64_t room = piece.line_pixels - piece.pixels - left;
  const int64_t inside = room < 0 ? 0 : room / piece.step + 1;
  const int64_t last = p + inside < count ? p + inside : count;
  const uint8_t* from = piece.line + left * piece.pixel;
  const int64_t advance = piece.step * piece.pixel;
  left += (last - p) * piece.step;
  if (bytes <= 16) {
    for (; p < last; ++p, to += stride, from += advance) copy_bytes<V>(to, from, 16, flip);
  } else if (bytes <= V::kBytes) {
    for (; p < last; ++p, to += stride, from += advance) copy_bytes<V>(to, from, V::kBytes, flip);
  } else {
    for (; p < last; ++p, to += stride, from += advance) copy_bytes<V>(to, from, bytes, flip);
  }
  for (; p < count; ++p, left += piece.step, to += stride) edge();
}

// Rows of A for positions first ... first + rows - 1 of one group, `stride` bytes apart (at least 64 more than the k),
// each byte changed by `flip_byte`.
template <typename V>
void fill_windows(const Convolution& c, const uint8_t* x, int64_t group, int64_t first, int64_t rows, uint8_t flip_byte,
                  uint8_t* to, int64_t stride) {
  const typename V::Int flip = V::all8(flip_byte), pad = V::all8(byte_of(c.x.zero_point) ^ flip_byte);
  const int64_t inputs = c.group_inputs(), line = c.in_width * c.in_channels;
  // A kernel row is one piece where its pixels are neighbours.
  const int64_t pixels = c.dilation_width == 1 && c.groups == 1 ? c.kernel_width : 1;
  const int64_t last = first + rows;
  for (int64_t p = first; p < last;) {
    const int64_t column = p % c.out_width, row = p / c.out_width % c.out_height;
    const int64_t count = c.out_width - column < last - p ? c.out_width - column : last - p;
    const uint8_t* image = x + p / (c.out_width * c.out_height) * c.in_height * line + group * inputs;
    uint8_t* at = to + (p - first) * stride;
    for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
      const int64_t h = row * c.stride_height - c.pad_top + kh * c.dilation_height;
      for (int64_t kw = 0; kw < c.kernel_width; kw += pixels, at += pixels * inputs) {
        const int64_t left = column * c.stride_width - c.pad_left + kw * c.dilation_width;
        const WindowPiece piece = {h >= 0 && h < c.in_height ? image + h * line : nullptr,
                                   c.in_width,
                                   c.in_channels,
                                   left,
                                   c.stride_width,
                                   pixels,
                                   inputs};
        fill_piece<V>(piece, count, flip, pad, at, stride);
      }
    }
    p += count;
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

// Bytes from a row of windows to the next: not a power of two, or the rows of a tile would meet in few cache sets.
inline int64_t windows_stride(const PanelLayout& layout) { return layout.depth + 64; }

// Whether a layer needs its windows copied: signed bytes become unsigned ones on the way.
inline bool copies_windows(const Convolution& c) { return c.x.is_signed || !reads_rows(c); }

// Bytes of windows that walk_panels keeps.
inline int64_t windows_bytes(const Convolution& c) {
  const PanelLayout layout = panel_layout(c);
  return copies_windows(c) ? rows_of_block(layout) * windows_stride(layout) + 64 : 0;
}

// Calls multiply(width, product, rows, valid channels) for all panels of a part, with rows of unsigned bytes.
template <typename V, typename Multiply>
void walk_panels(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                 void* scratch, const Multiply& multiply) {
  const PanelLayout layout = panel_layout(c);
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
        fill_windows<V>(c, x, group, first, rows, c.x.is_signed ? 0x80 : 0, windows, windows_stride(layout));
        product.a = windows;
        product.stride = windows_stride(layout);
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
        multiply(layout.width, product, rows, to - channel);
      }
    }
  }
}

}  // namespace
}  // namespace mixbit::runtime
