#include <mixbit/kernels/cpu.h>

namespace mixbit::kernels::cpu {

extern const KernelTable kKernels_scalar;
#if defined(MIXBIT_KERNELS_X86)
extern const KernelTable kKernels_avx2;
extern const KernelTable kKernels_avx512;
#endif

namespace {

Isa processor_isa() {
#if defined(MIXBIT_KERNELS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? Isa::kVnni : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

}  // namespace

Isa detected_isa() {
  // A value that is no instruction set is reported by the ops when they are loaded.
  static const Isa isa = capped_isa(processor_isa());
  return isa;
}

const KernelTable& kernels(Isa isa) {
#if defined(MIXBIT_KERNELS_X86)
  const Isa widest = processor_isa();
  const Isa use = isa < widest ? isa : widest;
  if (use >= Isa::kAvx512) return kKernels_avx512;
  if (use >= Isa::kAvx2) return kKernels_avx2;
#else
  (void)isa;
#endif
  return kKernels_scalar;
}

}  // namespace mixbit::kernels::cpu
