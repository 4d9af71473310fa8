#pragma once

// CUDA kernels: launchers on raw device pointers and a stream, no torch. Scales, zero points and bit-widths are read on
// the device: nothing synchronizes, so a bit-width outside 1..16 yields NaN instead of an error.

#include <cstdint>

#include <mixbit/common/gates.h>
#include <mixbit/common/levels.h>
#include <mixbit/common/numerics.h>
#include <mixbit/common/scale_search.h>
#include <mixbit/common/steps.h>
#include <mixbit/common/switches.h>
#include <mixbit/kernels/storage.h>

struct CUstream_st;

namespace mixbit::kernels::cuda {

using kernels::StorageType;

// x seen as [outer, channels, inner], dense; per tensor: channels = 1. A parameter has 1 or `channels` elements.
struct QuantizeArguments {
  StorageType storage;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scale;
  int64_t scale_count;
  const float* zero_point;
  int64_t zero_point_count;
  const float* bit_width;
  int64_t bit_width_count;
  bool is_signed;
  bool narrow_range;
  Rounding rounding;
  Gradient gradient = Gradient::kLearnedStep;  // of fake_quantize's backward and mask
};

// One tensor of a list, in device memory. Blocks and channels are numbered over the whole list.
struct QuantizeEntry {
  QuantizeArguments arguments;
  const void* grad;  // backward only
  const void* x;
  void* y;  // backward: dx, may be null
  bool aligned;
  int64_t first_block;
  int64_t blocks;         // backward: of one channel
  int64_t first_channel;  // backward only, as what follows
  double* partials;       // [channels, blocks, 2]
  float* dscale;          // [channels]
  float* dzero_point;     // [channels]
};

// Elements that one thread block reduces; fixed, so that the sums do not depend on the device.
constexpr int64_t kReduceBlock = 16384;

// y[i] = fake_quantize(x[i]); x and y may be the same.
void launch_fake_quantize(const QuantizeArguments& arguments, const void* x, void* y, CUstream_st* stream);

// The same for many tensors of one storage type in one launch. `entries` lie on the device; blocks: of all of them.
void launch_fake_quantize_list(StorageType storage, const QuantizeEntry* entries, int64_t count, int64_t blocks,
                               CUstream_st* stream);
void launch_fake_quantize_backward_list(StorageType storage, const QuantizeEntry* entries, int64_t count,
                                        int64_t blocks, int64_t channels, CUstream_st* stream);

// dx[i] for every element (dx may be null), and per channel the sums of dscale and dzero_point.
//   partials: [channels, blocks_per_channel, 2] float64 scratch, see reduce_blocks
//   dscale, dzero_point: [channels] float32; the caller sums channels where a parameter has one element
void launch_fake_quantize_backward(const QuantizeArguments& arguments, const void* grad, const void* x, void* dx,
                                   double* partials, float* dscale, float* dzero_point, CUstream_st* stream);

// fake_quantize, and one bit an element: whether it lies inside the grid, as the gradient counts it. A row of `inner`
// elements has ceil(inner / 8) bytes; the unused bits are 0.
void launch_fake_quantize_mask(const QuantizeArguments& arguments, const void* x, void* y, uint8_t* mask,
                               CUstream_st* stream);

// dx[i] = grad[i] where the bit is set, else 0; rows as above.
void launch_apply_mask(StorageType storage, int64_t rows, int64_t inner, const void* grad, const uint8_t* mask,
                       void* dx, CUstream_st* stream);

// y[i] = extra_level_fake_quantize(x[i]) with extra[i] extra bits; extra bits that make no grid yield NaN. Of the
// arguments, zero points are not read and grids are signed.
void launch_extra_levels(const QuantizeArguments& arguments, const void* x, const uint8_t* extra, void* y,
                         CUstream_st* stream);

// dx[i] for every element (dx may be null), and per channel the sums of dscale.
//   partials: [channels, blocks_per_channel] float64 scratch; dscale: [channels] float32
void launch_extra_levels_backward(const QuantizeArguments& arguments, const void* grad, const void* x,
                                  const uint8_t* extra, void* dx, double* partials, float* dscale, CUstream_st* stream);

// x seen as [outer, channels, inner] against `count` candidate grids: scales [count] or [count, channels], bit_widths
// [count], all on the device.
struct NoiseArguments {
  StorageType storage;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scales;
  bool per_channel;
  const float* bit_widths;
  int64_t count;
  bool is_signed;
  bool narrow_range;
};

// One tensor of a list, as in QuantizeEntry; sums (channels * (count + 1) of each) are numbered over the whole list.
struct NoiseEntry {
  NoiseArguments arguments;
  const void* x;
  bool aligned;
  int64_t first_block;
  int64_t blocks;
  int64_t first_sum;
  double* partials;
  double* signal;
  double* noise;
};

void launch_quantization_noise_list(StorageType storage, const NoiseEntry* entries, int64_t count, int64_t blocks,
                                    int64_t sums, CUstream_st* stream);

// signal: [channels], noise: [count, channels]; partials: [channels, reduce_blocks, count + 1] float64 scratch.
void launch_quantization_noise(const NoiseArguments& arguments, const void* x, double* partials, double* signal,
                               double* noise, CUstream_st* stream);

// signal = sum reference^2, noise = sum (x - reference)^2 over n elements; partials: [reduce_blocks, 2].
void launch_noise_power(StorageType storage, int64_t n, const void* x, const void* reference, double* partials,
                        double* signal, double* noise, CUstream_st* stream);

// x seen as [samples, outer, channels, inner] against `count` candidate grids; samples > 1 only where each has gates of
// its own. Channels with gates of their own are samples.
struct MixtureArguments {
  StorageType storage;
  int64_t samples;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scales;  // mixture: [count] or [count, channels]; gated: the range, [1] or [channels]
  bool per_channel;
  int64_t scale_stride;              // gated: from the ranges of a sample to the next one's, 1 where that is a channel
  const float* weights;              // mixture: [count]; gated: the gates, [count - 1] or [count - 1, samples]
  int64_t gate_stride;               // gated: 1 or samples
  const float* bit_widths;           // mixture: [count], on the device
  int64_t precisions[kMaxBitWidth];  // gated
  int64_t count;
  bool is_signed;
  MixtureForm form;

