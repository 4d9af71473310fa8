#pragma once

// Names of instruction sets, as MIXBIT_CPU_ISA caps them.

#include <cstdint>

#include <mixbit/common/macros.h>

namespace mixbit {

// Ordered: each includes the ones before it. VNNI and AMX matter to integer kernels only.
enum class Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kVnni = 3, kAmx = 4 };

MIXBIT_HD const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kVnni:
      return "vnni";
    case Isa::kAmx:
      return "amx";
    default:
      return "scalar";
  }
}

}  // namespace mixbit
