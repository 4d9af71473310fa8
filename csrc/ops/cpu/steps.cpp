// Threshold-aware steps of all weights of a model: each weight is read and written once, in one parallel region.
#include "../steps.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "../parallel.h"
#include "memory.h"

namespace mixbit::ops {
namespace {

using kernels::cpu::Quantizer;
using kernels::cpu::StepRun;
using OptionalTensor = std::optional<at::Tensor>;

std::vector<Quantizer> grid_of(const Grids& grids, size_t i, int64_t channels) {
  static const at::Tensor kNoOffset = at::zeros({1});
  // Where the levels lie decides, not how ties are rounded.
  return channel_quantizers(grids.scales[i], kNoOffset, grids.bit_widths[i], /*is_signed=*/true,
                            grids.narrow_range.get(i), Rounding::kHalfEven, channels);
}

// One weight of a step with what its optimizer keeps.
struct StepJob {
  StepWeight own;
  std::vector<Quantizer> quantizers;
  Ordered grad, momentum, moment2, largest_moment2;

  StepJob(at::TensorList weights, at::TensorList grads, const Grids& grids, size_t i)
      : own(weights[i], grids, i),
        quantizers(grid_of(grids, i, own.view.channels)),
        grad(like(grads[i], "grad", weights[i])) {}

  Ordered like(const at::Tensor& state, const char* name, const at::Tensor& weight) const {
    check_like_x(state, name, weight);
    return {state, own.weight.tensor()};
  }

