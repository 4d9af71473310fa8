#pragma once

// The ops for C++ programs: the same dispatcher entries that Python calls, differentiable, on CPU and CUDA. Shapes in
// the comments; errors are c10::ValueError. rounding: 0 half_even, 1 half_up. gradient: 0 that of learned steps, 1 that
// of parametrized clipping (PACT). Link mixbit::ops.

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#define MIXBIT_OPS_API __attribute__((visibility("default")))

namespace mixbit {

// y = (clamp(round(x / scale) + zero_point, lo, hi) - zero_point) * scale.
MIXBIT_OPS_API at::Tensor fake_quantize(const at::Tensor& x,           // any shape; float32, float16, bfloat16
                                        const at::Tensor& scale,       // [1] or [x.size(axis)], float32
                                        const at::Tensor& zero_point,  // [1] or [x.size(axis)], float32
                                        const at::Tensor& bit_width,   // [1] or [x.size(axis)], float32
                                        bool is_signed = true, bool narrow_range = false,
                                        std::optional<int64_t> axis = std::nullopt, int64_t rounding = 0,
                                        int64_t gradient = 0);

// conv2d of both operands quantized: x per tensor, weight per output channel or per tensor, symmetric.
MIXBIT_OPS_API at::Tensor quantized_conv2d(
    const at::Tensor& x,                    // [N, C, H, W]
    const at::Tensor& weight,               // [O, C / groups, KH, KW]
    const std::optional<at::Tensor>& bias,  // [O]
    const at::Tensor& x_scale,              // [1]
    const at::Tensor& x_zero_point,         // [1]
    const at::Tensor& x_bits,               // [1]
    const at::Tensor& w_scale,              // [1] or [O]
    const at::Tensor& w_bits,               // [1] or [O]
    bool signed_x, bool w_narrow_range = true, int64_t rounding = 0, at::IntArrayRef stride = {1, 1},
    at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1}, int64_t groups = 1,
    std::optional<at::ScalarType> out_dtype = std::nullopt,  // multiply in this type; none: the operands' own
    int64_t x_gradient = 0, int64_t w_gradient = 0);

// linear of both operands quantized.
MIXBIT_OPS_API at::Tensor quantized_linear(const at::Tensor& x,                    // [..., I]
                                           const at::Tensor& weight,               // [O, I]
                                           const std::optional<at::Tensor>& bias,  // [O]
                                           const at::Tensor& x_scale,              // [1]
                                           const at::Tensor& x_zero_point,         // [1]
                                           const at::Tensor& x_bits,               // [1]
                                           const at::Tensor& w_scale,              // [1] or [O]
                                           const at::Tensor& w_bits,               // [1] or [O]
                                           bool signed_x, bool w_narrow_range = true, int64_t rounding = 0,
                                           std::optional<at::ScalarType> out_dtype = std::nullopt,
                                           int64_t x_gradient = 0, int64_t w_gradient = 0);

// fake_quantize of many tensors in one parallel region or launch; lists of one length, parameters as above for each.
MIXBIT_OPS_API std::vector<at::Tensor> fake_quantize_foreach(at::TensorList xs, at::TensorList scales,
                                                             at::TensorList zero_points, at::TensorList bit_widths,
                                                             bool is_signed = true, bool narrow_range = false,
                                                             std::optional<int64_t> axis = std::nullopt,
                                                             int64_t rounding = 0, int64_t gradient = 0);

// fake_quantize on signed grids whose step is scale / 2^e for an element with e extra bits (nested levels for single
// weights); gradients to x and scale.
MIXBIT_OPS_API at::Tensor extra_level_fake_quantize(const at::Tensor& x,           // any shape
                                                    const at::Tensor& scale,       // [1] or [x.size(axis)], float32
                                                    const at::Tensor& bit_width,   // [1] or [x.size(axis)], float32
                                                    const at::Tensor& extra_bits,  // like x, uint8, 0 ... 2
                                                    std::optional<int64_t> axis = std::nullopt,
                                                    bool narrow_range = false, int64_t rounding = 1);

