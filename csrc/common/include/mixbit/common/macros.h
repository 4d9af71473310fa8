#pragma once

// Functions marked MIXBIT_HD are compiled for the host and, by nvcc, for the device: one source for both.
#if defined(__CUDACC__)
#define MIXBIT_HD __host__ __device__ __forceinline__
#else
#define MIXBIT_HD inline
#endif
