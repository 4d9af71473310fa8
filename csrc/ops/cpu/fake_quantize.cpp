#include <ATen/Functions.h>
#include <torch/library.h>
#include <unistd.h>

#include <fstream>

#include "../backward_forms.h"
#include "../checks.h"
#include "../parallel.h"
#include "../walk.h"

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

// Bytes of the last level of cache that this process can use. sysconf counts all sockets on some machines, so the
// kernel's own description comes first.
int64_t last_level_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kibibytes = 0;
    if (file >> kibibytes && kibibytes > 0) {
      return kibibytes << 10;
    }
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 0 ? static_cast<int64_t>(size) : int64_t{32} << 20;
  }();
  return bytes;
}

// Stores that bypass the cache pay where what the op reads and writes (`tensors` of the size of y) does not fit three
// quarters of it, the share that glibc's memcpy allows itself; below that, whoever reads y next finds it there. They
// cost where the pages are fresh from the system: glibc hands out blocks above 32 MiB anew each time.
bool beyond_cache(const at::Tensor& y, int64_t tensors) {
  constexpr int64_t kFreshPages = int64_t{32} << 20;
  const auto bytes = static_cast<int64_t>(y.nbytes());
  return 4 * tensors * bytes > 3 * last_level_cache() && bytes <= kFreshPages;
}

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                         int64_t rounding, std::optional<int64_t> group_size) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size);
  const auto quantizers = channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range,
                                             checked_rounding(rounding), channel_count(x, axis));
  at::Tensor y = at::empty_like(x);
  const Walk walk(with_strides_of(x, y), axis);
  const at::Tensor target = walk.target(y);
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* from = walk.source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  // Only y counts here: x was just written, and y is read next.
  const bool stream = beyond_cache(target, 1);
  for_each_run(walk.view, [&](int64_t, const Run& run) {
    kernels.fake_quantize(storage, at_offset(from, run.start, size), at_offset(to, run.start, size), run.length,
                          quantizers[static_cast<size_t>(run.channel)], stream);
  });
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return y;
}

int64_t mask_offset(const AxisView& view, const Run& run) {
  const int64_t row = view.inner == 0 ? 0 : run.start / view.inner;
  return row * mask_bytes_per_row(view) + (run.start - row * view.inner) / 8;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                      const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                      bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                      int64_t rounding, std::optional<int64_t> group_size) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size);
  const auto quantizers = channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range,
                                             checked_rounding(rounding), channel_count(x, axis));
  at::Tensor y = at::empty_like(x);
  const Walk walk(with_strides_of(x, y), axis);
  const at::Tensor target = walk.target(y);
  at::Tensor mask = at::empty({mask_bytes(walk.view)}, x.options().dtype(at::kByte));
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* from = walk.source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
  for_each_run(walk.view, [&](int64_t, const Run& run) {
    kernels.fake_quantize_mask(storage, at_offset(from, run.start, size), at_offset(to, run.start, size),
                               bits + mask_offset(walk.view, run), run.length,
                               quantizers[static_cast<size_t>(run.channel)]);
  });
  if (!target.is_same(y)) {
    y.copy_(target);
  }
  return {y, mask};
}

at::Tensor mask_backward(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef strides,
                         std::optional<int64_t> axis) {
  check_floating(grad, "grad");
  at::Tensor dx = at::empty_strided(grad.sizes(), strides, grad.options());
  const Walk walk(with_strides_of(grad, dx), checked_axis(grad, axis));
  check_mask(mask, walk.view);
  const at::Tensor target = walk.target(dx);
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(grad);
  const int64_t size = grad.element_size();
  const void* from = walk.source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  for_each_run(walk.view, [&](int64_t, const Run& run) {
    kernels.apply_mask(storage, at_offset(from, run.start, size), bits + mask_offset(walk.view, run),
                       at_offset(to, run.start, size), run.length);
  });
  if (!target.is_same(dx)) {
    dx.copy_(target);
  }
  return dx;
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

// See BackwardForms.
std::tuple<at::Tensor, at::Tensor> backward_into(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                 bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                 int64_t rounding, std::optional<int64_t> group_size,
                                                 const at::Tensor& dx, std::array<bool, 2> output_mask) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size);
  check_like_x(grad, "grad", x);
  const int64_t channels = channel_count(x, axis);
  const auto quantizers =
      channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range, checked_rounding(rounding), channels);
  const Walk walk(dense(x), axis);
  const at::Tensor g = with_strides_of(grad, walk.source);
  const at::Tensor target = dx.defined() ? walk.target(dx) : dx;
  const int64_t per_channel = runs_per_channel(walk.view);
  const bool any = output_mask[0] || output_mask[1];
  std::vector<double> scale_partials(any ? static_cast<size_t>(per_channel * channels) : 0);
  std::vector<double> zero_point_partials(output_mask[1] ? scale_partials.size() : 0);
  const auto& kernels = cpu_kernels();
  const auto storage = storage_type(x);
  const int64_t size = x.element_size();
  const void* grads = g.const_data_ptr();
  const void* from = walk.source.const_data_ptr();
  void* out = target.defined() ? target.mutable_data_ptr() : nullptr;
  const bool stream = target.defined() && !target.is_same(grad) && beyond_cache(target, 3);
  for_each_run(walk.view, [&](int64_t index, const Run& run) {
    const auto at = static_cast<size_t>(index);
    kernels.fake_quantize_backward(storage, at_offset(grads, run.start, size), at_offset(from, run.start, size),
                                   out == nullptr ? nullptr : at_offset(out, run.start, size), run.length,
                                   quantizers[static_cast<size_t>(run.channel)], any ? &scale_partials[at] : nullptr,
                                   output_mask[1] ? &zero_point_partials[at] : nullptr, stream);
  });
  if (target.defined() && !target.is_same(dx)) {
    dx.copy_(target);
  }
  // Outputs of an op must not share memory: each gradient that was not asked for is an empty tensor of its own.
  const auto parameter_gradient = [&](bool wanted, const std::vector<double>& partials, const at::Tensor& parameter) {
    return wanted ? reduce_channels(partials, per_channel, channels, parameter) : at::empty({0}, scale.options());
  };
  return {parameter_gradient(output_mask[0], scale_partials, scale),
          parameter_gradient(output_mask[1], zero_point_partials, zero_point)};
}

using Backward = BackwardForms<backward_into>;

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", Backward::fresh);
  m.impl("_fake_quantize_backward_", Backward::over);
  m.impl("_fake_quantize_mask", fake_quantize_mask);
  m.impl("_fake_quantize_mask_backward", mask_backward);
}

}  // namespace mixbit::ops
