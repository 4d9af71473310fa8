#pragma once

// The one place where ops start threads.

#include <ATen/Parallel.h>

#include <algorithm>
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

// Runs of one channel: position i of channel c has the index c * runs_per_channel + i, so that sums can be added in
// order afterwards.
inline int64_t runs_per_channel(const AxisView& view) {
  const int64_t per_row = (view.inner + kernels::cpu::kReduceBlock - 1) / kernels::cpu::kReduceBlock;
  return view.outer * per_row;
}

// Calls f(tensor, index, run) for every run of every view, in one parallel region. What a run is does not depend on
// threads.
template <typename F>
void for_each_run(c10::ArrayRef<AxisView> views, const F& f) {
  int64_t elements = 0;
  std::vector<int64_t> last_run(views.size());  // runs up to and including a tensor's
  int64_t total = 0;
  for (size_t t = 0; t < views.size(); ++t) {
    total += runs_per_channel(views[t]) * views[t].channels;
    elements += views[t].outer * views[t].channels * views[t].inner;
    last_run[t] = total;
  }
  if (total == 0) {
    return;
  }
  // A thread gets at least about 32 Ki elements.
  const int64_t grain = std::max<int64_t>(1, 32768 * total / std::max<int64_t>(1, elements));
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    auto t = static_cast<size_t>(std::upper_bound(last_run.begin(), last_run.end(), begin) - last_run.begin());
    for (int64_t i = begin; i < end; ++i) {  // memory order: tensor, outer, channel, block
      while (i >= last_run[t]) {
        ++t;
      }
      const AxisView& view = views[t];
      const int64_t per_row = (view.inner + kernels::cpu::kReduceBlock - 1) / kernels::cpu::kReduceBlock;
      const int64_t own = i - (last_run[t] - runs_per_channel(view) * view.channels);
      const int64_t block = own % per_row;
      const int64_t row = own / per_row;
      const int64_t channel = row % view.channels;
      const int64_t outer = row / view.channels;
      const int64_t first = block * kernels::cpu::kReduceBlock;
      f(t, channel * view.outer * per_row + outer * per_row + block,
        Run{row * view.inner + first, std::min(kernels::cpu::kReduceBlock, view.inner - first), channel});
    }
  });
}

// The runs of one view: f(index, run).
template <typename F>
void for_each_run(const AxisView& view, const F& f) {
  for_each_run(c10::ArrayRef<AxisView>(view), [&](size_t, int64_t index, const Run& run) { f(index, run); });
}

// The gradient of a parameter from the sums of runs, added in order: one a channel, or all in one.
inline at::Tensor reduce_channels(const std::vector<double>& partials, int64_t per_channel, int64_t channels,
                                  const at::Tensor& parameter) {
  at::Tensor result = at::zeros_like(parameter);
  float* out = result.mutable_data_ptr<float>();
  double all = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t i = 0; i < per_channel; ++i) {
      sum += partials[static_cast<size_t>(c * per_channel + i)];
    }
    if (parameter.numel() == channels) {
      out[c] = static_cast<float>(sum);
    }
    all += sum;
  }
  if (parameter.numel() == 1) {
    out[0] = static_cast<float>(all);
  }
  return result;
}

}  // namespace mixbit::ops
