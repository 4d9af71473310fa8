#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../checks.h"

namespace mixbit::ops {

namespace {

namespace cuda = kernels::cuda;

cuda::StorageType cuda_storage_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return cuda::StorageType::kFloat16;
    case at::kBFloat16:
      return cuda::StorageType::kBFloat16;
    default:
      return cuda::StorageType::kFloat32;
  }
}

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
    kernel.storage = cuda_storage_type(x);
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
  void view(const at::Tensor& dense_x) {
    const AxisView view = axis_view(dense_x, axis);
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
  arguments.view(source);
  cuda::launch_fake_quantize(arguments.kernel, source.const_data_ptr(), y.mutable_data_ptr(),
                             c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
    std::optional<int64_t> group_size, std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "grad is ", grad.scalar_type(),
                    " ", grad.sizes(), ": expected ", x.scalar_type(), " ", x.sizes(), " like x");
  at::Tensor dx = output_mask[0] ? at::empty_like(x) : at::empty({0}, x.options());
  const int64_t channels = channel_count(x, arguments.axis);
  at::Tensor dscale = at::zeros({channels}, scale.options());
  at::Tensor dzero_point = at::zeros({channels}, scale.options());
  if (x.numel() > 0) {
    const at::Tensor source = output_mask[0] ? with_strides_of(x, dx) : dense(x);
    const at::Tensor g = with_strides_of(grad, source);
    arguments.view(source);
    const at::Tensor partials = at::empty({arguments.kernel.channels * cuda::reduce_blocks(arguments.kernel), 2},
                                          scale.options().dtype(at::kDouble));
    cuda::launch_fake_quantize_backward(arguments.kernel, g.const_data_ptr(), source.const_data_ptr(),
                                        output_mask[0] ? dx.mutable_data_ptr() : nullptr,
                                        partials.mutable_data_ptr<double>(), dscale.mutable_data_ptr<float>(),
                                        dzero_point.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  // A parameter of one element gets the sum over channels.
  const auto parameter_gradient = [&](bool wanted, const at::Tensor& per_channel, const at::Tensor& parameter) {
    if (!wanted) {
      return at::empty({0}, scale.options());
    }
    return parameter.numel() == channels ? per_channel : per_channel.sum(0, /*keepdim=*/true);
  };
  return {dx, parameter_gradient(output_mask[1], dscale, scale),
          parameter_gradient(output_mask[2], dzero_point, zero_point)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", fake_quantize_backward);
}

}  // namespace mixbit::ops
