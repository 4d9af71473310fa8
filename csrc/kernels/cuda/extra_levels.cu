#include "extra_levels.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

void launch_extra_levels(const QuantizeArguments& a, const void* x, const uint8_t* extra, void* y,
                         CUstream_st* stream) {
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    const int64_t packs = a.outer * a.channels * a.inner / Pack<T>::kSize + 1;
    extra_levels_kernel<T><<<grid_size(packs, kThreads), kThreads, 0, stream>>>(
        a, static_cast<const T*>(x), extra, static_cast<T*>(y), is_aligned(x) && is_aligned(y));
  });
}

void launch_extra_levels_backward(const QuantizeArguments& a, const void* grad, const void* x, const uint8_t* extra,
                                  void* dx, double* partials, float* dscale, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(a);
  with_element(a.storage, [&](auto element) {
    using T = decltype(element);
    extra_levels_backward_kernel<T><<<static_cast<unsigned>(a.channels * blocks), kThreads, 0, stream>>>(
        a, blocks, static_cast<const T*>(grad), static_cast<const T*>(x), extra, static_cast<T*>(dx),
        is_aligned(grad) && is_aligned(x) && is_aligned(dx), partials);
  });
  add_blocks_kernel<<<blocks_for(a.channels, kThreads), kThreads, 0, stream>>>(partials, a.channels, blocks, 1, 0, 1,
                                                                               dscale);
}

}  // namespace mixbit::kernels::cuda
