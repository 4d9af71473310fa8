#include "packing.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

void launch_pack_bits(const int32_t* codes, int64_t rows, int64_t n, int bits, uint8_t* packed, CUstream_st* stream) {
  pack_bits_kernel<<<grid_size(rows * packed_bytes(n, bits), kThreads), kThreads, 0, stream>>>(codes, rows, n, bits,
                                                                                               packed);
}

void launch_unpack_bits(const uint8_t* packed, int64_t rows, int64_t n, int bits, bool is_signed, int32_t* codes,
                        CUstream_st* stream) {
  unpack_bits_kernel<<<grid_size(rows * n, kThreads), kThreads, 0, stream>>>(packed, rows, n, bits, is_signed, codes);
}

}  // namespace mixbit::kernels::cuda
