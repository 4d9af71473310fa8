#include <ATen/Functions.h>
#include <torch/library.h>

#include "../backward_forms.h"
#include "../checks.h"
#include "../parallel.h"
#include "../walk.h"
#include "memory.h"

namespace mixbit::ops {

namespace {

std::optional<int64_t> check_arguments(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                                       const at::Tensor& bit_width, std::optional<int64_t> axis,
                                       std::optional<int64_t> group_size, int64_t gradient) {
  check_floating(x, "x");
  check_group_size(group_size);
  checked_gradient(gradient);
  axis = checked_axis(x, axis);
  const int64_t channels = channel_count(x, axis);
  check_parameter(scale, "scale", x, channels);
  check_parameter(zero_point, "zero_point", x, channels);
  check_parameter(bit_width, "bit_width", x, channels);
  return axis;
}

// One tensor of a forward: checked, with its output.
struct Forward {
  std::vector<kernels::cpu::Quantizer> quantizers;
  at::Tensor y;
  Walk walk;
  at::Tensor target;
  bool stream;

  Forward(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, const at::Tensor& bit_width,
          bool is_signed, bool narrow_range, std::optional<int64_t> axis, int64_t rounding,
          std::optional<int64_t> group_size, int64_t gradient)
      : Forward(x, scale, zero_point, bit_width, is_signed, narrow_range, rounding,
                check_arguments(x, scale, zero_point, bit_width, axis, group_size, gradient)) {}

 private:
  Forward(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, const at::Tensor& bit_width,
          bool is_signed, bool narrow_range, int64_t rounding, std::optional<int64_t> axis)
      : quantizers(channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range, checked_rounding(rounding),
                                      channel_count(x, axis))),
        y(at::empty_like(x)),
        walk(with_strides_of(x, y), axis),
        target(walk.target(y)),
        // Only y counts here: x was just written, and y is read next.
        stream(beyond_cache(target, 1)) {}
};

// Quantizes every tensor in one parallel region.
std::vector<at::Tensor> run_forward(const std::vector<Forward>& jobs) {
  std::vector<AxisView> views;
  std::vector<std::pair<const void*, void*>> data;
  for (const Forward& job : jobs) {
    views.push_back(job.walk.view);
    data.emplace_back(job.walk.source.const_data_ptr(), job.target.mutable_data_ptr());
  }
  const auto& kernels = cpu_kernels();
  for_each_run(views, [&](size_t t, int64_t, const Run& run) {
    const Forward& job = jobs[t];
    const int64_t size = job.y.element_size();
    kernels.fake_quantize(storage_type(job.y), at_offset(data[t].first, run.start, size),
                          at_offset(data[t].second, run.start, size), run.length,
                          job.quantizers[static_cast<size_t>(run.channel)], job.stream);
  });
  std::vector<at::Tensor> outputs;
  for (const Forward& job : jobs) {
    if (!job.target.is_same(job.y)) {
      job.y.copy_(job.target);
    }
    outputs.push_back(job.y);
  }
  return outputs;
}

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                         const at::Tensor& bit_width, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                         int64_t rounding, std::optional<int64_t> group_size, int64_t gradient) {
  return run_forward(
      {Forward(x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, group_size, gradient)})[0];
}

std::vector<at::Tensor> fake_quantize_foreach(at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                                              at::TensorList bit_widths, bool is_signed, bool narrow_range,
                                              std::optional<int64_t> axis, int64_t rounding,
                                              std::optional<int64_t> group_size, int64_t gradient) {
  check_lists(xs, {{scales, "scales"}, {zero_points, "zero_points"}, {bit_widths, "bit_widths"}});
  std::vector<Forward> jobs;
  for_each_in_list(xs, [&](size_t i) {
    jobs.emplace_back(xs[i], scales[i], zero_points[i], bit_widths[i], is_signed, narrow_range, axis, rounding,
                      group_size, gradient);
  });
  return run_forward(jobs);
}

int64_t mask_offset(const AxisView& view, const Run& run) {
  const int64_t row = view.inner == 0 ? 0 : run.start / view.inner;
  return row * mask_bytes_per_row(view) + (run.start - row * view.inner) / 8;
}

std::tuple<at::Tensor, at::Tensor> fake_quantize_mask(const at::Tensor& x, const at::Tensor& scale,
                                                      const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                      bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                      int64_t rounding, std::optional<int64_t> group_size,
                                                      int64_t gradient) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size, gradient);
  const auto quantizers =
      channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range, checked_rounding(rounding),
                         channel_count(x, axis), checked_gradient(gradient));
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

// One tensor of a backward: checked, with where its gradients go. dx may be the gradient itself; undefined: not asked
// for. mask: the gradients of scale and zero_point.
struct BackwardJob {
  at::Tensor scale;
  at::Tensor zero_point;
  at::Tensor dx;
  std::array<bool, 2> mask;
  std::vector<kernels::cpu::Quantizer> quantizers;
  Walk walk;
  at::Tensor g;
  at::Tensor target;
  bool stream;
  std::vector<double> scale_partials;
  std::vector<double> zero_point_partials;

