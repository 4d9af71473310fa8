#pragma once

#include <mixbit/runtime/kernels.h>

namespace mixbit::runtime {

extern const KernelTable kKernels_scalar;
#if defined(MIXBIT_RUNTIME_X86)
extern const KernelTable kKernels_avx2;
extern const KernelTable kKernels_vnni;
extern const KernelTable kKernels_amx;

// The functions of the VNNI table, which the AMX table takes over.
namespace vnni {
int64_t packed_bytes(const Convolution& c);
void pack(const Convolution& c, const Weights& weights, void* packed);
int64_t scratch_bytes(const Convolution& c);
void convolve(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part, void* scratch);
void average_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last);
void max_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last);
void add(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
         const CodeGrid& y_grid, int64_t n);
void lookup(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n);
void quantize(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n);
void quantize_image(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels);
void dequantize(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n);
}  // namespace vnni
#endif

// The table of the widest instruction set that has one, up to `isa`.
inline const KernelTable& table_up_to(Isa isa) {
#if defined(MIXBIT_RUNTIME_X86)
  if (isa >= Isa::kAmx) return kKernels_amx;
  if (isa >= Isa::kVnni) return kKernels_vnni;
  if (isa >= Isa::kAvx2) return kKernels_avx2;  // AVX-512 without VNNI has no kernels of its own
#else
  (void)isa;
#endif
  return kKernels_scalar;
}

}  // namespace mixbit::runtime
