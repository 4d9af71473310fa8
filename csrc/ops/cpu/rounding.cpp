// The search for the rounding of weights: rows in parallel, each by mixbit/common/rounding_search.h.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include <mixbit/common/rounding_search.h>

#include "../checks.h"
#include "../parallel.h"

namespace mixbit::ops {
namespace {

at::Tensor optimize_rounding(const at::Tensor& weight, const at::Tensor& moments, const at::Tensor& scale,
                             const at::Tensor& bit_width, bool narrow_range, double damping, int64_t sweeps) {
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat && weight.dim() == 2, "weight is ", weight.scalar_type(), " ",
                    weight.sizes(), ": expected float32 [rows, inputs of a row]");
  const int64_t rows = weight.size(0);
  const int64_t inputs = weight.size(1);
  TORCH_CHECK_VALUE(moments.scalar_type() == at::kFloat && moments.dim() == 3 && moments.size(1) == inputs &&
                        moments.size(2) == inputs && moments.size(0) > 0 && rows % moments.size(0) == 0,
                    "moments is ", moments.scalar_type(), " ", moments.sizes(), ": expected float32 [groups, ", inputs,
                    ", ", inputs, "] with a number of groups that divides ", rows, " rows");
  check_parameter(scale, "scale", weight, rows);
  check_parameter(bit_width, "bit_width", weight, rows);
  TORCH_CHECK_VALUE(damping >= 0.0 && damping < std::numeric_limits<double>::infinity(), "damping=", damping,
                    ": expected a finite number >= 0");
  TORCH_CHECK_VALUE(sweeps >= 0, "sweeps=", sweeps, ": expected a number >= 0");
  TORCH_CHECK_VALUE(at::isfinite(weight).all().item<bool>(), "weight holds NaN or infinity: expected finite numbers");
  TORCH_CHECK_VALUE(at::isfinite(moments).all().item<bool>(), "moments holds NaN or infinity: expected finite numbers");
  const auto quantizers =
      channel_quantizers(scale, at::zeros({1}), bit_width, /*is_signed=*/true, narrow_range, Rounding::kHalfEven, rows);
  const at::Tensor own = weight.contiguous();
  const at::Tensor kept = moments.contiguous();
  const at::Tensor added = kept.diagonal(0, 1, 2).to(at::kDouble).mean(1).mul(damping);  // to the diagonals
  at::Tensor rounded = at::empty_like(own);
  const float* weight_data = own.const_data_ptr<float>();
  const float* moments_data = kept.const_data_ptr<float>();
  const double* damping_data = added.const_data_ptr<double>();
  float* out = rounded.mutable_data_ptr<float>();
  const int64_t rows_of_group = rows / kept.size(0);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> slope(static_cast<size_t>(inputs));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t group = row / rows_of_group;
      const kernels::cpu::Quantizer& q = quantizers[static_cast<size_t>(row)];
      float* codes = out + row * inputs;
      search_rounding(inputs, weight_data + row * inputs, moments_data + group * inputs * inputs, q.scale, q.range,
                      damping_data[group], sweeps, codes, slope.data());
      for (int64_t i = 0; i < inputs; ++i) {
        codes[i] = dequantize(codes[i], q.scale, 0.0f);
      }
    }
  });
  return rounded;
}

// A search that no device shortens: everything is copied to the host and back.
at::Tensor optimize_rounding_on_host(const at::Tensor& weight, const at::Tensor& moments, const at::Tensor& scale,
                                     const at::Tensor& bit_width, bool narrow_range, double damping, int64_t sweeps) {
  return optimize_rounding(weight.cpu(), moments.cpu(), scale.cpu(), bit_width.cpu(), narrow_range, damping, sweeps)
      .to(weight.device());
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) { m.impl("optimize_rounding", optimize_rounding); }
TORCH_LIBRARY_IMPL(mixbit, CUDA, m) { m.impl("optimize_rounding", optimize_rounding_on_host); }

}  // namespace mixbit::ops
