#pragma once

// Bodies of the kernels that count level switches and freeze weights. Host code may compile them too.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// Codes are kept as int8.
constexpr int kMostLevelBits = 8;

// The grid of one weight.
struct WeightGrid {
  float scale;
  QuantRange range;
  int extra;
  bool valid;
};

// reserve: bits that must fit beside the bit-width, at least the weight's own extra ones.
__device__ inline WeightGrid weight_grid(const LevelEntry& e, int64_t i, int reserve) {
  const QuantizeArguments& a = e.arguments;
  const int64_t channel = i / a.inner % a.channels;
  const float bits = a.bit_width[a.bit_width_count == 1 ? 0 : channel];
  WeightGrid grid;
  grid.extra = e.extra_bits == nullptr ? 0 : e.extra_bits[i];
  grid.valid = is_valid_bit_width(bits) && !(a.narrow_range && bits == 1.0f) && grid.extra <= kMaxExtraBits &&
               static_cast<int>(bits) + (reserve > grid.extra ? reserve : grid.extra) <= kMostLevelBits;
  grid.range = quant_range(grid.valid ? static_cast<int>(bits) : kMostLevelBits, true, a.narrow_range);
  grid.scale = a.scale[a.scale_count == 1 ? 0 : channel];
  return grid;
}

// Calls f(i) for the elements of this thread in block `block` of an entry; the block's sum of the results to partials.
template <typename F>
__device__ inline void sum_over_block(const LevelEntry& e, int64_t block, double (&sums)[1][kThreads], double* partials,
                                      const F& f) {
  const int64_t numel = e.arguments.outer * e.arguments.channels * e.arguments.inner;
  const int64_t first = block * kReduceBlock;
  const int64_t last = first + kReduceBlock < numel ? first + kReduceBlock : numel;
  int count[1] = {0};
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    count[0] += f(i) ? 1 : 0;
  }
  reduce_in_block(sums, count, 1, partials);
}

// grid: the blocks of all entries.
template <typename T, SwitchScore kScore>
__global__ void count_switches_kernel(const LevelEntry* entries, int64_t count, float momentum, double* partials) {
  __shared__ double sums[1][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const LevelEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  sum_over_block(e, block - e.first_block, sums, partials + block, [&](int64_t i) {
    const WeightGrid grid = weight_grid(e, i, 0);
    if (!grid.valid) {
      return false;
    }
    SwitchState state{e.codes[i], e.marks == nullptr ? 0 : e.marks[i], e.counts == nullptr ? 0 : e.counts[i],
                      e.runs == nullptr ? 0 : e.runs[i], e.frequencies == nullptr ? 0.0f : e.frequencies[i]};
    const int code = counted_code(static_cast<float>(static_cast<const T*>(e.weight)[i]), grid.scale, grid.range,
                                  grid.extra, e.arguments.rounding, state.code);
    const bool switched = count_switch<kScore>(code, momentum, state);
    if (switched) {
      e.codes[i] = static_cast<int8_t>(state.code);
      if (e.marks != nullptr) {
        e.marks[i] = static_cast<int8_t>(state.mark);
      }
      if (e.counts != nullptr) {
        e.counts[i] = static_cast<int16_t>(state.count);
      }
      if (e.runs != nullptr) {
        e.runs[i] = static_cast<int16_t>(state.run);
      }
    }
    if (e.frequencies != nullptr) {
      e.frequencies[i] = state.frequency;
    }
    return switched;
  });
}

template <typename T>
__global__ void freeze_oscillating_kernel(const LevelEntry* entries, int64_t count, float momentum, float threshold,
                                          double* partials) {
  __shared__ double sums[1][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const LevelEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  sum_over_block(e, block - e.first_block, sums, partials + block, [&](int64_t i) {
    const WeightGrid grid = weight_grid(e, i, kMaxExtraBits);
    if (!grid.valid) {
      return false;
    }
    T* weight = static_cast<T*>(e.weight) + i;
    FreezeState state{e.codes[i], e.marks[i], e.frequencies[i], e.averages[i]};
    const float held = mixbit::freeze_oscillating(static_cast<float>(*weight), grid.scale, grid.range, grid.extra,
                                                  e.arguments.rounding, momentum, threshold, state);
    e.codes[i] = static_cast<int8_t>(state.code);
    e.marks[i] = static_cast<int8_t>(state.mark);
    e.frequencies[i] = state.frequency;
    e.averages[i] = state.average;
    const bool frozen = state.mark == kFrozen;
    if (frozen) {
      *weight = static_cast<T>(held);
    }
    return frozen;
  });
}

// One thread an entry: its blocks added in order.
__global__ void add_findings_kernel(const LevelEntry* entries, int64_t count, const double* partials) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) {
    const LevelEntry& e = entries[at];
    *e.result = static_cast<int64_t>(sum_of_blocks(partials + e.first_block, 0, e.blocks, 1, 0));
  }
}

}  // namespace mixbit::kernels::cuda
