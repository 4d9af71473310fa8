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

// Rows of A for positions first ... first + rows - 1 of one group, `stride` bytes apart, each byte changed by `flip`;
// writes up to 64 bytes behind the last row.
template <typename V>
void fill_windows(const Convolution& c, const uint8_t* x, int64_t group, int64_t first, int64_t rows, uint8_t flip_byte,
                  uint8_t* panel, int64_t stride) {
  const typename V::Int flip = V::all8(flip_byte), pad = V::all8(byte_of(c.x.zero_point) ^ flip_byte);
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
        fill_bytes<V>(to, c.kernel_width * inputs, pad);
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
          fill_bytes<V>(to, before * inputs, pad);
        }
        if (inside > 0) {
          copy_bytes<V>(to + before * inputs, from + (left + before) * pixel, inside * inputs, flip);
        }
        if (after > 0) {
          fill_bytes<V>(to + (c.kernel_width - after) * inputs, after * inputs, pad);
        }
        to += c.kernel_width * inputs;
        continue;
      }
      for (int64_t kw = 0; kw < c.kernel_width; ++kw, to += inputs) {
        const int64_t w = left + kw * c.dilation_width;
        if (w < 0 || w >= c.in_width) {
          fill_bytes<V>(to, inputs, pad);
        } else {
          copy_bytes<V>(to, from + w * pixel, inputs, flip);
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
