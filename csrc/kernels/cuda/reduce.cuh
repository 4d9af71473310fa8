#pragma once

// Sums that have the same bits every time: a block owns kReduceBlock consecutive elements, each thread a fixed set of
// them in fp32, the block adds its threads in a fixed tree in double, and blocks are added in order. No atomics. Which
// thread owns an element follows from the element's index, never from an address.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

namespace mixbit::kernels::cuda {

constexpr int kThreads = 256;

// Sixteen bytes: what a thread reads and writes at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// The part of one channel that a block owns, seen in x as [outer, channels, inner].
struct BlockPart {
  int64_t channels;
  int64_t inner;
  int64_t channel;
  int64_t first;  // of the channel's outer * inner elements
  int64_t last;
};

__device__ inline BlockPart block_part(int64_t outer, int64_t channels, int64_t inner, int64_t blocks, int64_t block) {
  const int64_t count = outer * inner;
  const int64_t first = (block % blocks) * kReduceBlock;
  return {channels, inner, block / blocks, first, first + kReduceBlock < count ? first + kReduceBlock : count};
}

// Calls f(at, n, whole) for the packs of this thread: n elements, of which element j has the index at(j) in x; `whole`
// where a pack may be read and written at once.
template <typename T, typename F>
__device__ inline void for_each_pack(const BlockPart& part, bool aligned, const F& f) {
  constexpr int kSize = Pack<T>::kSize;
  const bool rows_of_packs = part.channels == 1 || part.inner % kSize == 0;
  for (int64_t i = part.first + static_cast<int64_t>(threadIdx.x) * kSize; i < part.last; i += kThreads * kSize) {
    const int n = static_cast<int>(part.last - i < kSize ? part.last - i : kSize);
    const auto at = [&](int j) {
      const int64_t e = i + j;
      return part.channels == 1 ? e : ((e / part.inner) * part.channels + part.channel) * part.inner + e % part.inner;
    };
    f(at, n, aligned && rows_of_packs && n == kSize);
  }
}

// Reads and writes a pack at once or element by element.
template <typename T, typename At>
__device__ inline Pack<T> read_pack(const T* x, const At& at, int n, bool whole) {
  if (whole) {
    return *reinterpret_cast<const Pack<T>*>(x + at(0));
  }
  Pack<T> pack{};
  for (int j = 0; j < n; ++j) {
    pack.v[j] = x[at(j)];
  }
  return pack;
}
template <typename T, typename At>
__device__ inline void write_pack(T* x, const At& at, int n, bool whole, const Pack<T>& pack) {
  if (whole) {
    *reinterpret_cast<Pack<T>*>(x + at(0)) = pack;
  } else {
    for (int j = 0; j < n; ++j) {
      x[at(j)] = pack.v[j];
    }
  }
}

// Adds kCount values of every thread of the block; thread 0 writes the first `count` sums to out. Every thread must
// call it.
template <int kCount, typename V>
__device__ inline void reduce_in_block(double (&sums)[kCount][kThreads], const V (&values)[kCount], int count,
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

// The last entry whose first(i) is at most `value`; entries are sorted by it, the first one starts at 0.
template <typename First>
__device__ inline int64_t find_entry(int64_t count, int64_t value, const First& first) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// partials: [groups, blocks, per_group]. The sum of one value over a group's blocks, in order.
__device__ inline double sum_of_blocks(const double* partials, int64_t group, int64_t blocks, int64_t per_group,
                                       int64_t value) {
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    sum += partials[(group * blocks + b) * per_group + value];
  }
  return sum;
}

// Adds the blocks in order, one thread a sum, for the values first ... first + count - 1 of every group; out: [count,
// groups].
template <typename T>
__global__ void add_blocks_kernel(const double* partials, int64_t groups, int64_t blocks, int64_t per_group,
                                  int64_t first, int64_t count, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < groups * count) {
    out[at] = static_cast<T>(sum_of_blocks(partials, at % groups, blocks, per_group, first + at / groups));
  }
}

}  // namespace mixbit::kernels::cuda
