// gated_fake_quantize and mixture_fake_quantize: one kernel reads x once for all candidate grids. The gates become what
// each grid contributes (common/gates.h); nothing of a candidate is kept for the backward.

#include <ATen/Functions.h>
#include <torch/library.h>

#include "../checks.h"
#include "../parallel.h"
#include "../walk.h"
#include "memory.h"

namespace mixbit::ops {

namespace {

using kernels::cpu::Mixture;
using kernels::cpu::Quantizer;

// The grids of every channel and what they contribute to every sample; the values are checked.
struct Candidates {
  std::optional<int64_t> axis;
  bool by_sample;
  bool by_channel;  // the channels are the samples
  MixtureForm form;
  int64_t count;
  int64_t channels;
  std::vector<Quantizer> quantizers;  // [channels, count]
  std::vector<float> weights;         // [samples, count]

  Mixture of(int64_t sample, int64_t channel) const {
    return {quantizers.data() + (by_channel ? sample : channel) * count, weights.data() + sample * count, count, form};
  }
};

Candidates gated_candidates(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                            at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> given_axis,
                            int64_t given_form) {
  const auto [axis, by_sample, by_channel, form] =
      check_gated_arguments(x, scale_range, gates, precisions, is_signed, given_axis, given_form);
  check_scale_values(scale_range, "scale_range");
  const auto count = static_cast<int64_t>(precisions.size());
  const int64_t channels = by_channel ? x.size(0) : channel_count(x, axis);
  const auto kind = form == GateForm::kResidual ? MixtureForm::kGatedResidual : MixtureForm::kGated;
  Candidates c{axis, by_sample, by_channel, kind, count, channels, {}, {}};
  const at::Tensor ranges = scale_range.contiguous();
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (const int64_t precision : precisions) {
      const auto bits = static_cast<int>(precision);
      const float range = ranges.const_data_ptr<float>()[ranges.numel() == 1 ? 0 : channel];
      c.quantizers.push_back(
          {gated_step(range, bits, is_signed), 0.0f, quant_range(bits, is_signed, false), Rounding::kHalfEven});
    }
  }
  const at::Tensor z = gates.contiguous();
  const float* values = z.const_data_ptr<float>();
  for (int64_t i = 0; i < z.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0.0f && values[i] <= 1.0f, "gates[", i, "]=", values[i],
                      ": expected a number from 0 to 1");
  }
  const int64_t samples = by_sample ? x.size(0) : 1;
  c.weights.resize(static_cast<size_t>(samples * count));
  for (int64_t s = 0; s < samples; ++s) {
    gate_shares(values + s, samples, count, c.weights.data() + s * count);
  }
  return c;
}

Candidates mixture_candidates(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                              const at::Tensor& bit_widths, bool is_signed, std::optional<int64_t> axis) {
  axis = check_mixture_arguments(x, scales, weights, bit_widths, axis);
  check_bit_width_values(bit_widths, "bit_widths", is_signed, false);
  check_scale_values(scales.reshape({-1}), "scales");
  const int64_t count = bit_widths.numel();
  const int64_t channels = channel_count(x, axis);
  Candidates c{axis, false, false, MixtureForm::kMixture, count, channels, {}, {}};
  const at::Tensor s = scales.contiguous();
  const at::Tensor bits = bit_widths.contiguous();
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t k = 0; k < count; ++k) {
      c.quantizers.push_back({s.const_data_ptr<float>()[s.dim() == 1 ? k : k * channels + channel], 0.0f,
                              quant_range(static_cast<int>(bits.const_data_ptr<float>()[k]), is_signed, false),
                              Rounding::kHalfEven});
    }
  }
  const at::Tensor w = weights.contiguous();
  c.weights.assign(w.const_data_ptr<float>(), w.const_data_ptr<float>() + count);
  return c;
}

