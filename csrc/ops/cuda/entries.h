#pragma once

// Lists of tensors for one launch: entries of one storage type each, copied to the device without waiting.

#include <ATen/Functions.h>
#include <mixbit/kernels/cuda.h>

#include <array>
#include <cstring>
#include <vector>

namespace mixbit::ops {

// The entries as bytes on the device; pinned memory on the way, so that the copy waits for nothing.
template <typename Entry>
at::Tensor on_device(const std::vector<Entry>& entries, at::Device device) {
  const auto bytes = static_cast<int64_t>(entries.size() * sizeof(Entry));
  const at::Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.mutable_data_ptr(), entries.data(), static_cast<size_t>(bytes));
  return host.to(device, at::kByte, /*non_blocking=*/true);
}

// Blocks of `elements`, none for none.
inline int64_t blocks_of(int64_t elements) { return elements == 0 ? 0 : kernels::cuda::reduce_blocks(elements); }

inline constexpr std::array<kernels::StorageType, 3> kStorageTypes = {
    kernels::StorageType::kFloat32, kernels::StorageType::kFloat16, kernels::StorageType::kBFloat16};

inline void check_one_device(at::TensorList xs) {
  for (size_t i = 0; i < xs.size(); ++i) {
    TORCH_CHECK_VALUE(xs[i].device() == xs[0].device(), "xs[", i, "] is on ", xs[i].device(), " and xs[0] on ",
                      xs[0].device(), ": expected one device");
  }
}

}  // namespace mixbit::ops
