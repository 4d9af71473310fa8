#pragma once

// CUDA kernels: launchers on raw device pointers and a stream, no torch. Scales, zero points and bit-widths are read on
// the device: nothing synchronizes, so a bit-width outside 1..16 yields NaN instead of an error.

#include <cstdint>

#include <mixbit/common/numerics.h>
#include <mixbit/kernels/storage.h>

struct CUstream_st;

namespace mixbit::kernels::cuda {

using kernels::StorageType;

// x seen as [outer, channels, inner], dense; per tensor: channels = 1. A parameter has 1 or `channels` elements.
struct QuantizeArguments {
  StorageType storage;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scale;
  int64_t scale_count;
  const float* zero_point;
  int64_t zero_point_count;
  const float* bit_width;
  int64_t bit_width_count;
  bool is_signed;
  bool narrow_range;
  Rounding rounding;
};

// Elements that one thread block reduces; fixed, so that the sums do not depend on the device.
constexpr int64_t kReduceBlock = 16384;

// y[i] = fake_quantize(x[i]); x and y may be the same.
void launch_fake_quantize(const QuantizeArguments& arguments, const void* x, void* y, CUstream_st* stream);

// dx[i] for every element (dx may be null), and per channel the sums of dscale and dzero_point.
//   partials: [channels, blocks_per_channel, 2] float64 scratch, see reduce_blocks
//   dscale, dzero_point: [channels] float32; the caller sums channels where a parameter has one element
void launch_fake_quantize_backward(const QuantizeArguments& arguments, const void* grad, const void* x, void* dx,
                                   double* partials, float* dscale, float* dzero_point, CUstream_st* stream);

// fake_quantize, and one bit an element: whether it lies inside the grid. A row of `inner` elements has ceil(inner / 8)
// bytes; the unused bits are 0.
void launch_fake_quantize_mask(const QuantizeArguments& arguments, const void* x, void* y, uint8_t* mask,
                               CUstream_st* stream);

// dx[i] = grad[i] where the bit is set, else 0; rows as above.
void launch_apply_mask(StorageType storage, int64_t rows, int64_t inner, const void* grad, const uint8_t* mask,
                       void* dx, CUstream_st* stream);

// x seen as [outer, channels, inner] against `count` candidate grids: scales [count] or [count, channels], bit_widths
// [count], all on the device.
struct NoiseArguments {
  StorageType storage;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scales;
  bool per_channel;
  const float* bit_widths;
  int64_t count;
  bool is_signed;
  bool narrow_range;
};

// signal: [channels], noise: [count, channels]; partials: [channels, reduce_blocks, count + 1] float64 scratch.
void launch_quantization_noise(const NoiseArguments& arguments, const void* x, double* partials, double* signal,
                               double* noise, CUstream_st* stream);

// signal = sum reference^2, noise = sum (x - reference)^2 over n elements; partials: [reduce_blocks, 2].
void launch_noise_power(StorageType storage, int64_t n, const void* x, const void* reference, double* partials,
                        double* signal, double* noise, CUstream_st* stream);

// Blocks that reduce `elements` elements.
int64_t reduce_blocks(int64_t elements);

// Blocks that reduce one channel.
inline int64_t reduce_blocks(const QuantizeArguments& a) { return reduce_blocks(a.outer * a.inner); }

}  // namespace mixbit::kernels::cuda
