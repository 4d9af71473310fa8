#pragma once

// Integer kernels on raw pointers: no allocation, no threads, no exceptions. One table of functions per instruction
// set; scalar is the definition, all others compute the same bytes.
//
// Tensors are NHWC, one byte a code (int8 or uint8, as CodeGrid::is_signed says). A kernel may read up to kReadSlack
// bytes beyond the end of a tensor (and of nothing else): whoever allocates tensors leaves that much room.

#include <cstdint>

#include <mixbit/common/integer.h>
#include <mixbit/common/isa.h>

namespace mixbit::runtime {

constexpr int64_t kReadSlack = 64;
// Alignment of packed weights and of scratch memory, bytes.
constexpr int64_t kAlignment = 64;

// A convolution, and with a 1 x 1 image a linear layer. Output position p is (image, row, column) in that order, out
// of batch * out_height * out_width. A linear layer that reads a flattened image [C, H, W] is the convolution whose
// kernel is the whole image.
struct Convolution {
  int64_t batch;
  int64_t in_height, in_width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;  // padding below and to the right follows from the output's size
  int64_t dilation_height, dilation_width;
  int64_t groups;
  int32_t weight_bits;  // 1 ... 8: all weight codes fit this width
  CodeGrid x;
  CodeGrid y;  // scale does not matter; a fused relu narrows low and high

  int64_t positions() const { return batch * out_height * out_width; }
  int64_t group_inputs() const { return in_channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  // Weights of one output channel.
  int64_t taps() const { return group_inputs() * kernel_height * kernel_width; }
  bool depthwise() const { return groups == in_channels && groups == out_channels && groups > 1; }
};

// Weights as a package holds them. Row o of `codes` has the taps() codes of output channel o in the order [group
// input, kernel row, kernel column], `bits` bits each (8: plain int8), see mixbit/common/packing.h; rows lie
// `row_bytes` apart.
struct Weights {
  const uint8_t* codes;
  int32_t bits;
  int64_t row_bytes;
  const int32_t* bias;      // [out_channels], null: none
  const float* multiplier;  // [out_channels], finite
};

// A part of a layer's output: positions and channels. Channels begin at multiples of channel_step(convolution) and end
// there or at the last one. Parts may be computed in any order and at the same time.
struct Part {
  int64_t first_position, last_position;
  int64_t first_channel, last_channel;
};

// Windows over images; pooling keeps the channels.
struct Pool {
  int64_t batch;
  int64_t in_height, in_width, channels;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;
  int64_t dilation_height, dilation_width;
  bool count_include_pad;  // average pools
  CodeGrid x;
  CodeGrid y;

  int64_t positions() const { return batch * out_height * out_width; }
};

struct KernelTable {
  Isa isa;

  // Weights are laid out once for a table (and only for it): bytes needed at `packed`, aligned to kAlignment. Neither
  // depends on the batch or the image's size.
  int64_t (*packed_bytes)(const Convolution& convolution);
  void (*pack)(const Convolution& convolution, const Weights& weights, void* packed);
  // Bytes that each call of `convolve` needs at `scratch`, aligned to kAlignment.
  int64_t (*scratch_bytes)(const Convolution& convolution);
  // y = clamp(rne(fp32(sum (q_x - z_x) q_w + bias) multiplier) + z_y) in the part; padding adds 0. Totals must fit
  // 32 bits.
  void (*convolve)(const Convolution& convolution, const void* packed, const uint8_t* x, uint8_t* y, const Part& part,
                   void* scratch);

  // Positions first ... last - 1 of all channels. Padding adds 0 to an average and nothing to a maximum. A maximum
  // keeps the codes of x, y is not looked at.
  void (*average_pool)(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last);
  void (*max_pool)(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last);

  // y[i] = added_code(a[i], b[i]).
  void (*add)(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
              const CodeGrid& y_grid, int64_t n);
  // y[i] = table[x[i]]: any function of one code, see move_table. x == y is allowed.
  void (*lookup)(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n);
  // y[i] = input_code(x[i]).
  void (*quantize)(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n);
  // One image: x [channels, pixels] to y [pixels, channels].
  void (*quantize_image)(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels);
  // y[i] = real_of(x[i]).
  void (*dequantize)(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n);
};

// Channels of a part come in multiples of this.
int64_t channel_step(const Convolution& convolution);

// table[byte] = the code moved from grid x to grid y (and clamped to it: relu, relu6), as a byte.
void move_table(const CodeGrid& x, const CodeGrid& y, uint8_t table[256]);

// y[i] = multiplied_code(a[i], b[i]).
void multiply(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
              const CodeGrid& y_grid, int64_t n);

// A line of n codes, `stride` apart in x and y: y[i] = softmax_code(powers[largest - x[i]], their sum). `powers` has an
// entry for every distance of two codes of x's grid.
void softmax(const int32_t* powers, const uint8_t* x, const CodeGrid& x_grid, uint8_t* y, const CodeGrid& y_grid,
             int64_t n, int64_t stride);

// A code as the byte that stores it, and back.
inline uint8_t byte_of(int32_t code) { return static_cast<uint8_t>(code); }
inline int32_t code_at(const uint8_t* p, bool is_signed) {
  return is_signed ? static_cast<int32_t>(static_cast<int8_t>(*p)) : static_cast<int32_t>(*p);
}

// The widest instruction set of this processor (and operating system, which must grant AMX), not beyond the cap in
// MIXBIT_CPU_ISA; a value that is none does not cap.
Isa detected_isa();

// The kernels of the widest available instruction set up to `isa`.
const KernelTable& kernels(Isa isa);

}  // namespace mixbit::runtime
