// Layers on integer codes, by the kernels of the integer runtime (docs/integer_semantics.md).
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include <mixbit/common/integer.h>
#include <mixbit/runtime/kernels.h>

#include "../checks.h"

namespace mixbit::ops {
namespace {

// What a layer makes of its totals.
struct Output {
  CodeGrid grid;
  at::ScalarType type;
};

Output checked_output(int64_t zero_point, int64_t low, int64_t high) {
  const bool is_signed = low < 0;
  const int64_t least = is_signed ? -128 : 0, most = is_signed ? 127 : 255;
  TORCH_CHECK_VALUE(low >= least && low < high && high <= most, "codes from low=", low, " to high=", high,
                    ": expected -128 <= low < high <= 127 with low < 0, or 0 <= low < high <= 255");
  TORCH_CHECK_VALUE(zero_point >= low && zero_point <= high, "zero_point=", zero_point, ": expected low=", low,
                    " to high=", high);
  return {CodeGrid{1.0f, static_cast<int32_t>(zero_point), static_cast<int32_t>(low), static_cast<int32_t>(high),
                   is_signed},
          is_signed ? at::kChar : at::kByte};
}

void check_multiplier(const at::Tensor& multiplier, int64_t channels, bool one) {
  TORCH_CHECK_VALUE(multiplier.scalar_type() == at::kFloat && multiplier.dim() == 1 &&
                        (multiplier.numel() == channels || (one && multiplier.numel() == 1)),
                    "multiplier is ", multiplier.scalar_type(), " ", multiplier.sizes(), ": expected float32 [",
                    channels, "]", one && channels != 1 ? " or [1]" : "");
  TORCH_CHECK_VALUE(at::isfinite(multiplier).all().item<bool>(), "multiplier has elements that are not finite");
}

// One part of a layer for every 64 Ki products at least, as many as there are threads at most.
void convolve(runtime::Convolution c, const at::Tensor& x, const at::Tensor& weight,
              const std::optional<at::Tensor>& bias, const at::Tensor& multiplier, uint8_t* y) {
  const int64_t taps = c.taps(), channels = c.out_channels;
  const auto [low, high] = at::aminmax(weight);
  const int64_t half = int64_t{1} << (c.weight_bits - 1);
  const auto least = low.item<int64_t>(), most = high.item<int64_t>();
  TORCH_CHECK_VALUE(least >= -half && most < half, "weight holds codes from ", least, " to ", most, ": expected ",
                    -half, " to ", half - 1, " at weight_bits=", c.weight_bits);
  // No input of this type may bring a total beyond 32 bits.
  const int64_t reach = std::max(c.x.high - c.x.zero_point, c.x.zero_point - c.x.low);
  const at::Tensor sums = weight.reshape({channels, taps}).to(at::kLong).abs().sum(1) * reach;
  const at::Tensor totals = bias ? sums + bias->to(at::kLong).abs() : sums;
  const auto largest = totals.max().item<int64_t>();
  TORCH_CHECK_VALUE(largest <= std::numeric_limits<int32_t>::max(), "a total can reach ", largest,
                    ": expected at most 2147483647, what 32 bits hold");

  const runtime::KernelTable& kernels = runtime::kernels(runtime::detected_isa());
  const auto bytes = [](int64_t n) {
    const int64_t size = (n + runtime::kAlignment - 1) / runtime::kAlignment * runtime::kAlignment;
    // (at::empty aligns to 64 bytes)
    return at::empty({size + runtime::kReadSlack}, at::kByte);
  };
  const at::Tensor codes = weight.contiguous();
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor multipliers = multiplier.contiguous();
  at::Tensor packed = bytes(kernels.packed_bytes(c));
  kernels.pack(c,
               {static_cast<const uint8_t*>(codes.const_data_ptr()), 8, taps,
                bias ? biases.const_data_ptr<int32_t>() : nullptr, multipliers.const_data_ptr<float>()},
               packed.mutable_data_ptr());
  // Kernels may read a little beyond the last byte.
  at::Tensor image = bytes(x.numel());
  image.narrow(0, 0, x.numel()).copy_(x.reshape({-1}).view(at::kByte));
  image.narrow(0, x.numel(), image.numel() - x.numel()).zero_();
  const int64_t scratch_bytes = kernels.scratch_bytes(c);
  const int64_t positions = c.positions();
  const int64_t least_positions = std::max<int64_t>(16, 65536 / std::max<int64_t>(1, channels * taps) / 16 * 16);
  at::parallel_for(0, positions, least_positions, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = bytes(scratch_bytes);
    kernels.convolve(c, packed.const_data_ptr(), image.const_data_ptr<uint8_t>(), y, {begin, end, 0, channels},
                     scratch.mutable_data_ptr());
  });
}

CodeGrid input_grid(const at::Tensor& x, int64_t zero_point) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kByte || type == at::kChar, "x has dtype ", type, ": expected codes, int8 or uint8");
  const int32_t low = type == at::kChar ? -128 : 0;
  TORCH_CHECK_VALUE(zero_point >= low && zero_point <= low + 255, "x_zero_point=", zero_point, ": expected ", low,
                    " to ", low + 255, ", codes of x's dtype");
  return {1.0f, static_cast<int32_t>(zero_point), low, low + 255, type == at::kChar};
}

