#include <mixbit/runtime/kernels.h>

#if defined(MIXBIT_RUNTIME_X86)
#include <cpuid.h>
#endif
#if defined(MIXBIT_RUNTIME_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tables.h"

namespace mixbit::runtime {

namespace {

#if defined(MIXBIT_RUNTIME_X86)
// The kernel hands out the tiles' state on request, once a process; threads started later inherit the permission.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(MIXBIT_RUNTIME_X86)
// AMX tiles and int8 products, and GFNI, which every processor with AMX has so far and which the kernels use. Not by
// __builtin_cpu_supports: clang before 17 does not know the names.
bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) {
    return false;
  }
  return (edx >> 24 & 1) != 0 && (edx >> 25 & 1) != 0 && (ecx >> 8 & 1) != 0;
}
#endif

Isa find_processor_isa() {
#if defined(MIXBIT_RUNTIME_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) {
    return Isa::kScalar;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512;
  }
  return has_tiles() && tiles_granted() ? Isa::kAmx : Isa::kVnni;
#else
  return Isa::kScalar;
#endif
}

Isa processor_isa() {
  static const Isa isa = find_processor_isa();
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = capped_isa(processor_isa());
  return isa;
}

const KernelTable& kernels(Isa isa) {
  const Isa widest = processor_isa();
  return table_up_to(isa < widest ? isa : widest);
}

}  // namespace mixbit::runtime
