#pragma once

// Bodies of the kernels that pack codes; see fake_quantize.cuh. One thread makes one byte, or one code: no atomics.

#include <cstdint>

#include <mixbit/common/packing.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// codes: [rows, n]; packed: [rows, packed_bytes(n, bits)].
__global__ void pack_bits_kernel(const int32_t* codes, int64_t rows, int64_t n, int bits, uint8_t* packed) {
  const int64_t row_bytes = packed_bytes(n, bits);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * row_bytes; i += step) {
    packed[i] = packed_byte(codes + i / row_bytes * n, n, bits, i % row_bytes);
  }
}

__global__ void unpack_bits_kernel(const uint8_t* packed, int64_t rows, int64_t n, int bits, bool is_signed,
                                   int32_t* codes) {
  const int64_t row_bytes = packed_bytes(n, bits);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * n; i += step) {
    codes[i] = unpacked_code(packed + i / n * row_bytes, bits, i % n, is_signed);
  }
}

}  // namespace mixbit::kernels::cuda