// Signal sum x^2 and noise sum (x - fake_quantize_k(x))^2 of K grids, x read once. Not differentiable.
// Returns float64: signal [] or [C], noise [K] or [K, C], C = x.size(axis).
MIXBIT_OPS_API std::tuple<at::Tensor, at::Tensor> quantization_noise(
    const at::Tensor& x,           // any shape
    const at::Tensor& scales,      // [K] or [K, C], float32
    const at::Tensor& bit_widths,  // [K], float32
    bool is_signed, bool narrow_range, std::optional<int64_t> axis = std::nullopt);

// The same for many tensors in one parallel region or launch.
MIXBIT_OPS_API std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> quantization_noise_foreach(
    at::TensorList xs, at::TensorList scales, at::TensorList bit_widths, bool is_signed, bool narrow_range,
    std::optional<int64_t> axis = std::nullopt);

// (sum reference^2, sum (x - reference)^2), float64 []; x and reference of one shape and dtype.
MIXBIT_OPS_API std::tuple<at::Tensor, at::Tensor> noise_power(const at::Tensor& x, const at::Tensor& reference);

struct Observation {
  at::Tensor min;        // float64 [] or [C]
  at::Tensor max;        // float64 [] or [C]
  at::Tensor sum;        // float64 [] or [C]
  at::Tensor sum_sq;     // float64 [] or [C]
  at::Tensor histogram;  // float64 [3, bins] or [C, 3, bins]: count, sum, sum of squares over [-r, r), r a power of two
};

// Moments and histogram of x in one call; bins even, 0 for no histogram.
MIXBIT_OPS_API Observation observe(const at::Tensor& x, std::optional<int64_t> axis = std::nullopt, int64_t bins = 0);

// The scale of least squared error for each width; float32 [K] or [K, C].
MIXBIT_OPS_API at::Tensor mse_scales(const at::Tensor& x,           // any shape
                                     const at::Tensor& bit_widths,  // [K], float32; at least 2 for signed grids
                                     bool is_signed, bool narrow_range, std::optional<int64_t> axis = std::nullopt);

// The same from a histogram of observe ([3, bins]) and its min and max ([]); float32 [K].
MIXBIT_OPS_API at::Tensor mse_scales_from_histogram(const at::Tensor& histogram, const at::Tensor& min,
                                                    const at::Tensor& max, const at::Tensor& bit_widths, bool is_signed,
                                                    bool narrow_range);

// The noise of quantization_noise, estimated from a histogram of observe; scales and bit_widths [K] float32, result
// float64 [K].
MIXBIT_OPS_API at::Tensor quantization_noise_from_histogram(const at::Tensor& histogram, const at::Tensor& min,
                                                            const at::Tensor& max, const at::Tensor& scales,
                                                            const at::Tensor& bit_widths, bool is_signed,
                                                            bool narrow_range);

// Weights rounded up or down so that the outputs change least (AdaRound's objective); levels of the signed grid [O, K].
MIXBIT_OPS_API at::Tensor optimize_rounding(const at::Tensor& weight,     // [O, K], float32
                                            const at::Tensor& moments,    // [G, K, K], float32: of the inputs
                                            const at::Tensor& scale,      // [1] or [O], float32
                                            const at::Tensor& bit_width,  // [1] or [O], float32
                                            bool narrow_range = true, double damping = 0.01, int64_t sweeps = 20);

// Counts how often weights change their level, after each step of an optimizer; see the schema in library.cpp for what
// is kept. score: 0 adj, 1 pair, 2 osc, 3 ema. Returns how many switched, int64 [weights].
MIXBIT_OPS_API at::Tensor update_level_switches_(
    at::TensorList weights,     // float32, float16, bfloat16
    at::TensorList scales,      // [1] or [size of axis], float32
    at::TensorList bit_widths,  // [1] or [size of axis], float32; with extra_bits at most 8
    at::TensorList extra_bits,  // like the weight, uint8, 0 to 2; or empty
    at::TensorList codes, at::TensorList marks, at::TensorList counts, at::TensorList runs, int64_t score = 0,
    double momentum = 0.01, bool narrow_range = false, std::optional<int64_t> axis = std::nullopt,
    int64_t rounding = 1);

