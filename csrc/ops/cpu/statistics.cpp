// Noise, moments, histograms and scale search: read-only passes over a tensor.

#include <ATen/Functions.h>
#include <torch/library.h>

#include <mixbit/common/half.h>
#include <mixbit/common/scale_search.h>

#include <cmath>
#include <limits>

#include "../checks.h"
#include "../parallel.h"
#include "memory.h"

namespace mixbit::ops {

namespace {

// Dense, and with the channels in front where rows would be short.
at::Tensor arrange(const at::Tensor& x, std::optional<int64_t> axis) {
  const at::Tensor d = dense(x);
  return Walk(d, axis).source;
}

at::Tensor doubles(const at::Tensor& x, at::IntArrayRef sizes) {
  return at::zeros(sizes, x.options().dtype(at::kDouble));
}

std::vector<int> bit_width_list(const at::Tensor& bit_widths, const at::Tensor& x, bool is_signed, bool narrow_range) {
  check_bit_width_list(bit_widths, x);
  check_bit_width_values(bit_widths, "bit_widths", is_signed, narrow_range);
  const at::Tensor values = bit_widths.contiguous();
  std::vector<int> bits(static_cast<size_t>(values.numel()));
  for (size_t k = 0; k < bits.size(); ++k) {
    bits[k] = static_cast<int>(values.const_data_ptr<float>()[k]);
  }
  return bits;
}

// One tensor against its candidates: checked, with the sums of its runs.
struct NoiseJob {
  bool per_channel;
  int64_t count;
  int64_t channels;
  std::vector<kernels::cpu::Quantizer> quantizers;  // [channels, K]: the candidates of a run lie side by side
  at::Tensor source;
  AxisView view;
  std::vector<double> partials;  // [channels, runs, 1 + K]: the signal first

  NoiseJob(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& bit_widths, bool is_signed,
           bool narrow_range, std::optional<int64_t> axis) {
    axis = check_noise_arguments(x, scales, bit_widths, axis);
    const auto bits = bit_width_list(bit_widths, x, is_signed, narrow_range);
    check_scale_values(scales.reshape({-1}), "scales");
    per_channel = axis.has_value();
    channels = channel_count(x, axis);
    count = static_cast<int64_t>(bits.size());
    const at::Tensor scale_values = scales.contiguous();
    quantizers.resize(static_cast<size_t>(channels * count));
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < count; ++k) {
        const float scale = scale_values.const_data_ptr<float>()[scales.dim() == 1 ? k : k * channels + c];
        quantizers[static_cast<size_t>(c * count + k)] = {
            scale, 0.0f, quant_range(bits[static_cast<size_t>(k)], is_signed, narrow_range), Rounding::kHalfEven};
      }
    }
    source = arrange(x, axis);
    view = axis_view(source, axis);
    partials.resize(static_cast<size_t>(runs_per_channel(view) * channels * (count + 1)), 0.0);
  }

  // The sums of the runs, added in order.
  std::tuple<at::Tensor, at::Tensor> finish() const {
    at::Tensor signal = per_channel ? doubles(source, {channels}) : doubles(source, {});
    at::Tensor noise = per_channel ? doubles(source, {count, channels}) : doubles(source, {count});
    double* signal_out = signal.mutable_data_ptr<double>();
    double* noise_out = noise.mutable_data_ptr<double>();
    const int64_t runs = runs_per_channel(view);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < runs; ++i) {
        const double* part = &partials[static_cast<size_t>((c * runs + i) * (count + 1))];
        signal_out[c] += part[0];
        for (int64_t k = 0; k < count; ++k) {
          noise_out[k * channels + c] += part[1 + k];
        }
      }
    }
    return {signal, noise};
  }
};

