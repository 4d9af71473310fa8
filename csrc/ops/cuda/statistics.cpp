// Noise on the device. What only calibration asks for, once a tensor (moments with histograms, scale searches), is
// computed on a copy in the host's memory and moved back: the same bits as on the CPU.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../calls.h"
#include "../checks.h"

namespace mixbit::ops {

namespace {

namespace cuda = kernels::cuda;

std::tuple<at::Tensor, at::Tensor> quantization_noise(const at::Tensor& x, const at::Tensor& scales,
                                                      const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                                                      std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  axis = check_noise_arguments(x, scales, bit_widths, axis);
  const int64_t channels = channel_count(x, axis);
  const int64_t count = bit_widths.numel();
  const auto options = x.options().dtype(at::kDouble);
  at::Tensor signal = axis.has_value() ? at::zeros({channels}, options) : at::zeros({}, options);
  at::Tensor noise = axis.has_value() ? at::zeros({count, channels}, options) : at::zeros({count}, options);
  if (x.numel() == 0) {
    return {signal, noise};
  }
  const at::Tensor source = dense(x);
  const at::Tensor scale_values = scales.contiguous();
  const at::Tensor bits = bit_widths.contiguous();
  const AxisView view = axis_view(source, axis);
  const cuda::NoiseArguments arguments{storage_type(x),
                                       view.outer,
                                       view.channels,
                                       view.inner,
                                       scale_values.const_data_ptr<float>(),
                                       scales.dim() == 2,
                                       bits.const_data_ptr<float>(),
                                       count,
                                       is_signed,
                                       narrow_range};
  const at::Tensor partials =
      at::empty({view.channels, cuda::reduce_blocks(view.outer * view.inner), count + 1}, options);
  cuda::launch_quantization_noise(arguments, source.const_data_ptr(), partials.mutable_data_ptr<double>(),
                                  signal.mutable_data_ptr<double>(), noise.mutable_data_ptr<double>(),
                                  c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {signal, noise};
}

std::tuple<at::Tensor, at::Tensor> noise_power(const at::Tensor& x, const at::Tensor& reference) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_floating(x, "x");
  check_like_x(reference, "reference", x);
  const auto options = x.options().dtype(at::kDouble);
  at::Tensor signal = at::zeros({}, options);
  at::Tensor noise = at::zeros({}, options);
  if (x.numel() > 0) {
    const at::Tensor a = dense(x);
    const at::Tensor b = with_strides_of(reference, a);
    const at::Tensor partials = at::empty({cuda::reduce_blocks(a.numel()), 2}, options);
    cuda::launch_noise_power(storage_type(x), a.numel(), a.const_data_ptr(), b.const_data_ptr(),
                             partials.mutable_data_ptr<double>(), signal.mutable_data_ptr<double>(),
                             noise.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {signal, noise};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> observe(const at::Tensor& x,
                                                                               std::optional<int64_t> axis,
                                                                               int64_t bins) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, std::optional<int64_t>, int64_t);
  auto [low, high, sum, squares, histogram] = typed_op<Signature>("mixbit::observe").call(x.cpu(), axis, bins);
  const auto device = x.device();
  return {low.to(device), high.to(device), sum.to(device), squares.to(device), histogram.to(device)};
}

at::Tensor mse_scales(const at::Tensor& x, const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                      std::optional<int64_t> axis) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, bool, bool, std::optional<int64_t>);
  return typed_op<Signature>("mixbit::mse_scales")
      .call(x.cpu(), bit_widths.cpu(), is_signed, narrow_range, axis)
      .to(x.device());
}

at::Tensor mse_scales_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                     const at::Tensor& bit_widths, bool is_signed, bool narrow_range) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool);
  return typed_op<Signature>("mixbit::mse_scales_from_histogram")
      .call(histogram.cpu(), min.cpu(), max.cpu(), bit_widths.cpu(), is_signed, narrow_range)
      .to(histogram.device());
}

at::Tensor quantization_noise_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                             const at::Tensor& scales, const at::Tensor& bit_widths, bool is_signed,
                                             bool narrow_range) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, bool, bool);
  return typed_op<Signature>("mixbit::quantization_noise_from_histogram")
      .call(histogram.cpu(), min.cpu(), max.cpu(), scales.cpu(), bit_widths.cpu(), is_signed, narrow_range)
      .to(histogram.device());
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("quantization_noise", quantization_noise);
  m.impl("noise_power", noise_power);
  m.impl("observe", observe);
  m.impl("mse_scales", mse_scales);
  m.impl("mse_scales_from_histogram", mse_scales_from_histogram);
  m.impl("quantization_noise_from_histogram", quantization_noise_from_histogram);
}

}  // namespace mixbit::ops
