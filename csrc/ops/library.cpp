// All schemas of the library in one place. Strings only: a function pointer in m.def would make the op composite and
// leave it without a fake. Kernels register themselves per dispatch key in cpu/, cuda/ and autograd/.
#include <torch/library.h>

TORCH_LIBRARY(mixbit, m) {
  // The module that registers the fakes; torch names it in the error when a fake is missing.
  m.set_python_module("mixbit.ops._fakes");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // x: any float dtype and layout; scale, zero_point, bit_width: float32 [1] or [size of axis]. rounding: 0 half_even,
  // 1 half_up. group_size is reserved. gradient: 0 learned_step, 1 clip, here and in all of fake_quantize's forms.
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor bit_width, *, bool signed=True, "
      "bool narrow_range=False, int? axis=None, int rounding=0, int? group_size=None, int gradient=0) -> Tensor",
      tags);
  // Gradients that are not asked for (output_mask) come back as empty tensors of shape [0].
  m.def(
      "_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bit_width, *, "
      "bool signed, bool narrow_range, int? axis, int rounding, int? group_size, bool[3] output_mask, "
      "int gradient=0) -> (Tensor, Tensor, Tensor)",
      tags);

  // The same, written over grad.
  m.def(
      "_fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bit_width, *, "
      "bool signed, bool narrow_range, int? axis, int rounding, int? group_size, bool[2] output_mask, "
      "int gradient=0) -> (Tensor, Tensor)",
      tags);
  // fake_quantize of many tensors (all weights of a model) in one parallel region or one launch; lists of one length.
  m.def(
      "fake_quantize_foreach(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, Tensor[] bit_widths, *, "
      "bool signed=True, bool narrow_range=False, int? axis=None, int rounding=0, int? group_size=None, "
      "int gradient=0) -> Tensor[]",
      tags);
  m.def(
      "_fake_quantize_backward_foreach(Tensor[] grads, Tensor[] xs, Tensor[] scales, Tensor[] zero_points, "
      "Tensor[] bit_widths, *, bool signed, bool narrow_range, int? axis, int rounding, int? group_size, "
      "bool[3] output_mask, int gradient=0) -> (Tensor[], Tensor[], Tensor[])",
      tags);
  // fake_quantize and one bit an element, uint8, in an order that the backward knows from x's strides: all that has to
  // be saved when only x needs a gradient.
  m.def(
      "_fake_quantize_mask(Tensor x, Tensor scale, Tensor zero_point, Tensor bit_width, *, bool signed, "
      "bool narrow_range, int? axis, int rounding, int? group_size, int gradient=0) -> (Tensor, Tensor)",
      tags);
  m.def("_fake_quantize_mask_backward(Tensor grad, Tensor mask, SymInt[] strides, *, int? axis) -> Tensor", tags);

  // fake_quantize on signed grids that are finer for some elements: extra_bits, uint8 like x, 0 ... 2 each, halves the
  // step that often. rounding: 0 half_even, 1 half_up.
  m.def(
      "extra_level_fake_quantize(Tensor x, Tensor scale, Tensor bit_width, Tensor extra_bits, *, int? axis=None, "
      "bool narrow_range=False, int rounding=1) -> Tensor",
      tags);
  // Gradients of x and scale.
  m.def(
      "_extra_level_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor bit_width, Tensor extra_bits, "
      "*, int? axis, bool narrow_range, int rounding, bool[2] output_mask) -> (Tensor, Tensor)",
      tags);

  // Both operands quantized, then multiplied in out_dtype (None: the operands' own); no quantized copy is saved for the
  // backward, which recomputes them. x_gradient, w_gradient: fake_quantize's gradient of either.
  m.def(
      "quantized_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor x_zero_point, Tensor x_bits, "
      "Tensor w_scale, Tensor w_bits, *, bool signed_x, bool w_narrow_range=True, int rounding=0, "
      "int? group_size=None, SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, "
      "ScalarType? out_dtype=None, int x_gradient=0, int w_gradient=0) -> Tensor",
      tags);
  m.def(
      "_quantized_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor x_scale, Tensor x_zero_point, "
      "Tensor x_bits, Tensor w_scale, Tensor w_bits, *, bool signed_x, bool w_narrow_range, int rounding, "
      "int? group_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[6] output_mask, "
      "int x_gradient=0, int w_gradient=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor x_zero_point, Tensor x_bits, "
      "Tensor w_scale, Tensor w_bits, *, bool signed_x, bool w_narrow_range=True, int rounding=0, "
      "int? group_size=None, ScalarType? out_dtype=None, int x_gradient=0, int w_gradient=0) -> Tensor",
      tags);
  m.def(
      "_quantized_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor x_scale, Tensor x_zero_point, "
      "Tensor x_bits, Tensor w_scale, Tensor w_bits, *, bool signed_x, bool w_narrow_range, int rounding, "
      "int? group_size, bool[6] output_mask, int x_gradient=0, int w_gradient=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);

  // scales: [K] or [K, C]; bit_widths: [K]. signal: float64 [] or [C]; noise: float64 [K] or [K, C].
  m.def(
      "quantization_noise(Tensor x, Tensor scales, Tensor bit_widths, *, bool signed, bool narrow_range, "
      "int? axis=None) -> (Tensor signal, Tensor noise)",
      tags);
  // The same for many tensors at once; each has its own scales and bit_widths.
  m.def(
      "quantization_noise_foreach(Tensor[] xs, Tensor[] scales, Tensor[] bit_widths, *, bool signed, "
      "bool narrow_range, int? axis=None) -> (Tensor[] signals, Tensor[] noises)",
      tags);
  // sum of (x - reference)^2 and of reference^2, float64 [] each: the noise of a layer's output, one read of each.
  m.def("noise_power(Tensor x, Tensor reference) -> (Tensor signal, Tensor noise)", tags);

  // min, max, sum, sum of squares: float64 [] or [C]. histogram: float64 [3, bins] or [C, 3, bins] (count, sum, sum of
  // squares), over [-r, r), r the smallest power of two above max |x|: ranges nest, so histograms of batches can be
  // merged exactly.
  m.def(
      "observe(Tensor x, *, int? axis=None, int bins=0) "
      "-> (Tensor min, Tensor max, Tensor sum, Tensor sum_sq, Tensor histogram)",
      tags);
  // The scale k * max / quant_max, k in {0.20, 0.21, ..., 1.00}, of least squared error. bit_widths: [K].
  // scales: float32 [K] or [K, C]. Exact on the elements of x.
  m.def("mse_scales(Tensor x, Tensor bit_widths, *, bool signed, bool narrow_range, int? axis=None) -> Tensor", tags);
  // The same from observe's histogram and its min and max (float64 []).
  m.def(
      "mse_scales_from_histogram(Tensor histogram, Tensor min, Tensor max, Tensor bit_widths, *, bool signed, "
      "bool narrow_range) -> Tensor",
      tags);
  // quantization_noise's noise, estimated from observe's histogram. scales, bit_widths: [K]; noise: float64 [K].
  m.def(
      "quantization_noise_from_histogram(Tensor histogram, Tensor min, Tensor max, Tensor scales, Tensor bit_widths, "
      "*, bool signed, bool narrow_range) -> Tensor",
      tags);
  // Each weight becomes the one of its two neighbours on the grid with which the outputs change least. weight: float32
  // [O, K]; moments: float32 [G, K, K], the second moments of the inputs of each of G groups of rows; scale, bit_width:
  // float32 [1] or [O]. Returns levels of the grid, [O, K].
  m.def(
      "optimize_rounding(Tensor weight, Tensor moments, Tensor scale, Tensor bit_width, *, bool narrow_range=True, "
      "float damping=0.01, int sweeps=20) -> Tensor",
      tags);

  // Codes of `bits` bits (1 ... 16) packed along the last dimension, little end first, each row from a byte of its own.
  // codes: any integer dtype, [..., n]; packed: uint8 [..., ceil(n bits / 8)]. Unpacked codes are int8 or uint8 up to 8
  // bits, then int16, and int32 for 16 unsigned bits.
  m.def("pack_bits(Tensor codes, int bits) -> Tensor", tags);
  m.def("unpack_bits(Tensor packed, int bits, SymInt n, bool signed) -> Tensor", tags);

  // Layers on codes (docs/integer_semantics.md), on the CPU: clamp(rne(total multiplier) + zero point), totals of 32
  // bits. x: int8 or uint8 codes, [N, C, H, W] or [..., I]; weight: int8 codes of weight_bits bits; bias: int32 [O];
  // multiplier: float32 [O]. Returns int8 where y_low < 0, else uint8; an image is channels_last.
  m.def(
      "int_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor multiplier, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, *, int x_zero_point=0, int y_zero_point=0, int y_low=0, int y_high=255, "
      "int weight_bits=8) -> Tensor",
      tags);
  m.def(
      "int_linear(Tensor x, Tensor weight, Tensor? bias, Tensor multiplier, *, int x_zero_point=0, "
      "int y_zero_point=0, int y_low=0, int y_high=255, int weight_bits=8) -> Tensor",
      tags);
  // total: int32; multiplier: float32 [1] or [size of axis].
  m.def(
      "requantize(Tensor total, Tensor multiplier, *, int zero_point=0, int low=0, int high=255, int? axis=None) "
      "-> Tensor",
      tags);

  // Hard-concrete gates. gate_logits: float32 [G]; noise: float32 [G] or [G, N]; returns noise's shape.
  m.def("sample_gates(Tensor gate_logits, Tensor noise, float temperature) -> Tensor", tags);
  m.def("_sample_gates_backward(Tensor grad, Tensor gate_logits, Tensor noise, float temperature) -> Tensor", tags);
  // x on grids that gates open one after the other. scale_range: float32 [1] or [size of axis]; gates: float32 [K - 1],
  // or [K - 1, size of dimension 0] for gates of each sample, or, beside axis 0, of each channel; precisions: K
  // ascending bit-widths. form: 0 difference, 1 residual.
  m.def(
      "gated_fake_quantize(Tensor x, Tensor scale_range, Tensor gates, int[] precisions, *, bool signed, "
      "int? axis=None, int form=0) -> Tensor",
      tags);
  // Gradients of x, scale_range (that of a learned step on the widest grid) and gates.
  m.def(
      "_gated_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale_range, Tensor gates, int[] precisions, *, "
      "bool signed, int? axis, int form, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      tags);
  // sum_k weights[k] fake_quantize(x, scales[k], 0, bit_widths[k]). scales: float32 [K] or [K, size of axis]; weights,
  // bit_widths: float32 [K].
  m.def(
      "mixture_fake_quantize(Tensor x, Tensor scales, Tensor weights, Tensor bit_widths, *, bool signed, "
      "int? axis=None) -> Tensor",
      tags);
  // Gradients of x, scales and weights.
  m.def(
      "_mixture_fake_quantize_backward(Tensor grad, Tensor x, Tensor scales, Tensor weights, Tensor bit_widths, *, "
      "bool signed, int? axis, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      tags);
  // The penalty of all gates of a model. act_logits: float32 [L, Ka - 1]; weight_logits: float32 [L, Kw - 1]; values:
  // float32 or float64 [L, Ka, Kw]. form: 0 expected, 1 separate, 2 joint. Returns float32 [].
  m.def(
      "expected_cost(Tensor act_logits, Tensor weight_logits, Tensor values, int form, float temperature=0.5) "
      "-> Tensor",
      tags);
  // Gradients of both logits.
  m.def(
      "_expected_cost_backward(Tensor grad, Tensor act_logits, Tensor weight_logits, Tensor values, int form, "
      "float temperature) -> (Tensor, Tensor)",
      tags);

  // How often the weights of a model change their level: one call after each step of the optimizer. scales, bit_widths:
  // float32 [1] or [size of axis]; extra_bits: uint8 like the weight, or empty; codes: int8 like the weight, the codes
  // of the step before. What is kept besides, like the weight (empty where a score has none): score 0 (adj) counts
  // int16; 1 (pair) marks int8, counts int16, runs int16; 2 (osc) marks, counts; 3 (ema) marks, and counts float32.
  // Returns how many weights switched, int64 [tensors].
  m.def(
      "update_level_switches_(Tensor[] weights, Tensor[] scales, Tensor[] bit_widths, Tensor[] extra_bits, "
      "Tensor(a!)[] codes, Tensor(b!)[] marks, Tensor(c!)[] counts, Tensor(d!)[] runs, *, int score=0, "
      "float momentum=0.01, bool narrow_range=False, int? axis=None, int rounding=1) -> Tensor",
      tags);
  // Holds weights at a level that have oscillated more often than threshold (a frequency a step; 0: none new). codes:
  // int8 in units of scale / 4; marks: int8, 2 of frozen weights; frequencies, averages (of codes): float32; all like
  // the weight. Returns how many are frozen, int64 [tensors].
  m.def(
      "freeze_oscillating_(Tensor(a!)[] weights, Tensor[] scales, Tensor[] bit_widths, Tensor[] extra_bits, "
      "Tensor(b!)[] codes, Tensor(c!)[] marks, Tensor(d!)[] frequencies, Tensor(e!)[] averages, *, float threshold, "
      "float momentum=0.01, bool narrow_range=False, int? axis=None, int rounding=1) -> Tensor",
      tags);

  // A step of SGD on all weights of a model, smaller near the decision thresholds of their grids. One parallel region
  // or one launch a dtype; each weight is read and written once. weights, grads, momenta: lists of one length, each
  // tensor of one float dtype and shape (momenta: empty without momentum); scales, bit_widths: float32 [1] or [size of
  // axis 0]; extra_bits: uint8 like the weight, or [0]; lr, grad_scale, found_inf: one number each. shape: 0 off,
  // 1 step, 2 linear, 3 gauss. grads are written to where grad_scale divides them.
  m.def(
      "threshold_aware_step_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] momenta, Tensor[] scales, "
      "Tensor[] bit_widths, Tensor[] extra_bits, Tensor lr, *, bool[] narrow_range, int shape, float alpha, float rho, "
      "bool on_grad, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
      "bool first_step, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
      tags);
  // The same for Adam and AdamW (decoupled). state_steps: one number each, this step included. max_exp_avg_sqs: empty
  // without amsgrad.
  m.def(
      "threshold_aware_adam_step_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor[] state_steps, Tensor[] scales, "
      "Tensor[] bit_widths, Tensor[] extra_bits, Tensor lr, *, bool[] narrow_range, int shape, float alpha, float rho, "
      "bool on_grad, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool amsgrad, "
      "bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
      tags);
  // After a step of any optimizer: weight = before + g(before) (weight - before).
  m.def(
      "scale_updates_(Tensor(a!)[] weights, Tensor[] before, Tensor[] scales, Tensor[] bit_widths, "
      "Tensor[] extra_bits, *, bool[] narrow_range, int shape, float alpha, float rho) -> ()",
      tags);
  // g of every weight, like the weights.
  m.def(
      "threshold_multipliers(Tensor[] weights, Tensor[] scales, Tensor[] bit_widths, Tensor[] extra_bits, *, "
      "bool[] narrow_range, int shape, float alpha, float rho) -> Tensor[]",
      tags);
}
