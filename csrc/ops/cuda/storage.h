#pragma once

#include <ATen/core/Tensor.h>

#include <mixbit/kernels/cuda.h>

namespace mixbit::ops {

inline kernels::cuda::StorageType cuda_storage_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return kernels::cuda::StorageType::kFloat16;
    case at::kBFloat16:
      return kernels::cuda::StorageType::kBFloat16;
    default:
      return kernels::cuda::StorageType::kFloat32;
  }
}

}  // namespace mixbit::ops
