// Noise, moments, histograms and scale searches on the device; nothing synchronizes. Histograms and searches sort the
// data (ATen's sort) and work on the sorted rows, with the formulas of the CPU.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include <limits>

#include "../checks.h"
#include "entries.h"

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

// One tensor of a list.
struct ListNoise {
  at::Tensor source, scales, bits, partials, signal, noise;
  cuda::NoiseArguments arguments;
};

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> quantization_noise_foreach(
    at::TensorList xs, at::TensorList scales, at::TensorList bit_widths, bool is_signed, bool narrow_range,
    std::optional<int64_t> given_axis) {
  check_lists(xs, {{scales, "scales"}, {bit_widths, "bit_widths"}});
  check_one_device(xs);
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<ListNoise> jobs;
  for_each_in_list(xs, [&](size_t i) {
    const auto axis = check_noise_arguments(xs[i], scales[i], bit_widths[i], given_axis);
    const int64_t channels = channel_count(xs[i], axis);
    const int64_t count = bit_widths[i].numel();
    const auto options = xs[i].options().dtype(at::kDouble);
    ListNoise job;
    job.source = dense(xs[i]);
    job.scales = scales[i].contiguous();
    job.bits = bit_widths[i].contiguous();
    job.signal = axis.has_value() ? at::zeros({channels}, options) : at::zeros({}, options);
    job.noise = axis.has_value() ? at::zeros({count, channels}, options) : at::zeros({count}, options);
    const AxisView view = axis_view(job.source, axis);
    job.arguments = {storage_type(xs[i]),
                     view.outer,
                     view.channels,
                     view.inner,
                     job.scales.const_data_ptr<float>(),
                     scales[i].dim() == 2,
                     job.bits.const_data_ptr<float>(),
                     count,
                     is_signed,
                     narrow_range};
    job.partials = at::empty({view.channels * blocks_of(view.outer * view.inner), count + 1}, options);
    jobs.push_back(std::move(job));
  });
  for (const auto storage : kStorageTypes) {
    std::vector<cuda::NoiseEntry> entries;
    int64_t blocks = 0;
    int64_t sums = 0;
    for (const ListNoise& job : jobs) {
      if (job.arguments.storage == storage && job.source.numel() > 0) {
        cuda::NoiseEntry entry{};
        entry.arguments = job.arguments;
        entry.x = job.source.const_data_ptr();
        entry.aligned = cuda::is_aligned(entry.x);
        entry.first_block = blocks;
        entry.blocks = cuda::reduce_blocks(job.arguments.outer * job.arguments.inner);
        entry.first_sum = sums;
        entry.partials = job.partials.mutable_data_ptr<double>();
        entry.signal = job.signal.mutable_data_ptr<double>();
        entry.noise = job.noise.mutable_data_ptr<double>();
        blocks += job.arguments.channels * entry.blocks;
        sums += job.arguments.channels * (job.arguments.count + 1);
        entries.push_back(entry);
      }
    }
    if (blocks > 0) {
      const at::Tensor device = on_device(entries, xs[0].device());
      cuda::launch_quantization_noise_list(storage, static_cast<const cuda::NoiseEntry*>(device.const_data_ptr()),
                                           static_cast<int64_t>(entries.size()), blocks, sums,
                                           c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> result;
  for (const ListNoise& job : jobs) {
    std::get<0>(result).push_back(job.signal);
    std::get<1>(result).push_back(job.noise);
  }
  return result;
}

// float32 [channels, n], each row sorted upwards, NaN last.
at::Tensor sorted_rows(const at::Tensor& x, std::optional<int64_t> axis) {
  const int64_t channels = channel_count(x, axis);
  const int64_t n = channels == 0 ? 0 : x.numel() / channels;
  const at::Tensor rows = (axis.has_value() ? x.movedim(*axis, 0) : x).reshape({channels, n}).to(at::kFloat);
  return std::get<0>(rows.sort(/*dim=*/1)).contiguous();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> observe(const at::Tensor& x,
                                                                               std::optional<int64_t> given_axis,
                                                                               int64_t bins) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto axis = check_observe_arguments(x, given_axis, bins);
  const int64_t channels = channel_count(x, axis);
  const auto options = x.options().dtype(at::kDouble);
  const std::vector<int64_t> shape = axis.has_value() ? std::vector<int64_t>{channels} : std::vector<int64_t>{};
  std::vector<int64_t> histogram_shape = shape;
  histogram_shape.push_back(3);
  histogram_shape.push_back(bins);
  at::Tensor histogram = at::zeros(histogram_shape, options);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor moments;
  if (x.numel() > 0) {
    moments = at::empty({channels, 4}, options);
    const at::Tensor source = dense(x);
    const AxisView view = axis_view(source, axis);
    const at::Tensor partials = at::empty({channels * cuda::reduce_blocks(view.outer * view.inner), 4}, options);
    cuda::launch_moments(storage_type(x), view.outer, view.channels, view.inner, source.const_data_ptr(),
                         partials.mutable_data_ptr<double>(), moments.mutable_data_ptr<double>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (bins > 0) {
      const at::Tensor rows = sorted_rows(x, axis);
      cuda::launch_histogram(channels, rows.size(1), rows.const_data_ptr<float>(), moments.const_data_ptr<double>(),
                             bins, histogram.mutable_data_ptr<double>(), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } else {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    moments = at::tensor({kInfinity, -kInfinity, 0.0, 0.0}, options).repeat({channels, 1});
  }
  const auto column = [&](int64_t i) { return moments.select(1, i).clone().reshape(shape); };
  return {column(0), column(1), column(2), column(3), histogram};
}

at::Tensor mse_scales(const at::Tensor& x, const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                      std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_floating(x, "x");
  axis = checked_axis(x, axis);
  check_bit_width_list(bit_widths, x);
  const int64_t channels = channel_count(x, axis);
  const int64_t count = bit_widths.numel();
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor scales = axis.has_value() ? at::ones({count, channels}, options) : at::ones({count}, options);
  if (x.numel() == 0 || count == 0) {
    return scales;
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto wide = x.options().dtype(at::kDouble);
  const at::Tensor rows = sorted_rows(x, axis);
  const int64_t n = rows.size(1);
  const at::Tensor prefix = at::empty({channels, n + 1}, wide);
  const at::Tensor squares = at::empty({channels}, wide);
  const at::Tensor partials = at::empty({channels * cuda::reduce_blocks(n), 2}, wide);
  cuda::launch_prefix_sums(channels, n, rows.const_data_ptr<float>(), partials.mutable_data_ptr<double>(),
                           prefix.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const at::Tensor bits = bit_widths.contiguous();
  const at::Tensor errors = at::empty({count, channels, kScaleCandidates}, wide);
  cuda::launch_scale_search({channels, bits.const_data_ptr<float>(), count, is_signed, narrow_range},
                            cuda::SortedRows{rows.const_data_ptr<float>(), prefix.const_data_ptr<double>(),
                                             squares.const_data_ptr<double>(), n},
                            errors.mutable_data_ptr<double>(), scales.mutable_data_ptr<float>(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scales;
}

// A histogram of observe on the device, with the scratch of its kernels.
struct HistogramOnDevice {
  at::Tensor histogram, low, high, starts, squares;

  HistogramOnDevice(const at::Tensor& given, const at::Tensor& min, const at::Tensor& max)
      : histogram(given.contiguous()), low(min.contiguous()), high(max.contiguous()) {
    check_histogram(given, min, max);
    starts = at::empty({histogram.size(1) + 1, 2}, histogram.options());
    squares = at::empty({1}, histogram.options());
  }
  cuda::HistogramRow row() const {
    return {histogram.const_data_ptr<double>(), low.const_data_ptr<double>(),
            high.const_data_ptr<double>(),      static_cast<Below*>(starts.mutable_data_ptr()),
            squares.mutable_data_ptr<double>(), histogram.size(1)};
  }
};

at::Tensor mse_scales_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                     const at::Tensor& bit_widths, bool is_signed, bool narrow_range) {
  const c10::cuda::CUDAGuard guard(histogram.device());
  const HistogramOnDevice data(histogram, min, max);
  check_bit_width_list(bit_widths, histogram);
  const int64_t count = bit_widths.numel();
  at::Tensor scales = at::empty({count}, histogram.options().dtype(at::kFloat));
  if (count > 0) {
    const at::Tensor bits = bit_widths.contiguous();
    const at::Tensor errors = at::empty({count, kScaleCandidates}, histogram.options());
    cuda::launch_scale_search({1, bits.const_data_ptr<float>(), count, is_signed, narrow_range}, data.row(),
                              errors.mutable_data_ptr<double>(), scales.mutable_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return scales;
}

at::Tensor quantization_noise_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                             const at::Tensor& scales, const at::Tensor& bit_widths, bool is_signed,
                                             bool narrow_range) {
  const c10::cuda::CUDAGuard guard(histogram.device());
  const HistogramOnDevice data(histogram, min, max);
  check_bit_width_list(bit_widths, histogram);
  check_histogram_scales(scales, bit_widths);
  const int64_t count = bit_widths.numel();
  at::Tensor noise = at::empty({count}, histogram.options());
  if (count > 0) {
    const at::Tensor bits = bit_widths.contiguous();
    const at::Tensor values = scales.contiguous();
    cuda::launch_histogram_noise({1, bits.const_data_ptr<float>(), count, is_signed, narrow_range}, data.row(),
                                 values.const_data_ptr<float>(), noise.mutable_data_ptr<double>(),
                                 c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return noise;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("quantization_noise", quantization_noise);
  m.impl("quantization_noise_foreach", quantization_noise_foreach);
  m.impl("noise_power", noise_power);
  m.impl("observe", observe);
  m.impl("mse_scales", mse_scales);
  m.impl("mse_scales_from_histogram", mse_scales_from_histogram);
  m.impl("quantization_noise_from_histogram", quantization_noise_from_histogram);
}

}  // namespace mixbit::ops
