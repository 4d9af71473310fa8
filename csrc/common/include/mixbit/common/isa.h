#pragma once

// Instruction sets and their names, as MIXBIT_CPU_ISA caps them.

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

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

// Parses scalar | avx2 | avx512 | vnni | amx; returns false for anything else.
inline __attribute__((always_inline)) bool parse_isa(const char* text, Isa* isa) {
  for (const Isa candidate : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni, Isa::kAmx}) {
    // Not strcmp: of literals, inlined, GCC warns that two lengths can never be equal.
    const char* given = text;
    const char* name = isa_name(candidate);
    while (*given != '\0' && *given == *name) {
      ++given;
      ++name;
    }
    if (*given == *name) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

// The instruction set, or the cap in MIXBIT_CPU_ISA if that is less; a value that is none does not cap.
inline __attribute__((always_inline)) Isa capped_isa(Isa widest) {
  const char* text = std::getenv("MIXBIT_CPU_ISA");
  Isa cap;
  return text != nullptr && parse_isa(text, &cap) && cap < widest ? cap : widest;
}

}  // namespace mixbit
