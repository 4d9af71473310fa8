#pragma once

// Addresses and the memory behind them, for the CPU ops.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace mixbit::ops {

inline const char* at_offset(const void* data, int64_t elements, int64_t element_size) {
  return static_cast<const char*>(data) + elements * element_size;
}
inline char* at_offset(void* data, int64_t elements, int64_t element_size) {
  return static_cast<char*>(data) + elements * element_size;
}

// Whether stores to y should bypass the cache, where an op reads and writes `tensors` tensors of the size of y. That
// pays where they do not fit three quarters of the last level, the share that glibc's memcpy allows itself; below that,
// whoever reads y next finds it there. It costs where the pages are fresh from the system: glibc hands out blocks above
// 32 MiB anew each time.
bool beyond_cache(const at::Tensor& y, int64_t tensors);

}  // namespace mixbit::ops
