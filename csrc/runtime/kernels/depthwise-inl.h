#pragma once

// Depthwise convolutions for any vector V: a register of bytes, of 32-bit integers, of floats. Each instruction set
// includes its own copy (internal linkage).

#include <cstdint>

#include "finish-inl.h"
#include "panels.h"

namespace mixbit::runtime {
namespace {

// A block of channels of a depthwise layer, as many as V has bytes.
struct DepthwiseBlock {
  const uint8_t* weights;
  const int32_t* offsets;  // bias - zero * sum of weights
  const float* multiplier;
  int64_t channel;
  int64_t valid;
};

// Four rows of bytes to four registers of [4 channels of each 128 bits][4 rows].
template <typename V>
inline void interleave(const typename V::Int rows[4], typename V::Int quads[4]) {
  const typename V::Int low01 = V::unpack_low8(rows[0], rows[1]), high01 = V::unpack_high8(rows[0], rows[1]);
  const typename V::Int low23 = V::unpack_low8(rows[2], rows[3]), high23 = V::unpack_high8(rows[2], rows[3]);
  quads[0] = V::unpack_low16(low01, low23);
  quads[1] = V::unpack_high16(low01, low23);
  quads[2] = V::unpack_low16(high01, high23);
  quads[3] = V::unpack_high16(high01, high23);
}

template <typename V>
inline void finish_block(const Finish<V>& finish, const DepthwiseBlock& block, typename V::Int total[4], uint8_t* y) {
  for (int q = 0; q < 4; ++q) {
    total[q] = finish.rounded(total[q], V::load_floats(block.multiplier + q * V::kBytes / 4));
  }
  V::store_first(y, block.valid, finish.bytes(total[0], total[1], total[2], total[3]));
}

// What a depthwise layer keeps while it runs, in scratch memory: a register of padding, offsets, pointers to taps.
struct DepthwiseScratch {
  uint8_t* padding;
  int32_t* offsets;
  const uint8_t** taps;
  int64_t bytes;

