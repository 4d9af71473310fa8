#include "noise.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

void launch_quantization_noise(const NoiseArguments& a, const void* x, double* partials, double* signal, double* noise,
                               CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(a.outer * a.inner);
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    quantization_noise_kernel<T><<<static_cast<unsigned>(a.channels * blocks), kThreads, 0, stream>>>(
        a, blocks, static_cast<const T*>(x), is_aligned(x), partials);
  });
  add_blocks_kernel<<<blocks_for(a.channels, kThreads), kThreads, 0, stream>>>(partials, a.channels, blocks,
                                                                               a.count + 1, 0, 1, signal);
  if (a.count > 0) {
    add_blocks_kernel<<<blocks_for(a.channels * a.count, kThreads), kThreads, 0, stream>>>(
        partials, a.channels, blocks, a.count + 1, 1, a.count, noise);
  }
}

void launch_quantization_noise_list(StorageType storage, const NoiseEntry* entries, int64_t count, int64_t blocks,
                                    int64_t sums, CUstream_st* stream) {
  if (blocks > 0) {
    with_element(storage, [&](auto element) {
      using T = decltype(element);
      quantization_noise_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count);
    });
  }
  add_noise_list_kernel<<<blocks_for(sums, kThreads), kThreads, 0, stream>>>(entries, count, sums);
}

void launch_noise_power(StorageType storage, int64_t n, const void* x, const void* reference, double* partials,
                        double* signal, double* noise, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(n);
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    noise_power_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        n, static_cast<const T*>(x), static_cast<const T*>(reference), is_aligned(x) && is_aligned(reference),
        partials);
  });
  add_blocks_kernel<<<1, kThreads, 0, stream>>>(partials, 1, blocks, 2, 0, 1, signal);
  add_blocks_kernel<<<1, kThreads, 0, stream>>>(partials, 1, blocks, 2, 1, 1, noise);
}

}  // namespace mixbit::kernels::cuda