// f(sample, index, start, run) for the runs of every sample, in one parallel region; start: where in memory.
template <typename F>
void for_each_sample_run(const SampleWalk& walk, const F& f) {
  const std::vector<AxisView> views(static_cast<size_t>(walk.samples), walk.view);
  for_each_run(views, [&](size_t t, int64_t index, const Run& run) {
    const auto sample = static_cast<int64_t>(t);
    f(sample, index, sample * walk.sample_size() + run.start, run);
  });
}

at::Tensor forward(const at::Tensor& x, const Candidates& c) {
  at::Tensor y = at::empty_like(x);
  const SampleWalk walk(with_strides_of(x, y), c.axis, c.by_sample);
  const at::Tensor target = walk.target(y);
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const bool stream = beyond_cache(target, 1);  // only y counts: x was just written, and y is read next
  const void* from = walk.source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  for_each_sample_run(walk, [&](int64_t sample, int64_t, int64_t start, const Run& run) {
    kernels.mixture(storage, at_offset(from, start, size), at_offset(to, start, size), run.length,
                    c.of(sample, run.channel), stream);
  });
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return y;
}

// dx (undefined: not asked for) and the sums of levels [level_count, samples] and steps [step_count, channels].
struct BackwardSums {
  at::Tensor dx;
  std::vector<double> levels;
  std::vector<double> steps;
};

BackwardSums backward(const at::Tensor& grad, const at::Tensor& x, const Candidates& c,
                      std::array<bool, 3> output_mask) {
  check_like_x(grad, "grad", x);
  const bool want_steps = output_mask[1];
  const bool want_levels = output_mask[2] || want_steps;
  const bool is_mixture = c.form == MixtureForm::kMixture;
  const int64_t level_count = is_mixture ? c.count : c.count - 1;
  const int64_t step_count = is_mixture ? c.count : 1;
  BackwardSums result;
  if (output_mask[0]) {
    result.dx = at::empty_like(x);
  }
  const SampleWalk walk(dense(x), c.axis, c.by_sample);
  const at::Tensor g = with_strides_of(grad, walk.source);
  const at::Tensor target = output_mask[0] ? walk.target(result.dx) : at::Tensor();
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const bool stream = target.defined() && beyond_cache(target, 3);
  const int64_t per_channel = runs_per_channel(walk.view);
  const int64_t runs = per_channel * walk.view.channels;
  std::vector<double> levels(static_cast<size_t>(want_levels ? walk.samples * runs * level_count : 0));
  std::vector<double> steps(static_cast<size_t>(want_steps ? walk.samples * runs * step_count : 0));
  const void* grads = g.const_data_ptr();
  const void* from = walk.source.const_data_ptr();
  void* to = target.defined() ? target.mutable_data_ptr() : nullptr;
  for_each_sample_run(walk, [&](int64_t sample, int64_t index, int64_t start, const Run& run) {
    const int64_t at = sample * runs + index;
    kernels.mixture_backward(storage, at_offset(grads, start, size), at_offset(from, start, size),
                             to == nullptr ? nullptr : at_offset(to, start, size), run.length,
                             c.of(sample, run.channel),
                             want_levels ? &levels[static_cast<size_t>(at * level_count)] : nullptr,
                             want_steps ? &steps[static_cast<size_t>(at * step_count)] : nullptr, stream);
  });
  if (target.defined() && !target.is_same(result.dx)) {
    result.dx.copy_(target);
  }
  // Added in the order of the runs.
  result.levels.resize(static_cast<size_t>(level_count * walk.samples));
  for (int64_t i = 0; i < static_cast<int64_t>(levels.size()); ++i) {
    const int64_t sample = i / (runs * level_count);
    result.levels[static_cast<size_t>(i % level_count * walk.samples + sample)] += levels[static_cast<size_t>(i)];
  }
  result.steps.resize(static_cast<size_t>(step_count * c.channels));
  for (int64_t i = 0; i < static_cast<int64_t>(steps.size()); ++i) {
    const int64_t channel = c.by_channel ? i / (step_count * runs) : i / step_count % runs / per_channel;
    result.steps[static_cast<size_t>(i % step_count * c.channels + channel)] += steps[static_cast<size_t>(i)];
  }
  return result;
}

