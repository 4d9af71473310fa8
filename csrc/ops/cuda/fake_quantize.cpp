#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../backward_forms.h"
#include "../checks.h"
#include "../walk.h"

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
            int64_t rounding, std::optional<int64_t> group_size)
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
                         int64_t rounding, std::optional<int64_t> group_size) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size);
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

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                      const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                      bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                      int64_t rounding, std::optional<int64_t> group_size) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size);
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

// See BackwardForms.
std::tuple<at::Tensor, at::Tensor> backward_into(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                 bool is_signed, bool narrow_range, std::optional<int64_t> given_axis,
                                                 int64_t rounding, std::optional<int64_t> group_size,
                                                 const at::Tensor& dx, std::array<bool, 2> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, given_axis, rounding, group_size);
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
  // A parameter of one element gets the sum over channels.
  const auto parameter_gradient = [&](bool wanted, const at::Tensor& per_channel, const at::Tensor& parameter) {
    if (!wanted) {
      return at::empty({0}, scale.options());
    }
    return parameter.numel() == channels ? per_channel : per_channel.sum(0, /*keepdim=*/true);
  };
  return {parameter_gradient(output_mask[0], dscale, scale),
          parameter_gradient(output_mask[1], dzero_point, zero_point)};
}

using Backward = BackwardForms<backward_into>;

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", Backward::fresh);
  m.impl("_fake_quantize_backward_", Backward::over);
  m.impl("_fake_quantize_mask", fake_quantize_mask);
  m.impl("_fake_quantize_mask_backward", mask_backward);
}

}  // namespace mixbit::ops