// Holds weights at a level that oscillate more often than threshold (Nagel et al., arXiv 2203.11086). Returns how many
// are frozen, int64 [weights]. Call it without gradients: the weights are changed.
MIXBIT_OPS_API at::Tensor freeze_oscillating_(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                              at::TensorList extra_bits,
                                              at::TensorList codes,        // like the weight, int8
                                              at::TensorList marks,        // like the weight, int8
                                              at::TensorList frequencies,  // like the weight, float32
                                              at::TensorList averages,     // like the weight, float32
                                              double threshold, double momentum = 0.01, bool narrow_range = false,
                                              std::optional<int64_t> axis = std::nullopt, int64_t rounding = 1);

// Codes of `bits` bits (1 ... 16) along the last dimension, little end first; rows start at a byte.
MIXBIT_OPS_API at::Tensor pack_bits(const at::Tensor& codes,     // [..., n], any integer type; signed or unsigned
                                    int64_t bits);               // returns uint8 [..., ceil(n bits / 8)]
MIXBIT_OPS_API at::Tensor unpack_bits(const at::Tensor& packed,  // uint8 [..., ceil(n bits / 8)]
                                      int64_t bits, int64_t n, bool is_signed);  // returns the smallest integer type

// Layers on codes (docs/integer_semantics.md): y = clamp(rne(total multiplier) + y_zero_point, y_low, y_high), with
// total = sum (x - x_zero_point) weight + bias. Returns int8 where y_low < 0, else uint8. CPU only.
MIXBIT_OPS_API at::Tensor int_conv2d(const at::Tensor& x,                    // [N, C, H, W], int8 or uint8
                                     const at::Tensor& weight,               // [O, C / groups, kh, kw], int8
                                     const std::optional<at::Tensor>& bias,  // [O], int32
                                     const at::Tensor& multiplier,           // [O], float32
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, int64_t x_zero_point = 0, int64_t y_zero_point = 0,
                                     int64_t y_low = 0, int64_t y_high = 255,
                                     int64_t weight_bits = 8);  // 1 ... 8: what all codes of the weight fit
MIXBIT_OPS_API at::Tensor int_linear(const at::Tensor& x,       // [..., I], int8 or uint8
                                     const at::Tensor& weight,  // [O, I], int8
                                     const std::optional<at::Tensor>& bias,  // [O], int32
                                     const at::Tensor& multiplier,           // [O], float32
                                     int64_t x_zero_point = 0, int64_t y_zero_point = 0, int64_t y_low = 0,
                                     int64_t y_high = 255, int64_t weight_bits = 8);
MIXBIT_OPS_API at::Tensor requantize(const at::Tensor& total,       // any shape, int32
                                     const at::Tensor& multiplier,  // [1] or [total.size(axis)], float32
                                     int64_t zero_point = 0, int64_t low = 0, int64_t high = 255,
                                     std::optional<int64_t> axis = std::nullopt);

// Hard-concrete gates in 0 ... 1, shape of noise; gradient to the logits.
MIXBIT_OPS_API at::Tensor sample_gates(const at::Tensor& gate_logits,  // [K - 1], float32
                                       const at::Tensor& noise,        // [K - 1] or [K - 1, N], float32 in 0 ... 1
                                       double temperature);

