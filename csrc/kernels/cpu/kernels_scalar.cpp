#include "simd_scalar.h"

#include "kernels-inl.h"

namespace mixbit::kernels::cpu {
extern const KernelTable kKernels_scalar;
const KernelTable kKernels_scalar = table_of(Isa::kScalar);
}  // namespace mixbit::kernels::cpu
