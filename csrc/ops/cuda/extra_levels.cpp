// extra_level_fake_quantize on the device. Nothing synchronizes: a wrong width or extra bits that make no grid yield
// NaN.
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

// Checked arguments, and the contiguous parameters that their pointers point into.
struct Arguments {
  at::Tensor scale;
  at::Tensor bit_width;
  std::optional<int64_t> axis;
  cuda::QuantizeArguments kernel{};

  Arguments(const at::Tensor& x, const at::Tensor& given_scale, const at::Tensor& given_bit_width,
            const at::Tensor& extra_bits, std::optional<int64_t> given_axis, bool narrow_range, int64_t rounding)
      : scale(given_scale.contiguous()),
        bit_width(given_bit_width.contiguous()),
        axis(check_extra_arguments(x, scale, bit_width, extra_bits, given_axis)) {
    kernel.storage = storage_type(x);
    kernel.scale = scale.const_data_ptr<float>();
    kernel.scale_count = scale.numel();
    kernel.bit_width = bit_width.const_data_ptr<float>();
    kernel.bit_width_count = bit_width.numel();
    kernel.is_signed = true;
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

at::Tensor extra_level_fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
                                     const at::Tensor& extra_bits, std::optional<int64_t> axis, bool narrow_range,
                                     int64_t rounding) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, bit_width, extra_bits, axis, narrow_range, rounding);
  at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  const at::Tensor source = with_strides_of(x, y);
  const at::Tensor extra = with_strides_of(extra_bits, source);
  arguments.set_view(axis_view(source, arguments.axis));
  cuda::launch_extra_levels(arguments.kernel, source.const_data_ptr(), extra.const_data_ptr<uint8_t>(),
                            y.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<at::Tensor, at::Tensor> extra_level_backward(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& scale, const at::Tensor& bit_width,
                                                        const at::Tensor& extra_bits, std::optional<int64_t> given_axis,
                                                        bool narrow_range, int64_t rounding,
                                                        std::array<bool, 2> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, scale, bit_width, extra_bits, given_axis, narrow_range, rounding);
  check_like_x(grad, "grad", x);
  const at::Tensor dx = output_mask[0] ? at::empty_like(x) : at::Tensor();
  at::Tensor dscale = at::zeros({channel_count(x, arguments.axis)}, scale.options());
  if (x.numel() > 0) {
    const at::Tensor source = dense(x);
    const at::Tensor g = with_strides_of(grad, source);
    const at::Tensor extra = with_strides_of(extra_bits, source);
    const at::Tensor target = dx.defined() && dx.strides() != source.strides() ? at::empty_like(source) : dx;
    arguments.set_view(axis_view(source, arguments.axis));
    const at::Tensor partials = at::empty({arguments.kernel.channels * cuda::reduce_blocks(arguments.kernel)},
                                          scale.options().dtype(at::kDouble));
    cuda::launch_extra_levels_backward(
        arguments.kernel, g.const_data_ptr(), source.const_data_ptr(), extra.const_data_ptr<uint8_t>(),
        target.defined() ? target.mutable_data_ptr() : nullptr, partials.mutable_data_ptr<double>(),
        dscale.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (dx.defined() && !target.is_same(dx)) {
      dx.copy_(target);
    }
  }
  if (!output_mask[1]) {
    dscale = at::empty({0}, scale.options());
  } else if (scale.numel() != dscale.numel()) {
    dscale = dscale.sum(0, /*keepdim=*/true);
  }
  return {dx.defined() ? dx : at::empty({0}, x.options()), dscale};
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("extra_level_fake_quantize", extra_level_fake_quantize);
  m.impl("_extra_level_fake_quantize_backward", extra_level_backward);
}

}  // namespace mixbit::ops