// Outputs of an op must not share memory: each gradient that was not asked for is an empty tensor of its own.
at::Tensor or_none(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

at::Tensor gated_fake_quantize(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                               at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> axis, int64_t form) {
  return forward(x, gated_candidates(x, scale_range, gates, precisions, is_signed, axis, form));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward(const at::Tensor& grad, const at::Tensor& x,
                                                              const at::Tensor& scale_range, const at::Tensor& gates,
                                                              at::IntArrayRef precisions, bool is_signed,
                                                              std::optional<int64_t> axis, int64_t form,
                                                              std::array<bool, 3> output_mask) {
  const Candidates c = gated_candidates(x, scale_range, gates, precisions, is_signed, axis, form);
  const BackwardSums sums = backward(grad, x, c, output_mask);
  at::Tensor drange, dgates;
  if (output_mask[1]) {
    drange = at::zeros(scale_range.sizes(), scale_range.options());
    // step = range / levels
    const auto grid_levels = static_cast<double>(gated_levels(static_cast<int>(precisions.back()), is_signed));
    std::vector<double> totals(static_cast<size_t>(drange.numel()));
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      totals[static_cast<size_t>(drange.numel() == 1 ? 0 : channel)] += sums.steps[static_cast<size_t>(channel)];
    }
    for (size_t i = 0; i < totals.size(); ++i) {
      drange.mutable_data_ptr<float>()[i] = static_cast<float>(totals[i] / grid_levels);
    }
  }
  if (output_mask[2]) {
    const at::Tensor z = gates.contiguous();
    dgates = at::zeros(gates.sizes(), gates.options());
    const int64_t samples = c.by_sample ? gates.size(1) : 1;
    for (int64_t s = 0; s < samples; ++s) {
      gate_gradients(sums.levels.data() + s, z.const_data_ptr<float>() + s, samples, c.count,
                     dgates.mutable_data_ptr<float>() + s);
    }
  }
  return {or_none(sums.dx, x), or_none(drange, scale_range), or_none(dgates, gates)};
}

at::Tensor mixture_fake_quantize(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                 const at::Tensor& bit_widths, bool is_signed, std::optional<int64_t> axis) {
  return forward(x, mixture_candidates(x, scales, weights, bit_widths, is_signed, axis));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixture_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                const at::Tensor& scales, const at::Tensor& weights,
                                                                const at::Tensor& bit_widths, bool is_signed,
                                                                std::optional<int64_t> axis,
                                                                std::array<bool, 3> output_mask) {
  const Candidates c = mixture_candidates(x, scales, weights, bit_widths, is_signed, axis);
  const BackwardSums sums = backward(grad, x, c, output_mask);
  at::Tensor dscales, dweights;
  if (output_mask[1]) {
    dscales = at::zeros(scales.sizes(), scales.options());
    std::vector<double> totals(static_cast<size_t>(dscales.numel()));
    for (int64_t i = 0; i < c.count * c.channels; ++i) {
      const int64_t k = i / c.channels;
      totals[static_cast<size_t>(scales.dim() == 1 ? k : i)] +=
          static_cast<double>(c.weights[static_cast<size_t>(k)]) * sums.steps[static_cast<size_t>(i)];
    }
    for (size_t i = 0; i < totals.size(); ++i) {
      dscales.mutable_data_ptr<float>()[i] = static_cast<float>(totals[i]);
    }
  }
  if (output_mask[2]) {
    dweights = at::zeros(weights.sizes(), weights.options());
    for (int64_t k = 0; k < c.count; ++k) {
      dweights.mutable_data_ptr<float>()[k] = static_cast<float>(sums.levels[static_cast<size_t>(k)]);
    }
  }
  return {or_none(sums.dx, x), or_none(dscales, scales), or_none(dweights, weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("gated_fake_quantize", gated_fake_quantize);
  m.impl("_gated_fake_quantize_backward", gated_backward);
  m.impl("mixture_fake_quantize", mixture_fake_quantize);
  m.impl("_mixture_fake_quantize_backward", mixture_backward);
}

}  // namespace mixbit::ops
