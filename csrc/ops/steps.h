#pragma once

// What the threshold-aware steps share on all devices: checked arguments, and tensors in the order of a walk.

#include <ATen/Functions.h>

#include <mixbit/common/steps.h>

#include <vector>

#include "checks.h"

namespace mixbit::ops {

// The grids of all weights: signed, per tensor or along axis 0.
struct Grids {
  at::TensorList scales;      // float32 [1] or [size of axis 0]
  at::TensorList bit_widths;  // float32 [1] or [size of axis 0]
  at::TensorList extra_bits;  // uint8 like the weight, or [0]
  const c10::List<bool>& narrow_range;
};

StepMultiplier checked_multiplier(int64_t shape, double alpha, double rho);

void check_grids(at::TensorList weights, const Grids& grids);

// One weight of the list, seen as rows of axis 0 where its grid is per channel.
struct StepWeight {
  Ordered weight;
  at::Tensor extra_bits;  // undefined: none
  AxisView view;

  StepWeight(const at::Tensor& given, const Grids& grids, size_t i);
};

// A number that may change from step to step: one element of a float type.
void check_number(const at::Tensor& number, const char* name);
// One number for each weight: its steps so far, this one included.
void check_state_steps(at::TensorList weights, at::TensorList state_steps);

// Whether a step is left out, on the host.
bool found_not_finite(const std::optional<at::Tensor>& found_inf);

}  // namespace mixbit::ops