void check_layer(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t dim,
                 int64_t weight_bits) {
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar && weight.dim() == dim, "weight is ", weight.scalar_type(), " ",
                    weight.sizes(), ": expected int8 codes with ", dim, " dimensions");
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight has shape ", weight.sizes(), ": expected no size of 0");
  TORCH_CHECK_VALUE(weight_bits >= 1 && weight_bits <= 8, "weight_bits=", weight_bits,
                    ": expected a whole number from 1 to 8");
  if (bias) {
    TORCH_CHECK_VALUE(bias->scalar_type() == at::kInt && bias->dim() == 1 && bias->size(0) == weight.size(0),
                      "bias is ", bias->scalar_type(), " ", bias->sizes(), ": expected int32 [", weight.size(0), "]");
  }
  TORCH_CHECK_VALUE(x.numel() <= int64_t{1} << 40, "x has ", x.numel(), " elements: expected at most 2^40");
}

at::Tensor int_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& multiplier, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups, int64_t x_zero_point, int64_t y_zero_point,
                      int64_t y_low, int64_t y_high, int64_t weight_bits) {
  const CodeGrid grid = input_grid(x, x_zero_point);
  const Output output = checked_output(y_zero_point, y_low, y_high);
  check_layer(x, weight, bias, 4, weight_bits);
  TORCH_CHECK_VALUE(x.dim() == 4, "x has shape ", x.sizes(), ": expected [N, C, H, W]");
  TORCH_CHECK_VALUE(groups >= 1 && x.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0, "x of shape ",
                    x.sizes(), " and weight of shape ", weight.sizes(), " do not fit at groups=", groups);
  check_multiplier(multiplier, weight.size(0), false);
  runtime::Convolution c{};
  int64_t out[2];
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0 &&
                          std::max(stride[i], dilation[i]) < 65536 && padding[i] < 65536,
                      "stride=", stride, ", padding=", padding, ", dilation=", dilation,
                      ": expected strides and dilations from 1 and padding from 0, below 65536");
    const auto axis = static_cast<int64_t>(i) + 2;
    const int64_t room = x.size(axis) + 2 * padding[i] - dilation[i] * (weight.size(axis) - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "x of shape ", x.sizes(), " is smaller than a kernel of shape ", weight.sizes(),
                      " at padding=", padding, " and dilation=", dilation);
    out[i] = room / stride[i] + 1;
  }
  at::Tensor y = at::empty({x.size(0), weight.size(0), out[0], out[1]}, x.options().dtype(output.type),
                           at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  c.batch = x.size(0);
  c.in_channels = x.size(1);
  c.in_height = x.size(2);
  c.in_width = x.size(3);
  c.out_channels = weight.size(0);
  c.out_height = out[0];
  c.out_width = out[1];
  c.kernel_height = weight.size(2);
  c.kernel_width = weight.size(3);
  c.stride_height = stride[0];
  c.stride_width = stride[1];
  c.pad_top = padding[0];
  c.pad_left = padding[1];
  c.dilation_height = dilation[0];
  c.dilation_width = dilation[1];
  c.groups = groups;
  c.weight_bits = static_cast<int32_t>(weight_bits);
  c.x = grid;
  c.y = output.grid;
  convolve(c, x.permute({0, 2, 3, 1}).contiguous(), weight, bias, multiplier,
           static_cast<uint8_t*>(y.mutable_data_ptr()));
  return y;
}

