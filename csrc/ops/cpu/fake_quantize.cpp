#include <ATen/Functions.h>
#include <torch/library.h>

#include "../checks.h"
#include "../parallel.h"

namespace mixbit::ops {

namespace {

const char* at_offset(const void* data, int64_t elements, int64_t element_size) {
  return static_cast<const char*>(data) + elements * element_size;
}
char* at_offset(void* data, int64_t elements, int64_t element_size) {
  return static_cast<char*>(data) + elements * element_size;
}

std::optional<int64_t> check_arguments(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                       const at::Tensor& bit_width, std::optional<int64_t> axis,
                                       std::optional<int64_t> group_size) {
  check_floating(x, "x");
  check_group_size(group_size);
  axis = checked_axis(x, axis);
  const int64_t channels = channel_count(x, axis);
  check_parameter(scale, "scale", x, channels);
  check_parameter(zero_point, "zero_point", x, channels);
  check_parameter(bit_width, "bit_width", x, channels);
  return axis;
}

// x with its axis moved to the front of memory, seen with the original order of dimensions.
at::Tensor channel_major(const at::Tensor& x, int64_t axis) { return x.movedim(axis, 0).contiguous().movedim(0, axis); }

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                         int64_t rounding, std::optional<int64_t> group_size) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size);
  const auto quantizers = channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range,
                                             checked_rounding(rounding), channel_count(x, axis));
  at::Tensor y = at::empty_like(x);
  at::Tensor source = with_strides_of(x, y);
  AxisView view = axis_view(source, axis);
  at::Tensor target = y;
  if (short_rows(view)) {
    source = channel_major(x, *axis);
    target = at::empty_like(source);
    view = axis_view(source, axis);
  }
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* from = source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  for_each_run(view, [&](int64_t, const Run& run) {
    kernels.fake_quantize(storage, at_offset(from, run.start, size), at_offset(to, run.start, size), run.length,
                          quantizers[static_cast<size_t>(run.channel)]);
  });
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return y;
}

// The sums of a channel, added in order; a parameter with one element gets the sum over channels.
at::Tensor reduce_channels(const std::vector<double>& partials, int64_t per_channel, int64_t channels,
                           const at::Tensor& parameter) {
  at::Tensor result = at::zeros_like(parameter);
  float* out = result.mutable_data_ptr<float>();
  double all = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t i = 0; i < per_channel; ++i) {
      sum += partials[static_cast<size_t>(c * per_channel + i)];
    }
    if (parameter.numel() == channels) {
      out[c] = static_cast<float>(sum);
    }
    all += sum;
  }
  if (parameter.numel() == 1) {
    out[0] = static_cast<float>(all);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
    std::optional<int64_t> group_size, std::array<bool, 3> output_mask) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "grad is ", grad.scalar_type(),
                    " ", grad.sizes(), ": expected ", x.scalar_type(), " ", x.sizes(), " like x");
  const int64_t channels = channel_count(x, axis);
  const auto quantizers =
      channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range, checked_rounding(rounding), channels);
  const at::Tensor none = at::empty({0}, x.options());
  at::Tensor dx = output_mask[0] ? at::empty_like(x) : none;
  at::Tensor source = output_mask[0] ? with_strides_of(x, dx) : dense(x);
  AxisView view = axis_view(source, axis);
  if (short_rows(view)) {
    source = channel_major(x, *axis);
    view = axis_view(source, axis);
  }
  const at::Tensor g = with_strides_of(grad, source);
  at::Tensor target = dx;
  if (output_mask[0] && dx.strides() != source.strides()) {
    target = at::empty_like(source);
  }
  const int64_t per_channel = runs_per_channel(view);
  std::vector<double> scale_partials(static_cast<size_t>(per_channel * channels));
  std::vector<double> zero_point_partials(scale_partials.size());
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* grads = g.const_data_ptr();
  const void* values = source.const_data_ptr();
  void* out = output_mask[0] ? target.mutable_data_ptr() : nullptr;
  for_each_run(view, [&](int64_t index, const Run& run) {
    kernels.fake_quantize_backward(storage, at_offset(grads, run.start, size), at_offset(values, run.start, size),
                                   out == nullptr ? nullptr : at_offset(out, run.start, size), run.length,
                                   quantizers[static_cast<size_t>(run.channel)],
                                   &scale_partials[static_cast<size_t>(index)],
                                   &zero_point_partials[static_cast<size_t>(index)]);
  });
  if (output_mask[0] && !target.is_same(dx)) {
    dx.copy_(target);
  }
  // Outputs of an op must not share memory: each gradient that was not asked for is an empty tensor of its own.
  const auto parameter_gradient = [&](bool wanted, const std::vector<double>& partials, const at::Tensor& parameter) {
    return wanted ? reduce_channels(partials, per_channel, channels, parameter) : at::empty({0}, scale.options());
  };
  return {dx, parameter_gradient(output_mask[1], scale_partials, scale),
          parameter_gradient(output_mask[2], zero_point_partials, zero_point)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", fake_quantize_backward);
}

}  // namespace mixbit::ops
