#pragma once

// The one place where ops start threads.

#include <ATen/Parallel.h>

#include <cstdint>
#include <vector>

#include "checks.h"
#include "walk.h"

#ifndef INTRA_OP_PARALLEL
#error "built without OpenMP: at::parallel_for would be silently serial"
#endif

namespace mixbit::ops {

// A contiguous run of elements of one channel, at most kReduceBlock long.
struct Run {
  int64_t start;
  int64_t length;
  int64_t channel;
};

// All runs of a view, in an order that does not depend on threads: for_each_run(view, f) calls f(index, run) with
// index = channel * runs_per_channel + position, so that sums can be added in order afterwards.
inline int64_t runs_per_channel(const AxisView& view) {
  const int64_t per_row = (view.inner + kernels::cpu::kReduceBlock - 1) / kernels::cpu::kReduceBlock;
  return view.outer * per_row;
}

template <typename F>
void for_each_run(const AxisView& view, const F& f) {
  const int64_t per_row = (view.inner + kernels::cpu::kReduceBlock - 1) / kernels::cpu::kReduceBlock;
  const int64_t total = view.outer * view.channels * per_row;
  if (total == 0) {
    return;
  }
  // A thread gets at least about 32 Ki elements.
  const int64_t length = std::max<int64_t>(1, std::min(view.inner, kernels::cpu::kReduceBlock));
  const int64_t grain = std::max<int64_t>(1, 32768 / length);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // memory order: outer, channel, block
      const int64_t block = i % per_row;
      const int64_t row = i / per_row;
      const int64_t channel = row % view.channels;
      const int64_t outer = row / view.channels;
      const int64_t first = block * kernels::cpu::kReduceBlock;
      f(channel * view.outer * per_row + outer * per_row + block,
        Run{row * view.inner + first, std::min(kernels::cpu::kReduceBlock, view.inner - first), channel});
    }
  });
}

}  // namespace mixbit::ops