// Every tensor in one parallel region.
void run_noise(std::vector<NoiseJob>& jobs) {
  std::vector<AxisView> views;
  std::vector<const void*> data;
  for (const NoiseJob& job : jobs) {
    views.push_back(job.view);
    data.push_back(job.source.const_data_ptr());
  }
  const auto& kernels = cpu_kernels();
  for_each_run(views, [&](size_t t, int64_t index, const Run& run) {
    NoiseJob& job = jobs[t];
    double* out = &job.partials[static_cast<size_t>(index * (job.count + 1))];
    kernels.quantization_noise(storage_type(job.source), at_offset(data[t], run.start, job.source.element_size()),
                               run.length, job.quantizers.data() + run.channel * job.count, job.count, out, out + 1);
  });
}

std::tuple<at::Tensor, at::Tensor> quantization_noise(const at::Tensor& x, const at::Tensor& scales,
                                                      const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                                                      std::optional<int64_t> axis) {
  std::vector<NoiseJob> jobs;
  jobs.emplace_back(x, scales, bit_widths, is_signed, narrow_range, axis);
  run_noise(jobs);
  return jobs[0].finish();
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> quantization_noise_foreach(
    at::TensorList xs, at::TensorList scales, at::TensorList bit_widths, bool is_signed, bool narrow_range,
    std::optional<int64_t> axis) {
  check_lists(xs, {{scales, "scales"}, {bit_widths, "bit_widths"}});
  std::vector<NoiseJob> jobs;
  for_each_in_list(
      xs, [&](size_t i) { jobs.emplace_back(xs[i], scales[i], bit_widths[i], is_signed, narrow_range, axis); });
  run_noise(jobs);
  std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> result;
  for (const NoiseJob& job : jobs) {
    auto [signal, noise] = job.finish();
    std::get<0>(result).push_back(signal);
    std::get<1>(result).push_back(noise);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> noise_power(const at::Tensor& x, const at::Tensor& reference) {
  check_floating(x, "x");
  check_like_x(reference, "reference", x);
  const at::Tensor a = dense(x);
  const at::Tensor b = with_strides_of(reference, a);
  const AxisView view{1, 1, a.numel()};
  std::vector<double> partials(static_cast<size_t>(2 * runs_per_channel(view)));
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const void* x_data = a.const_data_ptr();
  const void* reference_data = b.const_data_ptr();
  for_each_run(view, [&](int64_t index, const Run& run) {
    kernels.noise_power(storage, at_offset(x_data, run.start, x.element_size()),
                        at_offset(reference_data, run.start, x.element_size()), run.length,
                        &partials[static_cast<size_t>(2 * index)], &partials[static_cast<size_t>(2 * index + 1)]);
  });
  double signal = 0.0;
  double noise = 0.0;
  for (size_t i = 0; i < partials.size(); i += 2) {
    signal += partials[i];
    noise += partials[i + 1];
  }
  return {doubles(x, {}).fill_(signal), doubles(x, {}).fill_(noise)};
}

// Element i of a run as fp32, whatever the storage type.
float element(kernels::StorageType storage, const void* data, int64_t i) {
  switch (storage) {
    case kernels::StorageType::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[i]);
    case kernels::StorageType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> observe(const at::Tensor& x,
                                                                               std::optional<int64_t> axis,
                                                                               int64_t bins) {
  axis = check_observe_arguments(x, axis, bins);
  const int64_t channels = channel_count(x, axis);
  const at::Tensor source = arrange(x, axis);
  const AxisView view = axis_view(source, axis);
  const int64_t per_channel = runs_per_channel(view);
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<kernels::cpu::Moments> partials(static_cast<size_t>(per_channel * channels),
                                              {infinity, -infinity, 0.0, 0.0});
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* data = source.const_data_ptr();
  for_each_run(view, [&](int64_t index, const Run& run) {
    kernels.observe(storage, at_offset(data, run.start, size), run.length, &partials[static_cast<size_t>(index)]);
  });
  const std::vector<int64_t> shape = axis.has_value() ? std::vector<int64_t>{channels} : std::vector<int64_t>{};
  at::Tensor low = doubles(x, shape);
  at::Tensor high = doubles(x, shape);
  at::Tensor sum = doubles(x, shape);
  at::Tensor squares = doubles(x, shape);
  for (int64_t c = 0; c < channels; ++c) {
    kernels::cpu::Moments all{infinity, -infinity, 0.0, 0.0};
    for (int64_t i = 0; i < per_channel; ++i) {
      const auto& part = partials[static_cast<size_t>(c * per_channel + i)];
      // NaN must survive: a comparison with it is false.
      all.min = part.min < all.min || std::isnan(part.min) ? part.min : all.min;
      all.max = part.max > all.max || std::isnan(part.max) ? part.max : all.max;
      all.sum += part.sum;
      all.sum_squares += part.sum_squares;
    }
    low.mutable_data_ptr<double>()[c] = all.min;
    high.mutable_data_ptr<double>()[c] = all.max;
    sum.mutable_data_ptr<double>()[c] = all.sum;
    squares.mutable_data_ptr<double>()[c] = all.sum_squares;
  }
  std::vector<int64_t> histogram_shape = shape;
  histogram_shape.insert(histogram_shape.end(), {3, bins});
  at::Tensor histogram = doubles(x, histogram_shape);
  if (bins == 0 || x.numel() == 0) {
    return {low, high, sum, squares, histogram};
  }
  // Counting waits for the range: the data is read again, from the cache where it is small. Sums of a chunk are added
  // in order of chunks; their number is fixed, so the result does not depend on threads.
  constexpr int64_t kChunks = 8;
  const int64_t chunks = std::min<int64_t>(kChunks, std::max<int64_t>(1, view.outer * view.inner / 65536));
  const int64_t per_histogram = 3 * bins;
  at::Tensor parts =
      chunks == 1 ? histogram.view({channels, 1, per_histogram}) : doubles(x, {channels, chunks, per_histogram});
  double* parts_data = parts.mutable_data_ptr<double>();
  const int64_t count = view.outer * view.inner;
  at::parallel_for(0, channels * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / chunks;
      const int64_t chunk = task % chunks;
      const double largest =
          std::max(std::abs(low.const_data_ptr<double>()[channel]), std::abs(high.const_data_ptr<double>()[channel]));
      if (!std::isfinite(largest)) {
        continue;  // no range: the histogram stays zero, min and max say why
      }
      const double range = histogram_range(largest);
      double* counts = parts_data + task * per_histogram;
      double* sums = counts + bins;
      double* sum_squares = sums + bins;
      for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i) {
        const int64_t at = ((i / view.inner) * view.channels + channel) * view.inner + i % view.inner;
        const auto value = static_cast<double>(element(storage, data, at));
        const int64_t bin = histogram_bin(value, range, bins);
        counts[bin] += 1.0;
        sums[bin] += value;
        sum_squares[bin] += value * value;
      }
    }
  });
  if (chunks > 1) {
    double* out = histogram.mutable_data_ptr<double>();
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t i = 0; i < per_histogram; ++i) {
          out[c * per_histogram + i] += parts_data[(c * chunks + chunk) * per_histogram + i];
        }
      }
    }
  }
  return {low, high, sum, squares, histogram};
}

