#include "switches.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

namespace {

void add_findings(const LevelEntry* entries, int64_t count, const double* partials, CUstream_st* stream) {
  add_findings_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(entries, count, partials);
}

}  // namespace

void launch_count_switches(StorageType storage, const LevelEntry* entries, int64_t count, int64_t blocks,
                           SwitchScore score, float momentum, double* partials, CUstream_st* stream) {
  const auto grid = static_cast<unsigned>(blocks);
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    switch (score) {
      case SwitchScore::kAdjacent:
        count_switches_kernel<T, SwitchScore::kAdjacent>
            <<<grid, kThreads, 0, stream>>>(entries, count, momentum, partials);
        break;
      case SwitchScore::kPair:
        count_switches_kernel<T, SwitchScore::kPair><<<grid, kThreads, 0, stream>>>(entries, count, momentum, partials);
        break;
      case SwitchScore::kOscillation:
        count_switches_kernel<T, SwitchScore::kOscillation>
            <<<grid, kThreads, 0, stream>>>(entries, count, momentum, partials);
        break;
      case SwitchScore::kEma:
        count_switches_kernel<T, SwitchScore::kEma><<<grid, kThreads, 0, stream>>>(entries, count, momentum, partials);
        break;
    }
  });
  add_findings(entries, count, partials, stream);
}

void launch_freeze_oscillating(StorageType storage, const LevelEntry* entries, int64_t count, int64_t blocks,
                               float momentum, float threshold, double* partials, CUstream_st* stream) {
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    freeze_oscillating_kernel<T>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entries, count, momentum, threshold, partials);
  });
  add_findings(entries, count, partials, stream);
}

}  // namespace mixbit::kernels::cuda
