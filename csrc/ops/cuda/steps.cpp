// Threshold-aware steps of all weights of a model in one launch a storage type; nothing synchronizes.
#include "../steps.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "entries.h"

namespace mixbit::ops {
namespace {

namespace cuda = kernels::cuda;
using OptionalTensor = std::optional<at::Tensor>;

// A number of the step, and the tensor that keeps it on the device.
struct Number {
  at::Tensor kept;
  cuda::StepNumber number;

  Number(const OptionalTensor& given, double otherwise) : number{nullptr, otherwise} {
    if (given.has_value() && given->is_cuda()) {
      kept = given->to(at::kDouble);
      number.device = kept.const_data_ptr<double>();
    } else if (given.has_value()) {
      number.host = given->item<double>();
    }
  }
};

struct StepJob {
  StepWeight own;
  at::Tensor scale, bit_width, steps;
  Ordered grad, momentum, moment2, largest_moment2;
  cuda::StepEntry entry{};

  StepJob(at::TensorList weights, at::TensorList grads, const Grids& grids, size_t i)
      : own(weights[i], grids, i), scale(grids.scales[i].contiguous()), bit_width(grids.bit_widths[i].contiguous()) {
    grad = take(grads[i], "grad", weights[i], &cuda::StepEntry::grad);
    entry.weight = own.weight.tensor().mutable_data_ptr();
    entry.extra_bits = own.extra_bits.defined() ? own.extra_bits.const_data_ptr<uint8_t>() : nullptr;
    entry.scale = scale.const_data_ptr<float>();
    entry.scale_count = scale.numel();
    entry.bit_width = bit_width.const_data_ptr<float>();
    entry.bit_width_count = bit_width.numel();
    entry.narrow_range = grids.narrow_range.get(i);
    entry.numel = own.view.channels * own.view.inner;
    entry.inner = own.view.inner;
  }

  Ordered take(const at::Tensor& state, const char* name, const at::Tensor& weight, void* cuda::StepEntry::*member) {
    check_like_x(state, name, weight);
    const Ordered ordered(state, own.weight.tensor());
    entry.*member = ordered.tensor().mutable_data_ptr();
    return ordered;
  }

