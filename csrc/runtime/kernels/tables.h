#pragma once

#include <mixbit/runtime/kernels.h>

namespace mixbit::runtime {

extern const KernelTable kKernels_scalar;

// The table of the widest instruction set that has one, up to `isa`.
inline const KernelTable& table_up_to(Isa isa) {
  (void)isa;
  return kKernels_scalar;
}

}  // namespace mixbit::runtime
