#pragma once

// The ops for C++ programs: the same dispatcher entries that Python calls, differentiable, on CPU and CUDA. Shapes in
// the comments; errors are c10::ValueError. Link mixbit::ops.

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mixbit {

// y = (clamp(round(x / scale) + zero_point, lo, hi) - zero_point) * scale.
__attribute__((visibility("default"))) at::Tensor fake_quantize(
    const at::Tensor& x,           // any shape; float32, float16, bfloat16
    const at::Tensor& scale,       // [1] or [x.size(axis)], float32
    const at::Tensor& zero_point,  // [1] or [x.size(axis)], float32
    const at::Tensor& bit_width,   // [1] or [x.size(axis)], float32
    bool is_signed = true, bool narrow_range = false, std::optional<int64_t> axis = std::nullopt, int64_t rounding = 0);

// conv2d of both operands quantized: x per tensor, weight per output channel or per tensor, symmetric.
__attribute__((visibility("default"))) at::Tensor quantized_conv2d(
    const at::Tensor& x,                    // [N, C, H, W]
    const at::Tensor& weight,               // [O, C / groups, KH, KW]
    const std::optional<at::Tensor>& bias,  // [O]
    const at::Tensor& x_scale,              // [1]
    const at::Tensor& x_zero_point,         // [1]
    const at::Tensor& x_bits,               // [1]
    const at::Tensor& w_scale,              // [1] or [O]
    const at::Tensor& w_bits,               // [1] or [O]
    bool signed_x, bool w_narrow_range = true, int64_t rounding = 0, at::IntArrayRef stride = {1, 1},
    at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1}, int64_t groups = 1);

// linear of both operands quantized.
__attribute__((visibility("default"))) at::Tensor quantized_linear(const at::Tensor& x,                    // [..., I]
                                                                   const at::Tensor& weight,               // [O, I]
                                                                   const std::optional<at::Tensor>& bias,  // [O]
                                                                   const at::Tensor& x_scale,              // [1]
                                                                   const at::Tensor& x_zero_point,         // [1]
                                                                   const at::Tensor& x_bits,               // [1]
                                                                   const at::Tensor& w_scale,              // [1] or [O]
                                                                   const at::Tensor& w_bits,               // [1] or [O]
                                                                   bool signed_x, bool w_narrow_range = true,
                                                                   int64_t rounding = 0);

}  // namespace mixbit