  void finish() const {
    for (const Ordered* state : {&own.weight, &grad, &momentum, &moment2, &largest_moment2}) {
      state->finish();
    }
  }
};

std::vector<StepJob> step_jobs(at::TensorList weights, at::TensorList grads, const Grids& grids) {
  TORCH_CHECK_VALUE(grads.size() == weights.size(), "grads has ", grads.size(), " entries and weights ", weights.size(),
                    ": expected one for each");
  check_grids(weights, grids);
  std::vector<StepJob> jobs;
  jobs.reserve(weights.size());
  for_each_in_list(weights, [&](size_t i) { jobs.emplace_back(weights, grads, grids, i); });
  return jobs;
}

void take_states(std::vector<StepJob>& jobs, at::TensorList weights, at::TensorList states, Ordered StepJob::*member,
                 void* cuda::StepEntry::*entry, const char* list, const char* name) {
  TORCH_CHECK_VALUE(states.size() == weights.size(), list, " has ", states.size(), " entries and weights ",
                    weights.size(), ": expected one for each");
  for_each_in_list(weights, [&](size_t i) { jobs[i].*member = jobs[i].take(states[i], name, weights[i], entry); });
}

// launch(storage, entries, count, blocks, stream) for the weights of each storage type.
template <typename F>
void launch_steps(const std::vector<StepJob>& jobs, const F& launch) {
  for (const auto storage : kStorageTypes) {
    std::vector<cuda::StepEntry> entries;
    int64_t blocks = 0;
    for (const StepJob& job : jobs) {
      if (job.entry.numel > 0 && storage_type(job.own.weight.tensor()) == storage) {
        entries.push_back(job.entry);
        entries.back().first_block = blocks;
        blocks += blocks_of(job.entry.numel);
      }
    }
    if (blocks > 0) {
      const at::Tensor device = on_device(entries, jobs[0].own.weight.tensor().device());
      launch(storage, static_cast<const cuda::StepEntry*>(device.const_data_ptr()),
             static_cast<int64_t>(entries.size()), blocks, c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  for (const StepJob& job : jobs) {
    job.finish();
  }
}

void threshold_aware_step_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, at::TensorList scales,
                           at::TensorList bit_widths, at::TensorList extra_bits, const at::Tensor& lr,
                           c10::List<bool> narrow_range, int64_t shape, double alpha, double rho, bool on_grad,
                           double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                           bool first_step, const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  check_number(lr, "lr");
  const c10::cuda::CUDAGuard guard(weights[0].device());
  auto jobs = step_jobs(weights, grads, {scales, bit_widths, extra_bits, narrow_range});
  if (momentum != 0.0) {
    take_states(jobs, weights, momenta, &StepJob::momentum, &cuda::StepEntry::momentum, "momenta", "momentum");
  }
  const Number rate(lr, 0.0), unscale(grad_scale, 1.0), left_out(found_inf, 0.0);
  const cuda::StepArguments arguments = {multiplier, rate.number, unscale.number, left_out.number};
  const SgdRule rule = {0.0f,
                        static_cast<float>(momentum),
                        static_cast<float>(1.0 - dampening),
                        static_cast<float>(weight_decay),
                        nesterov,
                        maximize,
                        first_step,
                        on_grad};
  launch_steps(jobs, [&](auto storage, const cuda::StepEntry* entries, int64_t count, int64_t blocks, auto stream) {
    cuda::launch_sgd_step_list(storage, entries, count, blocks, arguments, rule, stream);
  });
  bump_versions(weights);
  bump_versions(momentum != 0.0 ? momenta : at::TensorList());
}

void threshold_aware_adam_step_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                                at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList state_steps,
                                at::TensorList scales, at::TensorList bit_widths, at::TensorList extra_bits,
                                const at::Tensor& lr, c10::List<bool> narrow_range, int64_t shape, double alpha,
                                double rho, bool on_grad, double beta1, double beta2, double eps, double weight_decay,
                                bool decoupled, bool amsgrad, bool maximize, const OptionalTensor& grad_scale,
                                const OptionalTensor& found_inf) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  check_number(lr, "lr");
  const c10::cuda::CUDAGuard guard(weights[0].device());
  auto jobs = step_jobs(weights, grads, {scales, bit_widths, extra_bits, narrow_range});
  take_states(jobs, weights, exp_avgs, &StepJob::momentum, &cuda::StepEntry::momentum, "exp_avgs", "exp_avg");
  take_states(jobs, weights, exp_avg_sqs, &StepJob::moment2, &cuda::StepEntry::moment2, "exp_avg_sqs", "exp_avg_sq");
  if (amsgrad) {
    take_states(jobs, weights, max_exp_avg_sqs, &StepJob::largest_moment2, &cuda::StepEntry::largest_moment2,
                "max_exp_avg_sqs", "max_exp_avg_sq");
  }
  check_state_steps(weights, state_steps);
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (state_steps[i].is_cuda()) {
      jobs[i].steps = state_steps[i].to(at::kFloat);
      jobs[i].entry.steps = jobs[i].steps.const_data_ptr<float>();
    } else {
      jobs[i].entry.host_steps = state_steps[i].item<double>();
    }
  }
  const Number rate(lr, 0.0), unscale(grad_scale, 1.0), left_out(found_inf, 0.0);
  const cuda::StepArguments arguments = {multiplier, rate.number, unscale.number, left_out.number};
  AdamRule rule{};
  rule.epsilon = static_cast<float>(eps);
  rule.maximize = maximize;
  rule.on_grad = on_grad;
  const cuda::AdamArguments adam = {beta1, beta2, weight_decay, decoupled};
  launch_steps(jobs, [&](auto storage, const cuda::StepEntry* entries, int64_t count, int64_t blocks, auto stream) {
    cuda::launch_adam_step_list(storage, entries, count, blocks, arguments, rule, adam, stream);
  });
  bump_versions(weights);
  bump_versions(exp_avgs);
  bump_versions(exp_avg_sqs);
  bump_versions(amsgrad ? max_exp_avg_sqs : at::TensorList());
}

void scale_updates_(at::TensorList weights, at::TensorList before, at::TensorList scales, at::TensorList bit_widths,
                    at::TensorList extra_bits, c10::List<bool> narrow_range, int64_t shape, double alpha, double rho) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  TORCH_CHECK_VALUE(before.size() == weights.size(), "before has ", before.size(), " entries and weights ",
                    weights.size(), ": expected one for each");
  const c10::cuda::CUDAGuard guard(weights[0].device());
  const auto jobs = step_jobs(weights, before, {scales, bit_widths, extra_bits, narrow_range});
  launch_steps(jobs, [&](auto storage, const cuda::StepEntry* entries, int64_t count, int64_t blocks, auto stream) {
    cuda::launch_scale_updates_list(storage, entries, count, blocks, multiplier, stream);
  });
  bump_versions(weights);
}

std::vector<at::Tensor> threshold_multipliers(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                              at::TensorList extra_bits, c10::List<bool> narrow_range, int64_t shape,
                                              double alpha, double rho) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<at::Tensor> outputs;
  for (const at::Tensor& weight : weights) {
    outputs.push_back(at::empty_like(weight));
  }
  const auto jobs = step_jobs(weights, outputs, {scales, bit_widths, extra_bits, narrow_range});
  launch_steps(jobs, [&](auto storage, const cuda::StepEntry* entries, int64_t count, int64_t blocks, auto stream) {
    cuda::launch_step_multipliers_list(storage, entries, count, blocks, multiplier, stream);
  });
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("threshold_aware_step_", threshold_aware_step_);
  m.impl("threshold_aware_adam_step_", threshold_aware_adam_step_);
  m.impl("scale_updates_", scale_updates_);
  m.impl("threshold_multipliers", threshold_multipliers);
}

}  // namespace mixbit::ops
