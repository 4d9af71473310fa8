// extra_level_fake_quantize on the CPU: a walk of x and its extra bits in one order.

#include <ATen/Functions.h>
#include <torch/library.h>

#include <numeric>

#include "../checks.h"
#include "../parallel.h"
#include "../walk.h"
#include "memory.h"

namespace mixbit::ops {

namespace {

// The largest extra bits anywhere; with the count at hand compilers turn the loop into vectors.
int largest_extra(const at::Tensor& extra) {
  const auto* bits = static_cast<const uint8_t*>(extra.const_data_ptr());
  const int64_t count = extra.numel();
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = bits[i] > largest ? bits[i] : largest;
  }
  return largest;
}

// bit_width + extra_bits is looked at channel by channel only where the extremes of both do not fit.
void check_extra_values(const at::Tensor& bit_width, const at::Tensor& extra, std::optional<int64_t> axis) {
  const int largest = largest_extra(extra);
  TORCH_CHECK_VALUE(largest <= kMaxExtraBits, "extra_bits holds ", largest, ": expected whole numbers from 0 to ",
                    kMaxExtraBits);
  const auto widest = static_cast<int>(bit_width.max().item<float>());
  if (widest + largest <= kMaxBitWidth || extra.numel() == 0) {
    return;
  }
  std::vector<int64_t> others(static_cast<size_t>(extra.dim()));
  std::iota(others.begin(), others.end(), 0);
  if (axis.has_value()) {
    others.erase(others.begin() + *axis);
  }
  const at::Tensor most = others.empty() ? extra : at::amax(extra, others);
  const int sum = static_cast<int>(
      most.to(at::kFloat).add(axis.has_value() ? bit_width : bit_width.select(0, 0)).max().item<float>());
  TORCH_CHECK_VALUE(sum <= kMaxBitWidth, "bit_width + extra_bits is ", sum, ": expected at most ", kMaxBitWidth);
}

// Checked arguments and the order in which memory is walked.
struct Job {
  std::vector<kernels::cpu::Quantizer> quantizers;
  Walk walk;
  at::Tensor extra;

  // dense_x: x, dense.
  Job(const at::Tensor& dense_x, const at::Tensor& scale, const at::Tensor& bit_width, const at::Tensor& extra_bits,
      std::optional<int64_t> axis, bool narrow_range, int64_t rounding)
      : quantizers(channel_quantizers(scale, at::zeros({1}, scale.options()), bit_width, /*is_signed=*/true,
                                      narrow_range, checked_rounding(rounding), channel_count(dense_x, axis))),
        walk(dense_x, axis),
        extra(with_strides_of(extra_bits, walk.source)) {
    check_extra_values(bit_width, extra, axis);
  }
};

at::Tensor extra_level_fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
                                     const at::Tensor& extra_bits, std::optional<int64_t> axis, bool narrow_range,
                                     int64_t rounding) {
  axis = check_extra_arguments(x, scale, bit_width, extra_bits, axis);
  at::Tensor y = at::empty_like(x);
  const Job job(with_strides_of(x, y), scale, bit_width, extra_bits, axis, narrow_range, rounding);
  const at::Tensor target = job.walk.target(y);
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const bool stream = beyond_cache(target, 1);
  const void* from = job.walk.source.const_data_ptr();
  const auto* extra = static_cast<const uint8_t*>(job.extra.const_data_ptr());
  void* to = target.mutable_data_ptr();
  for_each_run(job.walk.view, [&](int64_t, const Run& run) {
    kernels.extra_levels(storage, at_offset(from, run.start, size), extra + run.start, at_offset(to, run.start, size),
                         run.length, job.quantizers[static_cast<size_t>(run.channel)], stream);
  });
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return y;
}

// Outputs of an op must not share memory: a gradient that was not asked for is an empty tensor of its own.
std::tuple<at::Tensor, at::Tensor> extra_level_backward(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& scale, const at::Tensor& bit_width,
                                                        const at::Tensor& extra_bits, std::optional<int64_t> axis,
                                                        bool narrow_range, int64_t rounding,
                                                        std::array<bool, 2> output_mask) {
  axis = check_extra_arguments(x, scale, bit_width, extra_bits, axis);
  check_like_x(grad, "grad", x);
  const at::Tensor dx = output_mask[0] ? at::empty_like(x) : at::Tensor();
  const Job job(dense(x), scale, bit_width, extra_bits, axis, narrow_range, rounding);
  const at::Tensor g = with_strides_of(grad, job.walk.source);
  const at::Tensor target = dx.defined() ? job.walk.target(dx) : dx;
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const bool stream = target.defined() && beyond_cache(target, 3);
  const int64_t per_channel = runs_per_channel(job.walk.view);
  const auto channels = static_cast<int64_t>(job.quantizers.size());
  std::vector<double> partials(static_cast<size_t>(output_mask[1] ? per_channel * channels : 0));
  const void* grads = g.const_data_ptr();
  const void* from = job.walk.source.const_data_ptr();
  const auto* extra = static_cast<const uint8_t*>(job.extra.const_data_ptr());
  void* to = target.defined() ? target.mutable_data_ptr() : nullptr;
  for_each_run(job.walk.view, [&](int64_t index, const Run& run) {
    kernels.extra_levels_backward(storage, at_offset(grads, run.start, size), at_offset(from, run.start, size),
                                  extra + run.start, to == nullptr ? nullptr : at_offset(to, run.start, size),
                                  run.length, job.quantizers[static_cast<size_t>(run.channel)],
                                  partials.empty() ? nullptr : &partials[static_cast<size_t>(index)], stream);
  });
  if (target.defined() && !target.is_same(dx)) {
    dx.copy_(target);
  }
  return {dx.defined() ? dx : at::empty({0}, x.options()),
          output_mask[1] ? reduce_channels(partials, per_channel, channels, scale) : at::empty({0}, scale.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("extra_level_fake_quantize", extra_level_fake_quantize);
  m.impl("_extra_level_fake_quantize_backward", extra_level_backward);
}

}  // namespace mixbit::ops