  BackwardJob(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& given_scale,
              const at::Tensor& given_zero_point, const at::Tensor& bit_width, bool is_signed, bool narrow_range,
              std::optional<int64_t> axis, int64_t rounding, const at::Tensor& given_dx, std::array<bool, 2> given_mask,
              Gradient gradient)
      : scale(given_scale),
        zero_point(given_zero_point),
        dx(given_dx),
        mask(given_mask),
        quantizers(channel_quantizers(scale, zero_point, bit_width, is_signed, narrow_range, checked_rounding(rounding),
                                      channel_count(x, axis), gradient)),
        walk(dense(x), axis),
        g(with_strides_of(grad, walk.source)),
        target(dx.defined() ? walk.target(dx) : dx),
        stream(target.defined() && !target.is_same(grad) && beyond_cache(target, 3)),
        scale_partials(mask[0] || mask[1] ? static_cast<size_t>(runs_per_channel(walk.view) * channels()) : 0),
        zero_point_partials(mask[1] ? scale_partials.size() : 0) {}

  int64_t channels() const { return static_cast<int64_t>(quantizers.size()); }

  // Moves dx where it belongs and adds the sums: the gradients of scale and zero_point.
  std::tuple<at::Tensor, at::Tensor> finish() const {
    if (target.defined() && !target.is_same(dx)) {
      dx.copy_(target);
    }
    // Outputs of an op must not share memory: each gradient that was not asked for is an empty tensor of its own.
    const auto gradient = [&](bool wanted, const std::vector<double>& partials, const at::Tensor& parameter) {
      return wanted ? reduce_channels(partials, runs_per_channel(walk.view), channels(), parameter)
                    : at::empty({0}, scale.options());
    };
    return {gradient(mask[0], scale_partials, scale), gradient(mask[1], zero_point_partials, zero_point)};
  }
};

// Every tensor in one parallel region.
void run_backward(std::vector<BackwardJob>& jobs) {
  std::vector<AxisView> views;
  std::vector<std::array<void*, 3>> data;
  for (const BackwardJob& job : jobs) {
    views.push_back(job.walk.view);
    data.push_back({const_cast<void*>(job.g.const_data_ptr()), const_cast<void*>(job.walk.source.const_data_ptr()),
                    job.target.defined() ? job.target.mutable_data_ptr() : nullptr});
  }
  const auto& kernels = cpu_kernels();
  for_each_run(views, [&](size_t t, int64_t index, const Run& run) {
    BackwardJob& job = jobs[t];
    const auto at = static_cast<size_t>(index);
    const int64_t size = job.g.element_size();
    const auto& [grads, from, out] = data[t];
    kernels.fake_quantize_backward(storage_type(job.g), at_offset(grads, run.start, size),
                                   at_offset(from, run.start, size),
                                   out == nullptr ? nullptr : at_offset(out, run.start, size), run.length,
                                   job.quantizers[static_cast<size_t>(run.channel)],
                                   job.scale_partials.empty() ? nullptr : &job.scale_partials[at],
                                   job.mask[1] ? &job.zero_point_partials[at] : nullptr, job.stream);
  });
}

// See BackwardForms.
std::tuple<at::Tensor, at::Tensor> backward_into(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                                 const at::Tensor& zero_point, const at::Tensor& bit_width,
                                                 bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                                                 int64_t rounding, std::optional<int64_t> group_size,
                                                 const at::Tensor& dx, std::array<bool, 2> output_mask,
                                                 int64_t gradient) {
  axis = check_arguments(x, scale, zero_point, bit_width, axis, group_size, gradient);
  check_like_x(grad, "grad", x);
  std::vector<BackwardJob> jobs;
  jobs.emplace_back(grad, x, scale, zero_point, bit_width, is_signed, narrow_range, axis, rounding, dx, output_mask,
                    checked_gradient(gradient));
  run_backward(jobs);
  return jobs[0].finish();
}

TensorLists backward_foreach(at::TensorList grads, at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                             at::TensorList bit_widths, bool is_signed, bool narrow_range, std::optional<int64_t> axis,
                             int64_t rounding, std::optional<int64_t> group_size, std::array<bool, 3> output_mask,
                             int64_t gradient) {
  check_lists(xs, {{grads, "grads"}, {scales, "scales"}, {zero_points, "zero_points"}, {bit_widths, "bit_widths"}});
  std::vector<BackwardJob> jobs;
  for_each_in_list(xs, [&](size_t i) {
    const auto checked = check_arguments(xs[i], scales[i], zero_points[i], bit_widths[i], axis, group_size, gradient);
    check_like_x(grads[i], "grad", xs[i]);
    jobs.emplace_back(grads[i], xs[i], scales[i], zero_points[i], bit_widths[i], is_signed, narrow_range, checked,
                      rounding, output_mask[0] ? at::empty_like(xs[i]) : at::Tensor(),
                      std::array<bool, 2>{output_mask[1], output_mask[2]}, checked_gradient(gradient));
  });
  run_backward(jobs);
  TensorLists gradients;
  for (size_t i = 0; i < jobs.size(); ++i) {
    auto [dscale, dzero_point] = jobs[i].finish();
    std::get<0>(gradients).push_back(output_mask[0] ? jobs[i].dx : at::empty({0}, xs[i].options()));
    std::get<1>(gradients).push_back(dscale);
    std::get<2>(gradients).push_back(dzero_point);
  }
  return gradients;
}

using Backward = BackwardForms<backward_into>;

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("_fake_quantize_backward", Backward::fresh);
  m.impl("_fake_quantize_backward_", Backward::over);
  m.impl("fake_quantize_foreach", fake_quantize_foreach);
  m.impl("_fake_quantize_backward_foreach", backward_foreach);
  m.impl("_fake_quantize_mask", fake_quantize_mask);
  m.impl("_fake_quantize_mask_backward", mask_backward);
}

}  // namespace mixbit::ops