at::Tensor int_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& multiplier, int64_t x_zero_point, int64_t y_zero_point, int64_t y_low,
                      int64_t y_high, int64_t weight_bits) {
  const CodeGrid grid = input_grid(x, x_zero_point);
  const Output output = checked_output(y_zero_point, y_low, y_high);
  check_layer(x, weight, bias, 2, weight_bits);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "x has shape ", x.sizes(), ": expected [..., ",
                    weight.size(1), "] for a weight of shape ", weight.sizes());
  check_multiplier(multiplier, weight.size(0), false);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor y = at::empty(shape, x.options().dtype(output.type));
  if (y.numel() == 0) return y;
  runtime::Convolution c{};
  c.batch = c.in_height = c.out_height = c.kernel_height = c.kernel_width = c.groups = 1;
  c.stride_height = c.stride_width = c.dilation_height = c.dilation_width = 1;
  c.in_width = c.out_width = x.numel() / weight.size(1);
  c.in_channels = weight.size(1);
  c.out_channels = weight.size(0);
  c.weight_bits = static_cast<int32_t>(weight_bits);
  c.x = grid;
  c.y = output.grid;
  convolve(c, x.contiguous(), weight, bias, multiplier, static_cast<uint8_t*>(y.mutable_data_ptr()));
  return y;
}

at::Tensor requantize_op(const at::Tensor& total, const at::Tensor& multiplier, int64_t zero_point, int64_t low,
                         int64_t high, std::optional<int64_t> axis) {
  TORCH_CHECK_VALUE(total.scalar_type() == at::kInt, "total has dtype ", total.scalar_type(), ": expected int32");
  const Output output = checked_output(zero_point, low, high);
  axis = checked_axis(total, axis);
  check_multiplier(multiplier, channel_count(total, axis), true);
  const at::Tensor source = dense(total);
  at::Tensor y = at::empty_like(source, source.options().dtype(output.type));
  if (y.numel() == 0) return y;
  const at::Tensor multipliers = multiplier.contiguous();
  const auto* factor = multipliers.const_data_ptr<float>();
  const auto* x = source.const_data_ptr<int32_t>();
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const AxisView view = axis_view(source, multipliers.numel() == 1 ? std::nullopt : axis);
  const CodeGrid grid = output.grid;
  at::parallel_for(0, view.outer * view.channels, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, view.inner)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       const float m = factor[row % view.channels];
                       for (int64_t i = row * view.inner; i < (row + 1) * view.inner; ++i) {
                         out[i] = static_cast<uint8_t>(requantize(x[i], m, grid));
                       }
                     }
                   });
  return y;
}

// There are no kernels for codes on a GPU.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(false, op.schema().name(), " runs on the CPU only: expected CPU tensors");
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("int_conv2d", int_conv2d);
  m.impl("int_linear", int_linear);
  m.impl("requantize", requantize_op);
}

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  for (const char* name : {"int_conv2d", "int_linear", "requantize"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace mixbit::ops
