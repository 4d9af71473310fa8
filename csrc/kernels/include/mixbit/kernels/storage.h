#pragma once

#include <cstdint>

namespace mixbit::kernels {

// How elements lie in memory; everything is computed in fp32.
enum class StorageType : int32_t { kFloat32, kFloat16, kBFloat16 };

}  // namespace mixbit::kernels
