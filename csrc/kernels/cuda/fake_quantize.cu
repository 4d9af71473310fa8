#include "fake_quantize.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

int64_t reduce_blocks(int64_t elements) { return std::max<int64_t>(1, (elements + kReduceBlock - 1) / kReduceBlock); }

void launch_fake_quantize(const QuantizeArguments& a, const void* x, void* y, CUstream_st* stream) {
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    const int64_t packs = a.outer * a.channels * a.inner / Pack<T>::kSize + 1;
    fake_quantize_kernel<T><<<grid_size(packs, kThreads), kThreads, 0, stream>>>(
        a, static_cast<const T*>(x), static_cast<T*>(y), is_aligned(x) && is_aligned(y));
  });
}

void launch_fake_quantize_backward(const QuantizeArguments& a, const void* grad, const void* x, void* dx,
                                   double* partials, float* dscale, float* dzero_point, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(a);
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    fake_quantize_backward_kernel<T><<<static_cast<unsigned>(a.channels * blocks), kThreads, 0, stream>>>(
        a, blocks, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(dx),
        is_aligned(grad) && is_aligned(x) && is_aligned(dx), partials);
  });
  const unsigned grid = blocks_for(a.channels, kThreads);
  add_blocks_kernel<<<grid, kThreads, 0, stream>>>(partials, a.channels, blocks, 2, 0, 1, dscale);
  add_blocks_kernel<<<grid, kThreads, 0, stream>>>(partials, a.channels, blocks, 2, 1, 1, dzero_point);
}

void launch_fake_quantize_list(StorageType storage, const QuantizeEntry* entries, int64_t count, int64_t blocks,
                               CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    fake_quantize_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count);
  });
}

void launch_fake_quantize_backward_list(StorageType storage, const QuantizeEntry* entries, int64_t count,
                                        int64_t blocks, int64_t channels, CUstream_st* stream) {
  if (blocks > 0) {
    with_element(storage, [&](auto element) {
      using T = decltype(element);
      fake_quantize_backward_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count);
    });
  }
  add_list_kernel<<<blocks_for(channels, kThreads), kThreads, 0, stream>>>(entries, count, channels);
}

void launch_fake_quantize_mask(const QuantizeArguments& a, const void* x, void* y, uint8_t* mask, CUstream_st* stream) {
  const int64_t bytes = a.outer * a.channels * ((a.inner + 7) / 8);
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    fake_quantize_mask_kernel<T><<<grid_size(bytes, kThreads), kThreads, 0, stream>>>(
        a, static_cast<const T*>(x), static_cast<T*>(y), mask, is_aligned(x) && is_aligned(y));
  });
}

void launch_apply_mask(StorageType storage, int64_t rows, int64_t inner, const void* grad, const uint8_t* mask,
                       void* dx, CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    apply_mask_kernel<T><<<grid_size(rows * ((inner + 7) / 8), kThreads), kThreads, 0, stream>>>(
        rows, inner, static_cast<const T*>(grad), mask, static_cast<T*>(dx), is_aligned(grad) && is_aligned(dx));
  });
}

}  // namespace mixbit::kernels::cuda
