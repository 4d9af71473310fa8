#pragma once

// Sums that have the same bits every time: a block owns kReduceBlock consecutive elements, each thread a fixed set of
// them in fp32, the block adds its threads in a fixed tree in double, and blocks are added in order. No atomics.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

namespace mixbit::kernels::cuda {

constexpr int kThreads = 256;

// Adds kCount values of every thread of the block; thread 0 writes them to out. Every thread must call it.
template <int kCount>
__device__ inline void reduce_in_block(double (&sums)[kCount][kThreads], const float (&values)[kCount], int count,
                                       double* out) {
  for (int k = 0; k < kCount; ++k) {
    sums[k][threadIdx.x] = values[k];
  }
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      for (int k = 0; k < kCount; ++k) {
        sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    for (int k = 0; k < count; ++k) {
      out[k] = sums[k][0];
    }
  }
  __syncthreads();
}

// partials: [groups, blocks, per_group]. Adds the blocks in order, one thread a sum, for the values first ... first +
// count - 1 of every group; out: [count, groups].
template <typename T>
__global__ void add_blocks_kernel(const double* partials, int64_t groups, int64_t blocks, int64_t per_group,
                                  int64_t first, int64_t count, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= groups * count) {
    return;
  }
  const int64_t group = at % groups;
  const int64_t value = first + at / groups;
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    sum += partials[(group * blocks + b) * per_group + value];
  }
  out[at] = static_cast<T>(sum);
}

}  // namespace mixbit::kernels::cuda
