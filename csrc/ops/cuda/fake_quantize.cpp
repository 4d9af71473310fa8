#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../backward_forms.h"
#include "../checks.h"
#include "../walk.h"
#include "entries.h"

namespace mixbit::ops {

namespace {

namespace cuda = kernels::cuda;

// Checked arguments, and the contiguous parameters that their pointers point into.
struct Arguments {
  at::Tensor scale;
  at::Tensor zero_point;
  at::Tensor bit_width;
  std::optional<int64_t> axis;
  cuda::QuantizeArguments kernel;

  Arguments(const at::Tensor& x, const at::Tensor& given_scale, const at::Tensor& given_zero_point,
            const at::Tensor& given_bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> given_axis,
            int64_t rounding, std::optional<int64_t> group_size, int64_t gradient)
      : scale(given_scale.contiguous()),
        zero_point(given_zero_point.contiguous()),
        bit_width(given_bit_width.contiguous()) {
    check_floating(x, "x");
    check_group_size(group_size);
    axis = checked_axis(x, given_axis);
    const int64_t channels = channel_count(x, axis);
    check_parameter(scale, "scale", x, channels);
    check_parameter(zero_point, "zero_point", x, channels);
    check_parameter(bit_width, "bit_width", x, channels);
    kernel.storage = storage_type(x);
    kernel.scale = scale.const_data_ptr<float>();
    kernel.scale_count = scale.numel();
    kernel.zero_point = zero_point.const_data_ptr<float>();
    kernel.zero_point_count = zero_point.numel();
    kernel.bit_width = bit_width.const_data_ptr<float>();
    kernel.bit_width_count = bit_width.numel();
    kernel.is_signed = is_signed;
    kernel.narrow_range = narrow_range;
    kernel.rounding = checked_rounding(rounding);
    kernel.gradient = checked_gradient(gradient);
  }

