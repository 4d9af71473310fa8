#pragma once

// Bodies of the extra_level_fake_quantize kernels. Host code may compile them too.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// The base grid of a channel, read from device memory.
struct BaseGrid {
  float scale;
  QuantRange range;
  int bits;  // 0: no valid width
};

__device__ inline BaseGrid load_base_grid(const QuantizeArguments& a, int64_t channel) {
  const float bits = a.bit_width[a.bit_width_count == 1 ? 0 : channel];
  const bool valid = is_valid_bit_width(bits) && !(a.narrow_range && bits == 1.0f);
  BaseGrid grid;
  grid.scale = a.scale[a.scale_count == 1 ? 0 : channel];
  grid.bits = valid ? static_cast<int>(bits) : 0;
  grid.range = quant_range(valid ? grid.bits : 8, true, a.narrow_range);
  return grid;
}

__device__ inline bool makes_grid(const BaseGrid& grid, int extra) {
  return grid.bits > 0 && is_valid_extra(grid.bits, extra);
}

// A thread a pack; elements by index, so that any alignment gives the same values.
template <typename T>
__global__ void extra_levels_kernel(QuantizeArguments a, const T* x, const uint8_t* extra, T* y, bool aligned) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t numel = a.outer * a.channels * a.inner;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kSize;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kSize;
  for (; first < numel; first += step) {
    const int n = static_cast<int>(numel - first < kSize ? numel - first : kSize);
    const auto at = [&](int j) { return first + j; };
    const bool whole = aligned && n == kSize;
    Pack<T> pack = read_pack(x, at, n, whole);
    BaseGrid grid = load_base_grid(a, first / a.inner % a.channels);
    for (int j = 0; j < n; ++j) {
      if (j > 0 && a.channels > 1 && a.inner % kSize != 0) {
        grid = load_base_grid(a, (first + j) / a.inner % a.channels);
      }
      const int e = extra[first + j];
      const float value = static_cast<float>(pack.v[j]);
      pack.v[j] = static_cast<T>(
          makes_grid(grid, e) ? extra_level_fake_quantize(value, grid.scale, grid.range, e, a.rounding) : NAN);
    }
    write_pack(y, at, n, whole, pack);
  }
}

// grid: channels * blocks; a block owns kReduceBlock consecutive elements of its channel.
template <typename T>
__global__ void extra_levels_backward_kernel(QuantizeArguments a, int64_t blocks, const T* grad, const T* x,
                                             const uint8_t* extra, T* dx, bool aligned, double* partials) {
  __shared__ double sums[1][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const BlockPart part = block_part(a.outer, a.channels, a.inner, blocks, block);
  const BaseGrid grid = load_base_grid(a, part.channel);
  float values[1] = {0.0f};
  for_each_pack<T>(part, aligned, [&](const auto& at, int n, bool whole) {
    const Pack<T> gs = read_pack(grad, at, n, whole);
    Pack<T> pack = read_pack(x, at, n, whole);
    for (int j = 0; j < n; ++j) {
      const int e = extra[at(j)];
      ExtraLevelGrad g = {NAN, NAN};
      if (makes_grid(grid, e)) {
        g = extra_level_fake_quantize_grad(static_cast<float>(gs.v[j]), static_cast<float>(pack.v[j]), grid.scale,
                                           grid.range, e, a.rounding);
      }
      pack.v[j] = static_cast<T>(g.dx);
      values[0] += g.dscale;
    }
    if (dx != nullptr) {
      write_pack(dx, at, n, whole, pack);
    }
  });
  reduce_in_block(sums, values, 1, partials + block);
}

}  // namespace mixbit::kernels::cuda
