#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "fake_quantize.cuh"

namespace mixbit::kernels::cuda {

namespace {

// Grid-stride: enough blocks for every multiprocessor, no more.
int64_t grid_size(int64_t threads_wanted) {
  constexpr int64_t kMaxBlocks = 4096;
  return std::clamp<int64_t>((threads_wanted + kThreads - 1) / kThreads, 1, kMaxBlocks);
}

template <typename T>
void forward(const QuantizeArguments& a, const void* x, void* y, cudaStream_t stream) {
  const int64_t numel = a.outer * a.channels * a.inner;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % sizeof(Pack<T>) == 0;
  fake_quantize_kernel<T><<<grid_size(numel / Pack<T>::kSize + 1), kThreads, 0, stream>>>(a, static_cast<const T*>(x),
                                                                                          static_cast<T*>(y), aligned);
}

template <typename T>
void backward(const QuantizeArguments& a, const void* grad, const void* x, void* dx, double* partials,
              cudaStream_t stream) {
  const int64_t blocks = reduce_blocks(a);
  fake_quantize_backward_kernel<T><<<static_cast<unsigned>(a.channels * blocks), kThreads, 0, stream>>>(
      a, blocks, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(dx), partials);
}

}  // namespace

int64_t reduce_blocks(const QuantizeArguments& a) {
  return std::max<int64_t>(1, (a.outer * a.inner + kReduceBlock - 1) / kReduceBlock);
}

void launch_fake_quantize(const QuantizeArguments& a, const void* x, void* y, CUstream_st* stream) {
  switch (a.storage) {
    case StorageType::kFloat32:
      return forward<float>(a, x, y, stream);
    case StorageType::kFloat16:
      return forward<__half>(a, x, y, stream);
    case StorageType::kBFloat16:
      return forward<__nv_bfloat16>(a, x, y, stream);
  }
}

void launch_fake_quantize_backward(const QuantizeArguments& a, const void* grad, const void* x, void* dx,
                                   double* partials, float* dscale, float* dzero_point, CUstream_st* stream) {
  switch (a.storage) {
    case StorageType::kFloat32:
      backward<float>(a, grad, x, dx, partials, stream);
      break;
    case StorageType::kFloat16:
      backward<__half>(a, grad, x, dx, partials, stream);
      break;
    case StorageType::kBFloat16:
      backward<__nv_bfloat16>(a, grad, x, dx, partials, stream);
      break;
  }
  finish_reduce_kernel<<<grid_size(a.channels), kThreads, 0, stream>>>(partials, a.channels, reduce_blocks(a), dscale,
                                                                       dzero_point);
}

}  // namespace mixbit::kernels::cuda