  // The memory order of the x that the kernel will read.
  void set_view(const AxisView& view) {
    kernel.outer = view.outer;
    kernel.channels = view.channels;
    kernel.inner = view.inner;
  }
};

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                         int64_t rounding, std::optional<int64_t> group_size, int64_t gradient) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, gradient);
  at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  const at::Tensor source = with_strides_of(x, y);
  arguments.set_view(axis_view(source, arguments.axis));
  cuda::launch_fake_quantize(arguments.kernel, source.const_data_ptr(), y.mutable_data_ptr(),
                             c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::vector<at::Tensor> fake_quantize_foreach(at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                                              at::TensorList bit_widths, bool is_signed, bool narrow_range,
                                              std::optional<int64_t> axis, int64_t rounding,
                                              std::optional<int64_t> group_size, int64_t gradient) {
  check_lists(xs, {{scales, "scales"}, {zero_points, "zero_points"}, {bit_widths, "bit_widths"}});
  check_one_device(xs);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<Arguments> arguments;  // own the parameters that the entries point to
  std::vector<at::Tensor> sources, ys;
  for_each_in_list(xs, [&](size_t i) {
    arguments.emplace_back(xs[i], scales[i], zero_points[i], bit_widths[i], is_signed, narrow_range, axis, rounding,
                           group_size, gradient);
    ys.push_back(at::empty_like(xs[i]));
    sources.push_back(with_strides_of(xs[i], ys[i]));
    arguments[i].set_view(axis_view(sources[i], arguments[i].axis));
  });
  for (const auto storage : kStorageTypes) {
    std::vector<cuda::QuantizeEntry> entries;
    int64_t blocks = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      if (arguments[i].kernel.storage == storage && xs[i].numel() > 0) {
        cuda::QuantizeEntry entry{};
        entry.arguments = arguments[i].kernel;
        entry.x = sources[i].const_data_ptr();
        entry.y = ys[i].mutable_data_ptr();
        entry.aligned = cuda::is_aligned(entry.x) && cuda::is_aligned(entry.y);
        entry.first_block = blocks;
        blocks += blocks_of(xs[i].numel());
        entries.push_back(entry);
      }
    }
    if (blocks > 0) {
      const at::Tensor device = on_device(entries, xs[0].device());
      cuda::launch_fake_quantize_list(storage, static_cast<const cuda::QuantizeEntry*>(device.const_data_ptr()),
                                      static_cast<int64_t>(entries.size()), blocks, c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return ys;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                      const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                      bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                      int64_t rounding, std::optional<int64_t> group_size,
                                                      int64_t gradient) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, gradient);
  at::Tensor y = at::empty_like(x);
  const Walk walk(with_strides_of(x, y), arguments.axis);
  const at::Tensor target = walk.target(y);
  at::Tensor mask = at::empty({mask_bytes(walk.view)}, x.options().dtype(at::kByte));
  if (x.numel() > 0) {
    arguments.set_view(walk.view);
    cuda::launch_fake_quantize_mask(arguments.kernel, walk.source.const_data_ptr(), target.mutable_data_ptr(),
                                    mask.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return {y, mask};
}

at::Tensor mask_backward(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef strides,
                         std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(grad.device());
  check_floating(grad, "grad");
  at::Tensor dx = at::empty_strided(grad.sizes(), strides, grad.options());
  const Walk walk(with_strides_of(grad, dx), checked_axis(grad, axis));
  check_mask(mask, walk.view);
  const at::Tensor target = walk.target(dx);
  if (grad.numel() > 0) {
    cuda::launch_apply_mask(storage_type(grad), walk.view.outer * walk.view.channels, walk.view.inner,
                            walk.source.const_data_ptr(), mask.const_data_ptr<uint8_t>(), target.mutable_data_ptr(),
                            c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!target.is_same(dx)) {
    dx.copy_(target);
  }
  return dx;
}

// A parameter of one element gets the sum over channels; a gradient that was not asked for is an empty tensor of its
// own.
at::Tensor parameter_gradient(bool wanted, const at::Tensor& per_channel, const at::Tensor& parameter) {
  if (!wanted) {
    return at::empty({0}, parameter.options());
  }
  return parameter.numel() == per_channel.numel() ? per_channel : per_channel.sum(0, /*keepdim=*/true);
}

// See BackwardForms.
std::tuple<at::Tensor, at::Tensor> backward_into(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                 bool is_signed, bool narrow_range, std::optional<int64_t> given_axis,
                                                 int64_t rounding, std::optional<int64_t> group_size,
                                                 const at::Tensor& dx, std::array<bool, 2> output_mask,
                                                 int64_t gradient) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, given_axis, rounding, group_size,
                      gradient);
  check_like_x(grad, "grad", x);
  const int64_t channels = channel_count(x, arguments.axis);
  at::Tensor dscale = at::zeros({channels}, scale.options());
  at::Tensor dzero_point = at::zeros({channels}, scale.options());
  if (x.numel() > 0) {
    const at::Tensor source = dense(x);
    const at::Tensor g = with_strides_of(grad, source);
    const at::Tensor target = dx.defined() && dx.strides() != source.strides() ? at::empty_like(source) : dx;
    arguments.set_view(axis_view(source, arguments.axis));
    const at::Tensor partials = at::empty({arguments.kernel.channels * cuda::reduce_blocks(arguments.kernel), 2},
                                          scale.options().dtype(at::kDouble));
    cuda::launch_fake_quantize_backward(arguments.kernel, g.const_data_ptr(), source.const_data_ptr(),
                                        target.defined() ? target.mutable_data_ptr() : nullptr,
                                        partials.mutable_data_ptr<double>(), dscale.mutable_data_ptr<float>(),
                                        dzero_point.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (dx.defined() && !target.is_same(dx)) {
      dx.copy_(target);
    }
  }
  return {parameter_gradient(output_mask[0], dscale, scale),
          parameter_gradient(output_mask[1], dzero_point, zero_point)};
}

// One tensor of a list.
struct ListBackward {
  Arguments arguments;
  at::Tensor source, g, dx, target, partials, dscale, dzero_point;
};

TensorLists backward_foreach(at::TensorList grads, at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                             at::TensorList bit_widths, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                             int64_t rounding, std::optional<int64_t> group_size, std::array<bool, 3> output_mask,
                             int64_t gradient) {
  check_lists(xs, {{grads, "grads"}, {scales, "scales"}, {zero_points, "zero_points"}, {bit_widths, "bit_widths"}});
  check_one_device(xs);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<ListBackward> jobs;
  for_each_in_list(xs, [&](size_t i) {
    jobs.push_back({Arguments(xs[i], scales[i], zero_points[i], bit_widths[i], is_signed, narrow_range, axis, rounding,
                              group_size, gradient),
                    {},
                    {},
                    {},
                    {},
                    {},
                    {},
                    {}});
    check_like_x(grads[i], "grad", xs[i]);
    ListBackward& job = jobs.back();
    job.source = dense(xs[i]);
    job.g = with_strides_of(grads[i], job.source);
    if (output_mask[0]) {
      job.dx = at::empty_like(xs[i]);
      job.target = job.dx.strides() == job.source.strides() ? job.dx : at::empty_like(job.source);
    }
    job.arguments.set_view(axis_view(job.source, job.arguments.axis));
    const int64_t channels = channel_count(xs[i], job.arguments.axis);
    const int64_t blocks = channels == 0 ? 0 : blocks_of(xs[i].numel() / channels);
    job.partials = at::empty({channels * blocks, 2}, scales[i].options().dtype(at::kDouble));
    job.dscale = at::zeros({channels}, scales[i].options());
    job.dzero_point = at::zeros({channels}, scales[i].options());
  });
  for (const auto storage : kStorageTypes) {
    std::vector<cuda::QuantizeEntry> entries;
    int64_t blocks = 0;
    int64_t channels = 0;
    for (const ListBackward& job : jobs) {
      if (job.arguments.kernel.storage == storage && job.source.numel() > 0) {
        cuda::QuantizeEntry entry{};
        entry.arguments = job.arguments.kernel;
        entry.grad = job.g.const_data_ptr();
        entry.x = job.source.const_data_ptr();
        entry.y = job.target.defined() ? job.target.mutable_data_ptr() : nullptr;
        entry.aligned = cuda::is_aligned(entry.grad) && cuda::is_aligned(entry.x) && cuda::is_aligned(entry.y);
        entry.first_block = blocks;
        entry.blocks = cuda::reduce_blocks(entry.arguments);
        entry.first_channel = channels;
        entry.partials = job.partials.mutable_data_ptr<double>();
        entry.dscale = job.dscale.mutable_data_ptr<float>();
        entry.dzero_point = job.dzero_point.mutable_data_ptr<float>();
        blocks += entry.arguments.channels * entry.blocks;
        channels += entry.arguments.channels;
        entries.push_back(entry);
      }
    }
    if (blocks > 0) {
      const at::Tensor device = on_device(entries, xs[0].device());
      cuda::launch_fake_quantize_backward_list(
          storage, static_cast<const cuda::QuantizeEntry*>(device.const_data_ptr()),
          static_cast<int64_t>(entries.size()), blocks, channels, c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  TensorLists gradients;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const ListBackward& job = jobs[i];
    if (job.dx.defined() && !job.target.is_same(job.dx)) {
      job.dx.copy_(job.target);
    }
    std::get<0>(gradients).push_back(output_mask[0] ? job.dx : at::empty({0}, xs[i].options()));
    std::get<1>(gradients).push_back(parameter_gradient(output_mask[1], job.dscale, scales[i]));
    std::get<2>(gradients).push_back(parameter_gradient(output_mask[2], job.dzero_point, zero_points[i]));
  }
  return gradients;
}

using Backward = BackwardForms<backward_into>;

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", Backward::fresh);
  m.impl("_fake_quantize_backward_", Backward::over);
  m.impl("fake_quantize_foreach", fake_quantize_foreach);
  m.impl("_fake_quantize_backward_foreach", backward_foreach);
  m.impl("_fake_quantize_mask", fake_quantize_mask);
  m.impl("_fake_quantize_mask_backward", mask_backward);
}

}  // namespace mixbit::ops
