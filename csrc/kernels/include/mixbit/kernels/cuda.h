#pragma once

// CUDA kernels: launchers on raw device pointers and a stream, no torch. Scales, zero points and bit-widths are read on
// the device: nothing synchronizes, so a bit-width outside 1..16 yields NaN instead of an error.

#include <cstdint>

#include <mixbit/common/numerics.h>

struct CUstream_st;

namespace mixbit::kernels::cuda {

enum class StorageType : int32_t { kFloat32, kFloat16, kBFloat16 };

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

// Blocks that reduce one channel.
int64_t reduce_blocks(const QuantizeArguments& arguments);

}  // namespace mixbit::kernels::cuda