  void finish(bool with_grad) const {
    own.weight.finish();
    for (const Ordered* state : {&momentum, &moment2, &largest_moment2}) {
      state->finish();
    }
    if (with_grad) {
      grad.finish();
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

// The state `name` of every weight.
void take_states(std::vector<StepJob>& jobs, at::TensorList weights, at::TensorList states, Ordered StepJob::*member,
                 const char* list, const char* name) {
  TORCH_CHECK_VALUE(states.size() == weights.size(), list, " has ", states.size(), " entries and weights ",
                    weights.size(), ": expected one for each");
  for_each_in_list(weights, [&](size_t i) { jobs[i].*member = jobs[i].like(states[i], name, weights[i]); });
}

// step(i, storage, run, quantizer) for the runs of every weight.
template <typename F>
void run_steps(const std::vector<StepJob>& jobs, const F& step) {
  std::vector<AxisView> views;
  std::vector<StepRun> data;
  const auto data_of = [](const Ordered& state) {
    return state.tensor().defined() ? state.tensor().mutable_data_ptr() : nullptr;
  };
  for (const StepJob& job : jobs) {
    views.push_back(job.own.view);
    data.push_back({data_of(job.own.weight), data_of(job.grad), data_of(job.momentum), data_of(job.moment2),
                    data_of(job.largest_moment2),
                    job.own.extra_bits.defined() ? job.own.extra_bits.const_data_ptr<uint8_t>() : nullptr, 0});
  }
  for_each_run(views, [&](size_t t, int64_t, const Run& run) {
    const int64_t size = jobs[t].own.weight.tensor().element_size();
    const auto at = [&](void* p) { return p == nullptr ? p : at_offset(p, run.start, size); };
    const StepRun& all = data[t];
    const StepRun part = {at(all.weight),
                          at(all.grad),
                          at(all.momentum),
                          at(all.moment2),
                          at(all.largest_moment2),
                          all.extra_bits == nullptr ? nullptr : all.extra_bits + run.start,
                          run.length};
    step(t, storage_type(jobs[t].own.weight.tensor()), part, jobs[t].quantizers[static_cast<size_t>(run.channel)]);
  });
}

float unscaling(const OptionalTensor& grad_scale) {
  return grad_scale.has_value() ? static_cast<float>(grad_scale->item<double>()) : 1.0f;
}

void threshold_aware_step_(at::TensorList weights, at::TensorList grads, at::TensorList momenta, at::TensorList scales,
                           at::TensorList bit_widths, at::TensorList extra_bits, const at::Tensor& lr,
                           c10::List<bool> narrow_range, int64_t shape, double alpha, double rho, bool on_grad,
                           double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                           bool first_step, const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  auto jobs = step_jobs(weights, grads, {scales, bit_widths, extra_bits, narrow_range});
  if (momentum != 0.0) {
    take_states(jobs, weights, momenta, &StepJob::momentum, "momenta", "momentum");
  }
  check_number(lr, "lr");
  if (found_not_finite(found_inf)) {
    return;
  }
  const SgdRule rule = {static_cast<float>(lr.item<double>()),
                        static_cast<float>(momentum),
                        static_cast<float>(1.0 - dampening),
                        static_cast<float>(weight_decay),
                        nesterov,
                        maximize,
                        first_step,
                        on_grad};
  const float unscale = unscaling(grad_scale);
  const auto& kernels = cpu_kernels();
  run_steps(jobs, [&](size_t, kernels::StorageType storage, const StepRun& run, const Quantizer& quantizer) {
    kernels.sgd_step(storage, run, quantizer, multiplier, rule, unscale);
  });
  for (const StepJob& job : jobs) {
    job.finish(unscale != 1.0f);
  }
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
  auto jobs = step_jobs(weights, grads, {scales, bit_widths, extra_bits, narrow_range});
  take_states(jobs, weights, exp_avgs, &StepJob::momentum, "exp_avgs", "exp_avg");
  take_states(jobs, weights, exp_avg_sqs, &StepJob::moment2, "exp_avg_sqs", "exp_avg_sq");
  if (amsgrad) {
    take_states(jobs, weights, max_exp_avg_sqs, &StepJob::largest_moment2, "max_exp_avg_sqs", "max_exp_avg_sq");
  }
  check_state_steps(weights, state_steps);
  check_number(lr, "lr");
  if (found_not_finite(found_inf)) {
    return;
  }
  const double rate = lr.item<double>();
  std::vector<AdamRule> rules(jobs.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    rules[i].epsilon = static_cast<float>(eps);
    rules[i].maximize = maximize;
    rules[i].on_grad = on_grad;
    set_adam_step(&rules[i], rate, beta1, beta2, weight_decay, state_steps[i].item<double>(), decoupled);
  }
  const float unscale = unscaling(grad_scale);
  const auto& kernels = cpu_kernels();
  run_steps(jobs, [&](size_t t, kernels::StorageType storage, const StepRun& run, const Quantizer& quantizer) {
    kernels.adam_step(storage, run, quantizer, multiplier, rules[t], unscale);
  });
  for (const StepJob& job : jobs) {
    job.finish(unscale != 1.0f);
  }
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
  const auto jobs = step_jobs(weights, before, {scales, bit_widths, extra_bits, narrow_range});
  const auto& kernels = cpu_kernels();
  run_steps(jobs, [&](size_t, kernels::StorageType storage, const StepRun& run, const Quantizer& quantizer) {
    kernels.scale_updates(storage, run.grad, run.weight, run.extra_bits, run.n, quantizer, multiplier);
  });
  for (const StepJob& job : jobs) {
    job.finish(false);
  }
  bump_versions(weights);
}

std::vector<at::Tensor> threshold_multipliers(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                              at::TensorList extra_bits, c10::List<bool> narrow_range, int64_t shape,
                                              double alpha, double rho) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const StepMultiplier multiplier = checked_multiplier(shape, alpha, rho);
  std::vector<at::Tensor> outputs;
  for (const at::Tensor& weight : weights) {
    outputs.push_back(at::empty_like(weight));
  }
  const auto jobs = step_jobs(weights, outputs, {scales, bit_widths, extra_bits, narrow_range});
  const auto& kernels = cpu_kernels();
  run_steps(jobs, [&](size_t, kernels::StorageType storage, const StepRun& run, const Quantizer& quantizer) {
    kernels.step_multipliers(storage, run.weight, run.grad, run.extra_bits, run.n, quantizer, multiplier);
  });
  for (const StepJob& job : jobs) {
    job.grad.finish();
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("threshold_aware_step_", threshold_aware_step_);
  m.impl("threshold_aware_adam_step_", threshold_aware_adam_step_);
  m.impl("scale_updates_", scale_updates_);
  m.impl("threshold_multipliers", threshold_multipliers);
}

}  // namespace mixbit::ops