void check_searchable(const std::vector<int>& bits, bool is_signed) {
  for (const int b : bits) {
    TORCH_CHECK_VALUE(!is_signed || b > 1,
                      "bit_widths holds 1 with signed: a signed bit has no positive level, "
                      "expected at least 2 bits");
  }
}

at::Tensor mse_scales(const at::Tensor& x, const at::Tensor& bit_widths, bool is_signed, bool narrow_range,
                      std::optional<int64_t> axis) {
  check_floating(x, "x");
  axis = checked_axis(x, axis);
  const int64_t channels = channel_count(x, axis);
  const auto bits = bit_width_list(bit_widths, x, is_signed, narrow_range);
  check_searchable(bits, is_signed);
  const auto count = static_cast<int64_t>(bits.size());
  // Channels in front, each contiguous.
  const at::Tensor rows =
      axis.has_value() ? x.movedim(*axis, 0).reshape({channels, -1}).contiguous() : x.reshape({1, -1}).contiguous();
  const int64_t length = channels == 0 ? 0 : rows.numel() / channels;
  const auto storage = storage_type(x);
  const void* data = rows.const_data_ptr();
  at::Tensor scales = axis.has_value() ? at::ones({count, channels}, x.options().dtype(at::kFloat))
                                       : at::ones({count}, x.options().dtype(at::kFloat));
  float* out = scales.mutable_data_ptr<float>();
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(length));
    for (int64_t c = begin; c < end; ++c) {
      bool finite = true;
      for (int64_t i = 0; i < length; ++i) {
        values[static_cast<size_t>(i)] = element(storage, data, c * length + i);
        finite = finite && std::isfinite(values[static_cast<size_t>(i)]);
      }
      if (!finite || length == 0) {  // no least error exists: NaN for the caller to find; 1 for no data
        for (int64_t k = 0; k < count && !finite; ++k) {
          out[k * channels + c] = std::numeric_limits<float>::quiet_NaN();
        }
        continue;
      }
      const SortedCumulative cumulative(values);
      const auto high = static_cast<double>(values.back());
      const double largest = is_signed ? std::max(high, -static_cast<double>(values.front())) : high;
      for (int64_t k = 0; k < count; ++k) {
        out[k * channels + c] =
            best_scale(cumulative.view(), largest, quant_range(bits[static_cast<size_t>(k)], is_signed, narrow_range));
      }
    }
  });
  return scales;
}

