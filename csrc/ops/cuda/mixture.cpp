// gated_fake_quantize and mixture_fake_quantize on the device; nothing synchronizes, so that a wrong bit-width of a
// mixture yields NaN and the values of scales and gates are taken as they come.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../walk.h"

namespace mixbit::ops {

namespace {

namespace cuda = kernels::cuda;

// Checked arguments, and the contiguous tensors that their pointers point into.
struct Candidates {
  at::Tensor scales;
  at::Tensor weights;  // or gates
  at::Tensor bit_widths;
  std::optional<int64_t> axis;
  bool by_sample = false;
  bool by_channel = false;
  cuda::MixtureArguments kernel{};

  // The memory order of the x that the kernel will read.
  void set_view(const SampleWalk& walk) {
    kernel.samples = walk.samples;
    kernel.outer = walk.view.outer;
    kernel.channels = walk.view.channels;
    kernel.inner = walk.view.inner;
  }
};

Candidates gated_candidates(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                            at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> given_axis,
                            int64_t form) {
  const GatedArguments checked = check_gated_arguments(x, scale_range, gates, precisions, is_signed, given_axis, form);
  Candidates c{scale_range.contiguous(), gates.contiguous(), {}, checked.axis,
               checked.by_sample,        checked.by_channel, {}};
  std::copy(precisions.begin(), precisions.end(), c.kernel.precisions);
  c.kernel.per_channel = scale_range.numel() > 1;
  c.kernel.scale_stride = checked.by_channel ? 1 : 0;
  c.kernel.gate_stride = checked.by_sample ? x.size(0) : 1;
  c.kernel.count = static_cast<int64_t>(precisions.size());
  c.kernel.form = checked.form == GateForm::kResidual ? MixtureForm::kGatedResidual : MixtureForm::kGated;
  return c;
}

Candidates mixture_candidates(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                              const at::Tensor& bit_widths, std::optional<int64_t> given_axis) {
  const auto axis = check_mixture_arguments(x, scales, weights, bit_widths, given_axis);
  Candidates c{scales.contiguous(), weights.contiguous(), bit_widths.contiguous(), axis, false, false, {}};
  c.kernel.bit_widths = c.bit_widths.const_data_ptr<float>();
  c.kernel.per_channel = scales.dim() == 2;
  c.kernel.count = bit_widths.numel();
  c.kernel.form = MixtureForm::kMixture;
  return c;
}

// What both kinds set alike.
void finish(Candidates& c, const at::Tensor& x, bool is_signed) {
  c.kernel.storage = storage_type(x);
  c.kernel.scales = c.scales.const_data_ptr<float>();
  c.kernel.weights = c.weights.const_data_ptr<float>();
  c.kernel.is_signed = is_signed;
}

at::Tensor forward(const at::Tensor& x, Candidates c, bool is_signed) {
  finish(c, x, is_signed);
  at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  const SampleWalk walk(with_strides_of(x, y), c.axis, c.by_sample);
  const at::Tensor target = walk.target(y);
  c.set_view(walk);
  cuda::launch_mixture(c.kernel, walk.source.const_data_ptr(), target.mutable_data_ptr(),
                       c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return y;
}

// dx (undefined: not asked for), levels [level_count, samples] and steps [step_count, channels], float64.
struct BackwardSums {
  at::Tensor dx;
  at::Tensor levels;
  at::Tensor steps;
};

BackwardSums backward(const at::Tensor& grad, const at::Tensor& x, Candidates& c, bool is_signed, bool want_dx) {
  check_like_x(grad, "grad", x);
  finish(c, x, is_signed);
  const auto options = x.options().dtype(at::kDouble);
  const int64_t samples = c.by_sample ? x.size(0) : 1;
  const int64_t channels = channel_count(x, c.axis);
  BackwardSums result{want_dx ? at::empty_like(x) : at::Tensor(), at::zeros({c.kernel.level_count(), samples}, options),
                      at::zeros({c.kernel.step_count(), samples, channels}, options)};
  if (x.numel() > 0) {
    const SampleWalk walk(dense(x), c.axis, c.by_sample);
    const at::Tensor g = with_strides_of(grad, walk.source);
    const at::Tensor target = want_dx ? walk.target(result.dx) : at::Tensor();
    c.set_view(walk);
    const int64_t blocks = samples * channels * cuda::reduce_blocks(c.kernel.outer * c.kernel.inner);
    const at::Tensor partials = at::empty({blocks, c.kernel.level_count() + c.kernel.step_count()}, options);
    cuda::launch_mixture_backward(c.kernel, g.const_data_ptr(), walk.source.const_data_ptr(),
                                  want_dx ? target.mutable_data_ptr() : nullptr, partials.mutable_data_ptr<double>(),
                                  result.levels.mutable_data_ptr<double>(), result.steps.mutable_data_ptr<double>(),
                                  c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (want_dx && !target.is_same(result.dx)) {
      result.dx.copy_(target);
    }
  }
  result.steps = c.by_channel ? result.steps.squeeze(2) : result.steps.sum(1);
  return result;
}

at::Tensor or_none(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

at::Tensor gated_fake_quantize(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                               at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> axis, int64_t form) {
  const c10::cuda::CUDAGuard guard(x.device());
  return forward(x, gated_candidates(x, scale_range, gates, precisions, is_signed, axis, form), is_signed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward(const at::Tensor& grad, const at::Tensor& x,
                                                              const at::Tensor& scale_range, const at::Tensor& gates,
                                                              at::IntArrayRef precisions, bool is_signed,
                                                              std::optional<int64_t> axis, int64_t form,
                                                              std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  Candidates c = gated_candidates(x, scale_range, gates, precisions, is_signed, axis, form);
  const BackwardSums sums = backward(grad, x, c, is_signed, output_mask[0]);
  at::Tensor drange, dgates;
  if (output_mask[1]) {
    const auto grid_levels = static_cast<double>(gated_levels(static_cast<int>(precisions.back()), is_signed));
    const at::Tensor steps = sums.steps.select(0, 0);
    drange = (scale_range.numel() == 1 ? steps.sum(0, true) : steps).div(grid_levels).to(at::kFloat);
  }
  if (output_mask[2]) {
    dgates = at::empty(gates.sizes(), gates.options());
    const int64_t samples = sums.levels.size(1);
    if (samples > 0) {
      cuda::launch_gate_gradients(sums.levels.const_data_ptr<double>(), c.weights.const_data_ptr<float>(), samples,
                                  c.kernel.count, dgates.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return {or_none(sums.dx, x), or_none(drange, scale_range), or_none(dgates, gates)};
}

at::Tensor mixture_fake_quantize(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                 const at::Tensor& bit_widths, bool is_signed, std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  return forward(x, mixture_candidates(x, scales, weights, bit_widths, axis), is_signed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixture_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                const at::Tensor& scales, const at::Tensor& weights,
                                                                const at::Tensor& bit_widths, bool is_signed,
                                                                std::optional<int64_t> axis,
                                                                std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  Candidates c = mixture_candidates(x, scales, weights, bit_widths, axis);
  const BackwardSums sums = backward(grad, x, c, is_signed, output_mask[0]);
  at::Tensor dscales, dweights;
  if (output_mask[1]) {
    const at::Tensor steps = sums.steps.mul(weights.unsqueeze(1));
    dscales = (scales.dim() == 1 ? steps.sum(1) : steps).to(at::kFloat);
  }
  if (output_mask[2]) {
    dweights = sums.levels.select(1, 0).to(at::kFloat);
  }
  return {or_none(sums.dx, x), or_none(dscales, scales), or_none(dweights, weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("gated_fake_quantize", gated_fake_quantize);
  m.impl("_gated_fake_quantize_backward", gated_backward);
  m.impl("mixture_fake_quantize", mixture_fake_quantize);
  m.impl("_mixture_fake_quantize_backward", mixture_backward);
}

}  // namespace mixbit::ops
