#pragma once

// What the launchers of the .cu files share.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include <mixbit/kernels/cuda.h>

namespace mixbit::kernels::cuda {

// Grid-stride: enough blocks for every multiprocessor, no more.
inline unsigned grid_size(int64_t threads_wanted, int threads) {
  constexpr int64_t kMaxBlocks = 4096;
  return static_cast<unsigned>(std::clamp<int64_t>((threads_wanted + threads - 1) / threads, 1, kMaxBlocks));
}

// Enough blocks for one thread a value.
inline unsigned blocks_for(int64_t values, int threads) {
  return static_cast<unsigned>((values + threads - 1) / threads);
}

// f(T{}) with the element type of a storage type.
template <typename F>
void with_element(StorageType storage, const F& f) {
  switch (storage) {
    case StorageType::kFloat32:
      return f(float{});
    case StorageType::kFloat16:
      return f(__half{});
    case StorageType::kBFloat16:
      return f(__nv_bfloat16{});
  }
}

}  // namespace mixbit::kernels::cuda