  DepthwiseScratch(const PanelLayout& layout, void* base) {
    auto* at = static_cast<uint8_t*>(base);
    const int64_t offset_bytes = round_up(layout.channels * 4, kAlignment);
    padding = at;
    offsets = at == nullptr ? nullptr : reinterpret_cast<int32_t*>(at + 64);
    taps = at == nullptr ? nullptr : reinterpret_cast<const uint8_t**>(at + 64 + offset_bytes);
    bytes = 64 + offset_bytes + round_up(layout.depth * static_cast<int64_t>(sizeof(void*)), kAlignment);
  }
};

// One output position from the pointers to its taps, null where they are padding.
template <typename V>
inline void depthwise_position(const DepthwiseScratch& scratch, int64_t depth, const DepthwiseBlock& block,
                               typename V::Int flip, const Finish<V>& finish, uint8_t* y) {
  typename V::Int total[4];
  for (int q = 0; q < 4; ++q) {
    total[q] = V::load(block.offsets + q * V::kBytes / 4);
  }
  const uint8_t* weights = block.weights;
  for (int64_t k = 0; k < depth; k += 4, weights += 4 * V::kBytes) {
    typename V::Int rows[4], quads[4];
    for (int i = 0; i < 4; ++i) {
      const uint8_t* tap = scratch.taps[k + i];
      rows[i] = V::exclusive_or(V::load(tap != nullptr ? tap + block.channel : scratch.padding), flip);
    }
    interleave<V>(rows, quads);
    for (int q = 0; q < 4; ++q) {
      total[q] = V::dot(total[q], quads[q], V::load(weights + q * V::kBytes));
    }
  }
  finish_block<V>(finish, block, total, y);
}

// A run of output columns of a 3 x 3 kernel of stride kStride: each input column is interleaved once.
//   rows: input rows of the three kernel rows at column 0 and this block's channels; step: bytes to the next column, 0
//   where the row is padding
template <typename V, int kStride>
inline void depthwise_columns(const uint8_t* const rows[3], const int64_t step[3], const uint8_t* padding,
                              int64_t in_width, int64_t left, int64_t columns, const DepthwiseBlock& block,
                              typename V::Int flip, const Finish<V>& finish, uint8_t* y, int64_t y_stride) {
  const auto column = [&](int64_t w, typename V::Int quads[4]) {
    typename V::Int bytes[4];
    const bool inside = w >= 0 && w < in_width;
    for (int i = 0; i < 3; ++i) {
      bytes[i] = V::exclusive_or(V::load(inside ? rows[i] + w * step[i] : padding), flip);
    }
    bytes[3] = V::zero();
    interleave<V>(bytes, quads);
  };
  typename V::Int before[4], here[4], after[4];
  column(left, before);
  if constexpr (kStride == 1) {
    column(left + 1, here);
  }
  for (int64_t i = 0; i < columns; ++i, left += kStride, y += y_stride) {
    if constexpr (kStride == 2) {
      column(left + 1, here);
    }
    column(left + 2, after);
    typename V::Int total[4];
    for (int q = 0; q < 4; ++q) {
      total[q] = V::dot(V::load(block.offsets + q * V::kBytes / 4), before[q], V::load(block.weights + q * V::kBytes));
      total[q] = V::dot(total[q], here[q], V::load(block.weights + (4 + q) * V::kBytes));
      total[q] = V::dot(total[q], after[q], V::load(block.weights + (8 + q) * V::kBytes));
      before[q] = kStride == 1 ? here[q] : after[q];
      here[q] = after[q];
    }
    finish_block<V>(finish, block, total, y);
  }
}

// The channels first ... last - 1 of a part, V::kBytes at a time.
template <typename V>
void depthwise_channels(const Convolution& c, const PanelLayout& layout, const void* packed, const uint8_t* x,
                        uint8_t* y, const Part& part, const DepthwiseScratch& scratch) {
  const Finish<V> finish(c.y);
  const typename V::Int flip = V::all8(c.x.is_signed ? 0x80 : 0);
  const int64_t pixel = c.in_channels, line = c.in_width * pixel;
  const auto block_of = [&](int64_t channel) {
    return DepthwiseBlock{layout.codes_of_channel(packed, channel), scratch.offsets + channel,
                          layout.data(packed, channel).multiplier, channel, part.last_channel - channel};
  };
  const bool columns = c.kernel_height == 3 && c.kernel_width == 3 && c.dilation_height == 1 && c.dilation_width == 1 &&
                       (c.stride_width == 1 || c.stride_width == 2);
  int64_t p = part.first_position;
  while (p < part.last_position) {
    const int64_t first = p % c.out_width, row = p / c.out_width % c.out_height;
    const int64_t rest = part.last_position - p, width = c.out_width - first < rest ? c.out_width - first : rest;
    const uint8_t* image = x + p / (c.out_width * c.out_height) * c.in_height * line;
    const int64_t top = row * c.stride_height - c.pad_top;
    if (columns) {
      for (int64_t channel = part.first_channel; channel < part.last_channel; channel += V::kBytes) {
        const uint8_t* rows[3];
        int64_t step[3];
        for (int i = 0; i < 3; ++i) {
          const bool inside = top + i >= 0 && top + i < c.in_height;
          rows[i] = inside ? image + (top + i) * line + channel : scratch.padding;
          step[i] = inside ? pixel : 0;
        }
        const int64_t left = first * c.stride_width - c.pad_left;
        uint8_t* to = y + p * c.out_channels + channel;
        if (c.stride_width == 1) {
          depthwise_columns<V, 1>(rows, step, scratch.padding, c.in_width, left, width, block_of(channel), flip, finish,
                                  to, c.out_channels);
        } else {
          depthwise_columns<V, 2>(rows, step, scratch.padding, c.in_width, left, width, block_of(channel), flip, finish,
                                  to, c.out_channels);
        }
      }
      p += width;
      continue;
    }
    for (int64_t i = 0; i < width; ++i, ++p) {
      const int64_t left = (first + i) * c.stride_width - c.pad_left;
      for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
        const int64_t h = top + kh * c.dilation_height;
        for (int64_t kw = 0; kw < c.kernel_width; ++kw) {
          const int64_t w = left + kw * c.dilation_width;
          const bool inside = h >= 0 && h < c.in_height && w >= 0 && w < c.in_width;
          scratch.taps[depthwise_place(c, kh, kw)] = inside ? image + h * line + w * pixel : nullptr;
        }
      }
      for (int64_t channel = part.first_channel; channel < part.last_channel; channel += V::kBytes) {
        depthwise_position<V>(scratch, layout.depth, block_of(channel), flip, finish, y + p * c.out_channels + channel);
      }
    }
  }
}

// Fills what all positions share.
void prepare_depthwise(const Convolution& c, const PanelLayout& layout, const void* packed, const Part& part,
                       const DepthwiseScratch& scratch) {
  for (int64_t i = 0; i < 64; ++i) {
    scratch.padding[i] = byte_of(c.x.zero_point);
  }
  const ChannelData data = layout.data(packed, 0);
  const auto zero = static_cast<uint32_t>(c.x.zero_point + (c.x.is_signed ? 128 : 0));
  // Channels of a block are permuted: whole blocks.
  const int64_t last = round_up(part.last_channel, kDepthwiseBlock);
  for (int64_t i = part.first_channel; i < last && i < layout.channels; ++i) {
    scratch.offsets[i] =
        static_cast<int32_t>(static_cast<uint32_t>(data.bias[i]) - zero * static_cast<uint32_t>(data.weight_sum[i]));
  }
  for (int64_t k = 0; k < layout.depth; ++k) {
    scratch.taps[k] = nullptr;  // places without a tap stay so: weights of 0
  }
}

}  // namespace
}  // namespace mixbit::runtime
