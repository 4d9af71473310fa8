#include "simd_avx512.h"

#include "kernels-inl.h"

namespace mixbit::kernels::cpu {
extern const KernelTable kKernels_avx512;
const KernelTable kKernels_avx512 = table_of(Isa::kAvx512);
}  // namespace mixbit::kernels::cpu
