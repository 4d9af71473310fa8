#pragma once

// Bodies of the threshold-aware steps: a block owns kReduceBlock consecutive elements of one weight. Host code may
// compile them too.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

__device__ inline double read_number(const StepNumber& number) {
  return number.device == nullptr ? number.host : *number.device;
}

// g of the weight w at element i; NaN for a bit-width that no grid has.
__device__ inline float multiplier_at(const StepEntry& e, int64_t i, float w, const StepMultiplier& multiplier) {
  const int64_t channel = i / e.inner;
  const float bits = e.bit_width[e.bit_width_count == 1 ? 0 : channel];
  if (!is_valid_bit_width(bits) || (e.narrow_range && bits == 1.0f)) {
    return NAN;
  }
  const QuantRange range = quant_range(static_cast<int>(bits), true, e.narrow_range);
  const int extra_bits = e.extra_bits == nullptr ? 0 : e.extra_bits[i];
  return step_multiplier(w, e.scale[e.scale_count == 1 ? 0 : channel], range, extra_bits, multiplier);
}

// f(entry, i) for the elements of this thread.
template <typename F>
__device__ inline void for_each_weight(const StepEntry* entries, int64_t count, const F& f) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  const StepEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  const int64_t first = (block - e.first_block) * kReduceBlock;
  const int64_t last = first + kReduceBlock < e.numel ? first + kReduceBlock : e.numel;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    f(e, i);
  }
}

template <typename T>
__device__ inline float load_as_float(const void* p, int64_t i) {
  return static_cast<float>(static_cast<const T*>(p)[i]);
}
template <typename T>
__device__ inline void store_float(void* p, int64_t i, float v) {
  static_cast<T*>(p)[i] = static_cast<T>(v);
}

// Divides by the scale that gradients were multiplied with.
template <typename T>
__device__ inline float unscaled_gradient(const StepEntry& e, int64_t i, float grad_scale) {
  float grad = load_as_float<T>(e.grad, i);
  if (grad_scale != 1.0f) {
    grad = grad / grad_scale;
    store_float<T>(e.grad, i, grad);
  }
  return grad;
}

template <typename T>
__global__ void sgd_step_list_kernel(const StepEntry* entries, int64_t count, StepArguments a, SgdRule rule) {
  if (read_number(a.found_inf) != 0.0) {
    return;
  }
  rule.lr = static_cast<float>(read_number(a.lr));
  const auto grad_scale = static_cast<float>(read_number(a.grad_scale));
  const bool keeps = rule.momentum != 0.0f;
  for_each_weight(entries, count, [&](const StepEntry& e, int64_t i) {
    const float w = load_as_float<T>(e.weight, i);
    const float grad = unscaled_gradient<T>(e, i, grad_scale);
    const float momentum = keeps && !rule.first ? load_as_float<T>(e.momentum, i) : grad;
    const SgdState state = sgd_step(w, grad, momentum, multiplier_at(e, i, w, a.multiplier), rule);
    store_float<T>(e.weight, i, state.weight);
    if (keeps) {
      store_float<T>(e.momentum, i, state.momentum);
    }
  });
}

template <typename T>
__global__ void adam_step_list_kernel(const StepEntry* entries, int64_t count, StepArguments a, AdamRule rule,
                                      AdamArguments adam) {
  if (read_number(a.found_inf) != 0.0) {
    return;
  }
  const double lr = read_number(a.lr);
  const auto grad_scale = static_cast<float>(read_number(a.grad_scale));
  bool known = false;  // a block has one weight: its step's numbers are computed once a thread
  for_each_weight(entries, count, [&](const StepEntry& e, int64_t i) {
    if (!known) {
      known = true;
      const double steps = e.steps == nullptr ? e.host_steps : static_cast<double>(*e.steps);
      set_adam_step(&rule, lr, adam.beta1, adam.beta2, adam.weight_decay, steps, adam.decoupled);
    }
    const bool amsgrad = e.largest_moment2 != nullptr;
    const float w = load_as_float<T>(e.weight, i);
    const float grad = unscaled_gradient<T>(e, i, grad_scale);
    const float moment2 = load_as_float<T>(e.moment2, i);
    const AdamState state = adam_step(w, grad, load_as_float<T>(e.momentum, i), moment2,
                                      amsgrad ? load_as_float<T>(e.largest_moment2, i) : moment2, amsgrad,
                                      multiplier_at(e, i, w, a.multiplier), rule);
    store_float<T>(e.weight, i, state.weight);
    store_float<T>(e.momentum, i, state.moment1);
    store_float<T>(e.moment2, i, state.moment2);
    if (amsgrad) {
      store_float<T>(e.largest_moment2, i, state.largest_moment2);
    }
  });
}

template <typename T>
__global__ void scale_updates_list_kernel(const StepEntry* entries, int64_t count, StepMultiplier multiplier) {
  for_each_weight(entries, count, [&](const StepEntry& e, int64_t i) {
    const float before = load_as_float<T>(e.grad, i);
    const float after = load_as_float<T>(e.weight, i);
    store_float<T>(e.weight, i, scaled_update(before, after, multiplier_at(e, i, before, multiplier)));
  });
}

template <typename T>
__global__ void step_multipliers_list_kernel(const StepEntry* entries, int64_t count, StepMultiplier multiplier) {
  for_each_weight(entries, count, [&](const StepEntry& e, int64_t i) {
    store_float<T>(e.grad, i, multiplier_at(e, i, load_as_float<T>(e.weight, i), multiplier));
  });
}

}  // namespace mixbit::kernels::cuda
