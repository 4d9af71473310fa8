#include "steps.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

void launch_sgd_step_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                          const StepArguments& arguments, const SgdRule& rule, CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    sgd_step_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count, arguments, rule);
  });
}

void launch_adam_step_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                           const StepArguments& arguments, const AdamRule& rule, const AdamArguments& adam,
                           CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    adam_step_list_kernel<T>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count, arguments, rule, adam);
  });
}

void launch_scale_updates_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                               const StepMultiplier& multiplier, CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    scale_updates_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count, multiplier);
  });
}

void launch_step_multipliers_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                                  const StepMultiplier& multiplier, CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    step_multipliers_list_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count, multiplier);
  });
}

}  // namespace mixbit::kernels::cuda
