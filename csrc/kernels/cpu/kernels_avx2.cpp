#include "simd_avx2.h"

#include "kernels-inl.h"

namespace mixbit::kernels::cpu {
extern const KernelTable kKernels_avx2;
const KernelTable kKernels_avx2 = table_of(Isa::kAvx2);
}  // namespace mixbit::kernels::cpu
