#include "mixture.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

namespace {

// f(T{}, count) with the storage type and the number of grids as types.
template <typename F>
void with_grids(const MixtureArguments& a, const F& f) {
  with_element(a.storage, [&](auto element) {
    if (a.count == 3) {
      f(element, std::integral_constant<int, 3>{});
    } else {
      f(element, std::integral_constant<int, 0>{});
    }
  });
}

}  // namespace

void launch_mixture(const MixtureArguments& a, const void* x, void* y, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(a.outer * a.inner);
  with_grids(a, [&](auto element, auto count) {
    using T = decltype(element);
    mixture_kernel<T, decltype(count)::value>
        <<<static_cast<unsigned>(a.samples * a.channels * blocks), kThreads, 0, stream>>>(
            a, blocks, static_cast<const T*>(x), static_cast<T*>(y), is_aligned(x) && is_aligned(y));
  });
}

void launch_mixture_backward(const MixtureArguments& a, const void* grad, const void* x, void* dx, double* partials,
                             double* levels, double* steps, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(a.outer * a.inner);
  with_grids(a, [&](auto element, auto count) {
    using T = decltype(element);
    mixture_backward_kernel<T, decltype(count)::value>
        <<<static_cast<unsigned>(a.samples * a.channels * blocks), kThreads, 0, stream>>>(
            a, blocks, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(dx),
            is_aligned(grad) && is_aligned(x) && is_aligned(dx), partials);
  });
  const int64_t per_block = a.level_count() + a.step_count();
  add_blocks_kernel<<<blocks_for(a.samples * a.level_count(), kThreads), kThreads, 0, stream>>>(
      partials, a.samples, a.channels * blocks, per_block, 0, a.level_count(), levels);
  add_blocks_kernel<<<blocks_for(a.samples * a.channels * a.step_count(), kThreads), kThreads, 0, stream>>>(
      partials, a.samples * a.channels, blocks, per_block, a.level_count(), a.step_count(), steps);
}

void launch_gate_gradients(const double* sums, const float* gates, int64_t samples, int64_t count, float* dgates,
                           CUstream_st* stream) {
  gate_gradients_kernel<<<blocks_for(samples, kThreads), kThreads, 0, stream>>>(sums, gates, samples, count, dgates);
}

}  // namespace mixbit::kernels::cuda