// x on nested grids that gates open one after the other: Q_0 + sum_j z_1 ... z_j (Q_j - Q_(j-1)). Gradients to x, gates
// and, in the residual form, scale_range.
MIXBIT_OPS_API at::Tensor gated_fake_quantize(
    const at::Tensor& x,            // any shape
    const at::Tensor& scale_range,  // [1] or [x.size(axis)], float32
    const at::Tensor& gates,     // [K - 1] or [K - 1, x.size(0)] (samples; beside axis 0 channels), float32 in 0 ... 1
    at::IntArrayRef precisions,  // K ascending bit-widths
    bool is_signed, std::optional<int64_t> axis = std::nullopt, int64_t form = 0);  // form: 0 difference, 1 residual

// sum_k weights[k] fake_quantize(x, scales[k], 0, bit_widths[k]); gradients to x, scales and weights.
MIXBIT_OPS_API at::Tensor mixture_fake_quantize(const at::Tensor& x,           // any shape
                                                const at::Tensor& scales,      // [K] or [K, x.size(axis)], float32
                                                const at::Tensor& weights,     // [K], float32
                                                const at::Tensor& bit_widths,  // [K], float32
                                                bool is_signed, std::optional<int64_t> axis = std::nullopt);

// The penalty of all gates of a model, float32 []; gradients to both logits.
MIXBIT_OPS_API at::Tensor expected_cost(const at::Tensor& act_logits,     // [L, Ka - 1], float32
                                        const at::Tensor& weight_logits,  // [L, Kw - 1], float32
                                        const at::Tensor& values,         // [L, Ka, Kw], float32 or float64
                                        int64_t form,                     // 0 expected, 1 separate, 2 joint
                                        double temperature = 0.5);

// How steps shrink near decision thresholds (python/mixbit/ops has the formulas), and the signed grids of the weights:
// one entry for each weight.
struct ThresholdRule {
  std::vector<at::Tensor> scales;      // [1] or [weight.size(0)], float32
  std::vector<at::Tensor> bit_widths;  // [1] or [weight.size(0)], float32
  std::vector<at::Tensor> extra_bits;  // uint8 like the weight, or [0]
  std::vector<bool> narrow_range;
  int64_t shape = 1;     // 0 off, 1 step, 2 linear, 3 gauss
  double alpha = 0.1;    // multiplier at a threshold
  double rho = 0.125;    // reach of a threshold in steps of the grid
  bool on_grad = false;  // multiplies gradients instead of updates; for the two steps
};

// As in torch.optim.SGD. first_step: momenta hold nothing yet.
struct SgdOptions {
  double momentum = 0.0;
  double dampening = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
  bool maximize = false;
  bool first_step = false;
  std::optional<at::Tensor> grad_scale = std::nullopt;  // divides the gradients, in place
  std::optional<at::Tensor> found_inf = std::nullopt;   // the step is left out unless 0
};

// As in torch.optim.Adam, or AdamW where decoupled.
struct AdamOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool decoupled = true;
  bool amsgrad = false;
  bool maximize = false;
  std::optional<at::Tensor> grad_scale = std::nullopt;
  std::optional<at::Tensor> found_inf = std::nullopt;
};

// A step of SGD on all weights of a model, in place and under no_grad; lists of one length, shapes and dtypes of a
// weight's own. momenta: empty without momentum. lr: one number.
MIXBIT_OPS_API void threshold_aware_step_(at::TensorList weights, at::TensorList grads, at::TensorList momenta,
                                          const at::Tensor& lr, const ThresholdRule& rule,
                                          const SgdOptions& options = {});

// The same for Adam; state_steps: one number each, this step included; max_exp_avg_sqs: empty without amsgrad.
MIXBIT_OPS_API void threshold_aware_adam_step_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                                               at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                                               at::TensorList state_steps, const at::Tensor& lr,
                                               const ThresholdRule& rule, const AdamOptions& options = {});

// After a step of any optimizer: weight = before + g(before) (weight - before).
MIXBIT_OPS_API void scale_updates_(at::TensorList weights, at::TensorList before, const ThresholdRule& rule);

// g of every weight.
MIXBIT_OPS_API std::vector<at::Tensor> threshold_multipliers(at::TensorList weights, const ThresholdRule& rule);

}  // namespace mixbit