  // Sums of the backward: of levels per sample, of steps per channel.
  MIXBIT_HD int64_t level_count() const { return form == MixtureForm::kMixture ? count : count - 1; }
  MIXBIT_HD int64_t step_count() const { return form == MixtureForm::kMixture ? count : 1; }
};

// y = sum_k weights[k] level_k(x), added in order.
void launch_mixture(const MixtureArguments& arguments, const void* x, void* y, CUstream_st* stream);

// dx (may be null) and the sums that cpu.h's mixture_backward describes.
//   partials: [samples, channels, reduce_blocks(outer * inner), level_count + step_count] float64 scratch
//   levels: [level_count, samples]; steps: [step_count, samples, channels], float64
void launch_mixture_backward(const MixtureArguments& arguments, const void* grad, const void* x, void* dx,
                             double* partials, double* levels, double* steps, CUstream_st* stream);

// dgates: [count - 1, samples] from sums of levels [count - 1, samples] (common/gates.h).
void launch_gate_gradients(const double* sums, const float* gates, int64_t samples, int64_t count, float* dgates,
                           CUstream_st* stream);

// Whether a kernel may read packs of 16 bytes at p.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// x seen as [outer, channels, inner]. moments: [channels, 4] float64 (min, max, sum, sum of squares; NaN anywhere makes
// min and max NaN); partials: [channels, reduce_blocks, 4].
void launch_moments(StorageType storage, int64_t outer, int64_t channels, int64_t inner, const void* x,
                    double* partials, double* moments, CUstream_st* stream);

// histogram: [channels, 3, bins] float64 (count, sum, sum of squares) of rows sorted upwards, over the range that
// follows from moments ([channels, 4]); zeros where a row is not finite.
void launch_histogram(int64_t channels, int64_t n, const float* sorted, const double* moments, int64_t bins,
                      double* histogram, CUstream_st* stream);

// prefix: [channels, n + 1] float64, the sums of the first i values; squares: [channels]. partials: [channels,
// reduce_blocks(n), 2].
void launch_prefix_sums(int64_t channels, int64_t n, const float* values, double* partials, double* prefix,
                        double* squares, CUstream_st* stream);

// What a search for scales reads: sorted rows with prefix sums, or one histogram (channels = 1).
struct SortedRows {
  const float* values;    // [channels, n]
  const double* prefix;   // [channels, n + 1]
  const double* squares;  // [channels]
  int64_t n;
};
struct HistogramRow {
  const double* histogram;  // [3, bins]
  const double* low;        // [1]
  const double* high;       // [1]
  Below* starts;            // [bins + 1] scratch
  double* squares;          // [1] scratch
  int64_t bins;
};
struct SearchArguments {
  int64_t channels;
  const float* bit_widths;  // [count]
  int64_t count;
  bool is_signed;
  bool narrow_range;
};

// scales: [count, channels] float32, NaN where a row is not finite; errors: [count, channels, kScaleCandidates]
// scratch.
void launch_scale_search(const SearchArguments& arguments, const SortedRows& rows, double* errors, float* scales,
                         CUstream_st* stream);
void launch_scale_search(const SearchArguments& arguments, const HistogramRow& row, double* errors, float* scales,
                         CUstream_st* stream);
// noise: [count] float64 of given scales [count].
void launch_histogram_noise(const SearchArguments& arguments, const HistogramRow& row, const float* scales,
                            double* noise, CUstream_st* stream);

// One weight of a list with what counting or freezing keeps of it, as in cpu.h. `arguments` as in QuantizeEntry,
// signed, without zero_point. A width with which codes do not fit int8 leaves weight and states as they are.
struct LevelEntry {
  QuantizeArguments arguments;
  void* weight;               // counting reads it only
  const uint8_t* extra_bits;  // null: none
  int8_t* codes;
  int8_t* marks;
  int16_t* counts;
  int16_t* runs;
  float* frequencies;
  float* averages;
  int64_t first_block;  // over the whole list
  int64_t blocks;       // of kReduceBlock elements
  int64_t* result;      // [1]: how many switched or are frozen
};

// partials: [blocks] float64 scratch.
void launch_count_switches(StorageType storage, const LevelEntry* entries, int64_t count, int64_t blocks,
                           SwitchScore score, float momentum, double* partials, CUstream_st* stream);
void launch_freeze_oscillating(StorageType storage, const LevelEntry* entries, int64_t count, int64_t blocks,
                               float momentum, float threshold, double* partials, CUstream_st* stream);

// A number that the host knows, or that lies on the device.
struct StepNumber {
  const double* device;  // null: host
  double host;
};

// One weight of a threshold-aware step, in device memory; what is absent is null. Rows of `inner` elements have a grid
// each where a parameter has more than one element.
struct StepEntry {
  void* weight;
  void* grad;
  void* momentum;  // the first moment for Adam
  void* moment2;
  void* largest_moment2;
  const uint8_t* extra_bits;
  const float* scale;
  int64_t scale_count;
  const float* bit_width;
  int64_t bit_width_count;
  bool narrow_range;
  int64_t numel;
  int64_t inner;
  int64_t first_block;
  const float* steps;  // Adam: null where host_steps holds
  double host_steps;
};

// What all weights of a step share. A found_inf other than 0 leaves everything as it is; a grad_scale other than 1
// divides the gradients, which are stored so.
struct StepArguments {
  StepMultiplier multiplier;
  StepNumber lr;
  StepNumber grad_scale;
  StepNumber found_inf;
};
struct AdamArguments {
  double beta1;
  double beta2;
  double weight_decay;
  bool decoupled;
};

// Steps of common/steps.h on many weights of one storage type; blocks: of all of them.
void launch_sgd_step_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                          const StepArguments& arguments, const SgdRule& rule, CUstream_st* stream);
void launch_adam_step_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                           const StepArguments& arguments, const AdamRule& rule, const AdamArguments& adam,
                           CUstream_st* stream);
// weight = scaled_update(grad, weight, g(grad)): `grad` holds the weights of before.
void launch_scale_updates_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                               const StepMultiplier& multiplier, CUstream_st* stream);
// grad = g(weight).
void launch_step_multipliers_list(StorageType storage, const StepEntry* entries, int64_t count, int64_t blocks,
                                  const StepMultiplier& multiplier, CUstream_st* stream);

// codes: [rows, n] of which the low bits count; packed: [rows, packed_bytes(n, bits)] (common/packing.h).
void launch_pack_bits(const int32_t* codes, int64_t rows, int64_t n, int bits, uint8_t* packed, CUstream_st* stream);
void launch_unpack_bits(const uint8_t* packed, int64_t rows, int64_t n, int bits, bool is_signed, int32_t* codes,
                        CUstream_st* stream);

// Blocks that reduce `elements` elements.
int64_t reduce_blocks(int64_t elements);

// Blocks that reduce one channel.
inline int64_t reduce_blocks(const QuantizeArguments& a) { return reduce_blocks(a.outer * a.inner); }

}  // namespace mixbit::kernels::cuda
