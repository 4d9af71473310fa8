#pragma once

// How the SIMD kernels lay weights out, and what they share that needs no SIMD.
//
// A convolution is a product A B: row p of A is the window of output position p in the order [kernel row, kernel
// column, group input], column n of B the weights of output channel n. B lies in panels of 32 channels; inside, four
// consecutive k of a channel are neighbours (the operand of a 4-way dot product, and a row of an AMX tile):
//   8 bits: byte [k / 4][channel][k % 4] is the code
//   4 bits: fields of byte [k / 8][channel][k % 4]: k / 4 even in the low half, odd in the high one
//   2 bits: fields of byte [k / 16][channel][k % 4]: k / 4 % 4 from the lowest
// The highest field is the code in two's complement: cut out where it lies, it is a signed byte, a power of two too
// large. The others are code + 2^(bits - 1): cut out, they are positive. A product with fields is therefore too large
// by 2^(bits - 1) times the sum of the row's bytes at the lower fields. k and channels beyond the last hold fields of
// 0.
//
// Depthwise weights lie in blocks of 64 channels (AVX2, and up to 32 last ones: of 32), int8 always: [place / 4]
// [quarter][lane][4 channels][place % 4], with the channels in the order in which unpacking 4 loaded rows yields them.
// Kernels of three rows have a place of four for each column.

#include <cstdint>

#include <mixbit/runtime/kernels.h>

namespace mixbit::runtime {

constexpr int64_t kPanel = 32;
// k is padded to this: one AMX tile.
constexpr int64_t kDepthStep = 64;
constexpr int64_t kDepthwiseBlock = 64;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// What a panel or a depthwise block needs to finish its channels.
struct ChannelData {
  const int32_t* bias;
  const int32_t* weight_sum;
  const float* multiplier;
};

struct PanelLayout {
  int32_t width;  // 2, 4 or 8
  int64_t depth;  // k of one group, padded
  int64_t panels_of_group;
  int64_t panel_bytes;  // codes of one panel
  int64_t channels;     // padded channels of all groups
  int64_t bias_at, sums_at, multiplier_at, bytes;

  const uint8_t* codes(const void* packed, int64_t panel) const {
    return static_cast<const uint8_t*>(packed) + panel * panel_bytes;
  }
  // Depthwise: of the block that begins with `channel`.
  const uint8_t* codes_of_channel(const void* packed, int64_t channel) const {
    return static_cast<const uint8_t*>(packed) + channel * depth;
  }
  ChannelData data(const void* packed, int64_t first_channel) const {
    const char* base = static_cast<const char*>(packed);
    return {reinterpret_cast<const int32_t*>(base + bias_at) + first_channel,
            reinterpret_cast<const int32_t*>(base + sums_at) + first_channel,
            reinterpret_cast<const float*>(base + multiplier_at) + first_channel};
  }
};

PanelLayout panel_layout(const Convolution& convolution);
void pack_panels(const Convolution& convolution, const Weights& weights, void* packed);

// Depthwise: `depth` is the number of places for taps; there are no panels. `block`: 64 or 32 channels.
PanelLayout depthwise_layout(const Convolution& convolution, int64_t block);
void pack_depthwise(const Convolution& convolution, const Weights& weights, void* packed, int64_t block);

inline int64_t depthwise_place(const Convolution& c, int64_t kernel_row, int64_t kernel_column) {
  return c.kernel_height == 3 ? kernel_column * 4 + kernel_row : kernel_row * c.kernel_width + kernel_column;
}

// Whether a byte can hold the code of a padded pixel and 16 bits the zero points that SIMD code adds there; otherwise
// the scalar kernel computes the layer.
bool fits_simd(const Convolution& convolution);

// Whether windows lie one after the other in x itself: row p of A is pixel p.
inline bool reads_rows(const Convolution& c) {
  return c.kernel_height == 1 && c.kernel_width == 1 && c.stride_height == 1 && c.stride_width == 1 && c.pad_top == 0 &&
         c.pad_left == 0 && c.in_height == c.out_height && c.in_width == c.out_width;
}

}  // namespace mixbit::runtime
