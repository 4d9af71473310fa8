#pragma once

// Functions marked MIXBIT_HD are compiled for the host and, by nvcc, for the device: one source for both.
#if defined(__CUDACC__)
#define MIXBIT_HD __host__ __device__ __forceinline__
#else
// Always inlined: a copy of its own would be a weak symbol that one instruction set could take from another.
#define MIXBIT_HD inline __attribute__((always_inline))
#endif
