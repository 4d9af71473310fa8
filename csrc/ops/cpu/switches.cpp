// update_level_switches_ and freeze_oscillating_: all weights of a model in one parallel region.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../levels.h"
#include "../parallel.h"
#include "memory.h"

namespace mixbit::ops {

namespace {

// Codes of these ops are int8.
constexpr int kMostBits = 8;

// The grids of a weight, and the widest of its bit-widths, which `reserve` more bits may join.
struct Grids {
  std::vector<kernels::cpu::Quantizer> quantizers;
  int widest = 0;

  Grids(const LevelWeight& job, bool narrow_range, Rounding rounding, int reserve)
      : quantizers(channel_quantizers(job.scale, at::zeros({1}), job.bit_width, /*is_signed=*/true, narrow_range,
                                      rounding, job.walk.view.channels)) {
    const float* bits = job.bit_width.const_data_ptr<float>();
    for (int64_t i = 0; i < job.bit_width.numel(); ++i) {
      TORCH_CHECK_VALUE(static_cast<int>(bits[i]) + reserve <= kMostBits, "bit_width[", i, "]=", bits[i],
                        ": expected at most ", kMostBits - reserve, ", since codes are kept as int8");
      widest = std::max(widest, static_cast<int>(bits[i]));
    }
  }

  void check_extra_bits(int most) const {
    TORCH_CHECK_VALUE(most <= kMaxExtraBits && widest + most <= kMostBits, "extra_bits holds ", most,
                      " with bit_width ", widest, ": expected at most ", kMaxExtraBits, ", and together at most ",
                      kMostBits);
  }
};

template <typename Job>
std::vector<Grids> grids_of(const std::vector<Job>& jobs, at::TensorList weights, bool narrow_range, Rounding rounding,
                            int reserve) {
  std::vector<Grids> grids;
  for_each_in_list(weights, [&](size_t i) { grids.emplace_back(jobs[i], narrow_range, rounding, reserve); });
  return grids;
}

// f(tensor, run, quantizer) -> LevelFindings for every run of every weight; returns the counts of the weights.
template <typename Job, typename F>
at::Tensor for_each_level_run(at::TensorList weights, const std::vector<Job>& jobs, const std::vector<Grids>& grids,
                              const F& f) {
  std::vector<AxisView> views;
  std::vector<std::vector<kernels::cpu::LevelFindings>> found;
  for (const Job& job : jobs) {
    views.push_back(job.walk.view);
    found.emplace_back(static_cast<size_t>(runs_per_channel(job.walk.view) * job.walk.view.channels));
  }
  for_each_run(views, [&](size_t t, int64_t index, const Run& run) {
    found[t][static_cast<size_t>(index)] = f(t, run, grids[t].quantizers[static_cast<size_t>(run.channel)]);
  });
  for (const Job& job : jobs) {
    job.finish();
  }
  at::Tensor counts = at::zeros({static_cast<int64_t>(jobs.size())}, at::TensorOptions().dtype(at::kLong));
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  for_each_in_list(weights, [&](size_t i) {
    int32_t most = 0;
    for (const auto& [count, extra_bits] : found[i]) {
      out[i] += count;
      most = std::max(most, extra_bits);
    }
    grids[i].check_extra_bits(most);
  });
  return counts;
}

// The part of a state that belongs to a run.
template <typename T>
T* from(T* data, const Run& run) {
  return data == nullptr ? data : data + run.start;
}

at::Tensor update_level_switches_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                  at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                                  at::TensorList counts, at::TensorList runs, int64_t given_score,
                                  double given_momentum, bool narrow_range, std::optional<int64_t> axis,
                                  int64_t rounding) {
  const SwitchScore score = checked_score(given_score);
  const float momentum = checked_momentum(given_momentum);
  const auto jobs = switch_jobs(weights, scales, bit_widths, extra_bits, codes, marks, counts, runs, axis, score);
  const std::vector<Grids> grids = grids_of(jobs, weights, narrow_range, checked_rounding(rounding), 0);
  std::vector<std::pair<const void*, const uint8_t*>> data;
  std::vector<kernels::cpu::SwitchStates> states;
  for (const SwitchJob& job : jobs) {
    data.emplace_back(job.walk.source.const_data_ptr(), job.extra_data());
    states.push_back(job.states());
  }
  const auto& kernels = cpu_kernels();
  return for_each_level_run(weights, jobs, grids, [&](size_t t, const Run& run, const kernels::cpu::Quantizer& q) {
    const at::Tensor& weight = jobs[t].weight;
    const auto& [x, bits] = data[t];
    const kernels::cpu::SwitchStates& s = states[t];
    return kernels.count_switches(
        storage_type(weight), at_offset(x, run.start, weight.element_size()), from(bits, run), run.length, q, score,
        momentum,
        {from(s.codes, run), from(s.marks, run), from(s.counts, run), from(s.runs, run), from(s.frequencies, run)});
  });
}

at::Tensor freeze_oscillating_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                               at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                               at::TensorList frequencies, at::TensorList averages, double given_threshold,
                               double given_momentum, bool narrow_range, std::optional<int64_t> axis,
                               int64_t rounding) {
  const float threshold = checked_threshold(given_threshold);
  const float momentum = checked_momentum(given_momentum);
  const auto jobs = freeze_jobs(weights, scales, bit_widths, extra_bits, codes, marks, frequencies, averages, axis);
  const std::vector<Grids> grids = grids_of(jobs, weights, narrow_range, checked_rounding(rounding), kMaxExtraBits);
  std::vector<std::pair<void*, const uint8_t*>> data;
  std::vector<kernels::cpu::FreezeStates> states;
  for (const FreezeJob& job : jobs) {
    data.emplace_back(job.walk.source.mutable_data_ptr(), job.extra_data());
    states.push_back(job.states());
  }
  const auto& kernels = cpu_kernels();
  return for_each_level_run(weights, jobs, grids, [&](size_t t, const Run& run, const kernels::cpu::Quantizer& q) {
    const at::Tensor& weight = jobs[t].weight;
    const auto& [x, bits] = data[t];
    const kernels::cpu::FreezeStates& s = states[t];
    return kernels.freeze_oscillating(
        storage_type(weight), at_offset(x, run.start, weight.element_size()), from(bits, run), run.length, q, momentum,
        threshold, {from(s.codes, run), from(s.marks, run), from(s.frequencies, run), from(s.averages, run)});
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("update_level_switches_", update_level_switches_);
  m.impl("freeze_oscillating_", freeze_oscillating_);
}

}  // namespace mixbit::ops
