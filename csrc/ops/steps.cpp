#include "steps.h"

#include <cmath>

namespace mixbit::ops {

StepMultiplier checked_multiplier(int64_t shape, double alpha, double rho) {
  TORCH_CHECK_VALUE(shape >= 0 && shape <= 3, "shape=", shape,
                    " is not known: expected 0 (off), 1 (step), 2 (linear) or 3 (gauss)");
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "alpha=", alpha, ": expected a number from 0 to 1");
  TORCH_CHECK_VALUE(rho > 0.0 && rho <= 0.5, "rho=", rho, ": expected a number above 0, up to 0.5");
  return {static_cast<StepShape>(shape), static_cast<float>(alpha), static_cast<float>(rho)};
}

void check_grids(at::TensorList weights, const Grids& grids) {
  const auto check_length = [&](size_t length, const char* name) {
    TORCH_CHECK_VALUE(length == weights.size(), name, " has ", length, " entries and weights ", weights.size(),
                      ": expected one for each");
  };
  check_length(grids.scales.size(), "scales");
  check_length(grids.bit_widths.size(), "bit_widths");
  check_length(grids.extra_bits.size(), "extra_bits");
  check_length(grids.narrow_range.size(), "narrow_range");
  for_each_in_list(weights, [&](size_t i) {
    const at::Tensor& weight = weights[i];
    check_floating(weight, "weight");
    const int64_t channels = weight.dim() == 0 ? 1 : weight.size(0);
    check_parameter(grids.scales[i], "scale", weight, channels);
    check_parameter(grids.bit_widths[i], "bit_width", weight, channels);
    const at::Tensor& extra = grids.extra_bits[i];
    TORCH_CHECK_VALUE(extra.scalar_type() == at::kByte && (extra.numel() == 0 || extra.sizes() == weight.sizes()),
                      "extra_bits is ", extra.scalar_type(), " ", extra.sizes(), ": expected uint8 ", weight.sizes(),
                      " like the weight, or [0]");
    TORCH_CHECK_VALUE(extra.numel() == 0 || extra.device() == weight.device(), "extra_bits is on ", extra.device(),
                      " and the weight on ", weight.device(), ": expected one device");
    TORCH_CHECK_VALUE(weight.device() == weights[0].device(), "the weight is on ", weight.device(),
                      " and the first one on ", weights[0].device(), ": expected one device");
  });
}

namespace {

// Dense, and with axis 0 outermost in memory where each of its rows has a grid of its own.
at::Tensor walk_order(const at::Tensor& weight, bool per_channel) {
  if (!weight.is_non_overlapping_and_dense()) {
    return weight.contiguous();
  }
  const bool outermost = !per_channel || weight.numel() == 0 || weight.stride(0) * weight.size(0) == weight.numel();
  return outermost ? weight : weight.contiguous();
}

}  // namespace

StepWeight::StepWeight(const at::Tensor& given, const Grids& grids, size_t i) {
  const bool per_channel = grids.scales[i].numel() > 1 || grids.bit_widths[i].numel() > 1;
  const at::Tensor order = walk_order(given, per_channel);
  weight = Ordered(given, order);
  const int64_t channels = per_channel ? given.size(0) : 1;
  view = {1, channels, channels == 0 ? 0 : given.numel() / channels};
  if (grids.extra_bits[i].numel() > 0) {
    extra_bits = with_strides_of(grids.extra_bits[i], weight.tensor());
  }
}

void check_number(const at::Tensor& number, const char* name) {
  TORCH_CHECK_VALUE(number.numel() == 1 && number.is_floating_point(), name, " is ", number.scalar_type(), " ",
                    number.sizes(), ": expected one number of a float type");
}

void check_state_steps(at::TensorList weights, at::TensorList state_steps) {
  TORCH_CHECK_VALUE(state_steps.size() == weights.size(), "state_steps has ", state_steps.size(),
                    " entries and weights ", weights.size(), ": expected one for each");
  for (const at::Tensor& step : state_steps) {
    check_number(step, "state_step");
  }
}

bool found_not_finite(const std::optional<at::Tensor>& found_inf) {
  return found_inf.has_value() && found_inf->item<double>() != 0.0;
}

}  // namespace mixbit::ops
