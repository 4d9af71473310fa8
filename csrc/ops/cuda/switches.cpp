#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../levels.h"
#include "entries.h"

namespace mixbit::ops {

namespace {

namespace cuda = kernels::cuda;

// One launch a storage type. fill(job, entry) adds the states; launch(storage, entries, count, blocks, partials).
template <typename Job, typename Fill, typename Launch>
at::Tensor run_levels(const std::vector<Job>& jobs, bool narrow_range, Rounding rounding, const Fill& fill,
                      const Launch& launch) {
  const auto device = jobs[0].weight.device();
  at::Tensor results =
      at::zeros({static_cast<int64_t>(jobs.size())}, at::TensorOptions().dtype(at::kLong).device(device));
  int64_t* result = results.mutable_data_ptr<int64_t>();
  for (const auto storage : kStorageTypes) {
    std::vector<cuda::LevelEntry> entries;
    int64_t blocks = 0;
    for (size_t i = 0; i < jobs.size(); ++i) {
      const Job& job = jobs[i];
      if (storage_type(job.weight) != storage || job.weight.numel() == 0) {
        continue;
      }
      cuda::LevelEntry entry{};
      cuda::QuantizeArguments& a = entry.arguments;
      a.storage = storage;
      a.outer = job.walk.view.outer;
      a.channels = job.walk.view.channels;
      a.inner = job.walk.view.inner;
      a.scale = job.scale.template const_data_ptr<float>();
      a.scale_count = job.scale.numel();
      a.bit_width = job.bit_width.template const_data_ptr<float>();
      a.bit_width_count = job.bit_width.numel();
      a.is_signed = true;
      a.narrow_range = narrow_range;
      a.rounding = rounding;
      entry.extra_bits = job.extra_data();
      entry.first_block = blocks;
      entry.blocks = blocks_of(job.weight.numel());
      entry.result = result + i;
      fill(job, entry);
      blocks += entry.blocks;
      entries.push_back(entry);
    }
    if (blocks > 0) {
      const at::Tensor list = on_device(entries, device);
      const at::Tensor partials = at::empty({blocks}, at::TensorOptions().dtype(at::kDouble).device(device));
      launch(storage, static_cast<const cuda::LevelEntry*>(list.const_data_ptr()), static_cast<int64_t>(entries.size()),
             blocks, partials.mutable_data_ptr<double>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  for (const Job& job : jobs) {
    job.finish();
  }
  return results;
}

at::Tensor update_level_switches_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                  at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                                  at::TensorList counts, at::TensorList runs, int64_t given_score,
                                  double given_momentum, bool narrow_range, std::optional<int64_t> axis,
                                  int64_t rounding) {
  const SwitchScore score = checked_score(given_score);
  const float momentum = checked_momentum(given_momentum);
  const auto jobs = switch_jobs(weights, scales, bit_widths, extra_bits, codes, marks, counts, runs, axis, score);
  check_one_device(weights);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  return run_levels(
      jobs, narrow_range, checked_rounding(rounding),
      [](const SwitchJob& job, cuda::LevelEntry& entry) {
        const kernels::cpu::SwitchStates s = job.states();
        entry.weight = const_cast<void*>(job.walk.source.const_data_ptr());
        entry.codes = s.codes;
        entry.marks = s.marks;
        entry.counts = s.counts;
        entry.runs = s.runs;
        entry.frequencies = s.frequencies;
      },
      [&](auto storage, const cuda::LevelEntry* entries, int64_t count, int64_t blocks, double* partials) {
        cuda::launch_count_switches(storage, entries, count, blocks, score, momentum, partials,
                                    c10::cuda::getCurrentCUDAStream());
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
  check_one_device(weights);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  return run_levels(
      jobs, narrow_range, checked_rounding(rounding),
      [](const FreezeJob& job, cuda::LevelEntry& entry) {
        const kernels::cpu::FreezeStates s = job.states();
        entry.weight = job.walk.source.mutable_data_ptr();
        entry.codes = s.codes;
        entry.marks = s.marks;
        entry.frequencies = s.frequencies;
        entry.averages = s.averages;
      },
      [&](auto storage, const cuda::LevelEntry* entries, int64_t count, int64_t blocks, double* partials) {
        cuda::launch_freeze_oscillating(storage, entries, count, blocks, momentum, threshold, partials,
                                        c10::cuda::getCurrentCUDAStream());
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("update_level_switches_", update_level_switches_);
  m.impl("freeze_oscillating_", freeze_oscillating_);
}

}  // namespace mixbit::ops