// A histogram of observe with its range, checked.
struct HistogramData {
  at::Tensor kept;  // owns the memory that cumulative reads
  HistogramCumulative cumulative;
  double high;
  double largest;
};

HistogramData histogram_data(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max) {
  check_histogram(histogram, min, max);
  const double low = *min.const_data_ptr<double>();
  const double high = *max.const_data_ptr<double>();
  TORCH_CHECK_VALUE(std::isfinite(low) && std::isfinite(high), "min=", low, " and max=", high,
                    ": expected finite numbers");
  const double largest = std::max(std::abs(low), std::abs(high));
  at::Tensor kept = histogram.contiguous();
  const double* data = kept.const_data_ptr<double>();
  const int64_t bins = kept.size(1);
  return {kept, HistogramCumulative(data, data + bins, data + 2 * bins, bins, histogram_range(largest)), high, largest};
}

at::Tensor mse_scales_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                     const at::Tensor& bit_widths, bool is_signed, bool narrow_range) {
  const HistogramData data = histogram_data(histogram, min, max);
  const auto bits = bit_width_list(bit_widths, histogram, is_signed, narrow_range);
  check_searchable(bits, is_signed);
  at::Tensor scales = at::empty({static_cast<int64_t>(bits.size())}, histogram.options().dtype(at::kFloat));
  for (size_t k = 0; k < bits.size(); ++k) {
    scales.mutable_data_ptr<float>()[k] = best_scale(data.cumulative.view(), is_signed ? data.largest : data.high,
                                                     quant_range(bits[k], is_signed, narrow_range));
  }
  return scales;
}

at::Tensor quantization_noise_from_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max,
                                             const at::Tensor& scales, const at::Tensor& bit_widths, bool is_signed,
                                             bool narrow_range) {
  const HistogramData data = histogram_data(histogram, min, max);
  const auto bits = bit_width_list(bit_widths, histogram, is_signed, narrow_range);
  check_histogram_scales(scales, bit_widths);
  check_scale_values(scales, "scales");
  const at::Tensor values = scales.contiguous();
  at::Tensor noise = at::empty({static_cast<int64_t>(bits.size())}, histogram.options());
  for (size_t k = 0; k < bits.size(); ++k) {
    noise.mutable_data_ptr<double>()[k] =
        squared_error(data.cumulative.view(), static_cast<double>(values.const_data_ptr<float>()[k]),
                      quant_range(bits[k], is_signed, narrow_range));
  }
  return noise;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("quantization_noise", quantization_noise);
  m.impl("quantization_noise_foreach", quantization_noise_foreach);
  m.impl("noise_power", noise_power);
  m.impl("observe", observe);
  m.impl("mse_scales", mse_scales);
  m.impl("mse_scales_from_histogram", mse_scales_from_histogram);
  m.impl("quantization_noise_from_histogram", quantization_noise_from_histogram);
}

}  // namespace mixbit::ops
