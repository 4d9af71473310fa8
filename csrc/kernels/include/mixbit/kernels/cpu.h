#pragma once

// CPU kernels: raw pointers, no allocation, no threads, no exceptions. One table of functions per instruction set; all
// tables compute the same bits.

#include <cstdint>

#include <mixbit/common/gates.h>
#include <mixbit/common/isa.h>
#include <mixbit/common/levels.h>
#include <mixbit/common/numerics.h>
#include <mixbit/common/steps.h>
#include <mixbit/common/switches.h>
#include <mixbit/kernels/storage.h>

namespace mixbit::kernels::cpu {

using kernels::StorageType;
using mixbit::Isa;

// Sums are kept in this many fp32 lanes (element i in lane i mod 16) inside a block, whatever the vector width.
constexpr int64_t kLanes = 16;
// Elements of one block of a reduction; the caller adds the blocks' doubles in order.
constexpr int64_t kReduceBlock = 16384;

// Parameters of one run of elements; zero_point is already rounded. gradient: of fake_quantize's backward and mask.
struct Quantizer {
  float scale;
  float zero_point;
  QuantRange range;
  Rounding rounding;
  Gradient gradient = Gradient::kLearnedStep;
};

struct Moments {
  double min;
  double max;
  double sum;
  double sum_squares;
};

// Most candidate grids of a mixture: one for each bit-width.
constexpr int64_t kMaxGrids = kMaxBitWidth;

// Candidate grids of one run and what each contributes: y = sum_k weights[k] level_k(x). zero_point counts as 0,
// rounding as half_even.
struct Mixture {
  const Quantizer* quantizers;  // [count]
  const float* weights;         // [count]
  int64_t count;                // 1 ... kMaxGrids
  MixtureForm form;
};

// What counting keeps of a run of weights, as in SwitchState; null where the score has none.
struct SwitchStates {
  int8_t* codes;
  int8_t* marks;
  int16_t* counts;
  int16_t* runs;
  float* frequencies;
};

// What freezing keeps of a run of weights, as in FreezeState.
struct FreezeStates {
  int8_t* codes;
  int8_t* marks;
  float* frequencies;
  float* averages;
};

// What an op on the levels of a run of weights found: how many switched or are frozen, and the most extra bits, of
// which more than kMaxExtraBits is an error of the caller (memory is safe, codes are not what they should be).
struct LevelFindings {
  int64_t count;
  int32_t most_extra_bits;
};

// A run of one weight in an optimizer's step; what is absent is null. All of one storage type.
struct StepRun {
  void* weight;
  void* grad;
  void* momentum;  // the first moment for Adam
  void* moment2;
  void* largest_moment2;
  const uint8_t* extra_bits;
  int64_t n;
};

struct KernelTable {
  Isa isa;
  // y[i] = fake_quantize(x[i]); x == y is allowed. `stream` asks for stores that bypass the cache, for outputs that do
  // not fit it (honoured where y is aligned to a vector).
  void (*fake_quantize)(StorageType storage, const void* x, void* y, int64_t n, const Quantizer& quantizer,
                        bool stream);
  // dx[i] and the sums of dscale and dzero_point; n <= kReduceBlock. Null: not asked for (dzero_point only together
  // with dscale).
  void (*fake_quantize_backward)(StorageType storage, const void* grad, const void* x, void* dx, int64_t n,
                                 const Quantizer& quantizer, double* dscale, double* dzero_point, bool stream);
  // fake_quantize, and bit i % 8 of mask[i / 8] = whether x[i] lies inside the grid, as the gradient counts it: all
  // that a backward needs whose scale is fixed. The unused bits of the last byte are 0.
  void (*fake_quantize_mask)(StorageType storage, const void* x, void* y, uint8_t* mask, int64_t n,
                             const Quantizer& quantizer);
  // dx[i] = grad[i] where bit i is set, else 0; grad == dx is allowed.
  void (*apply_mask)(StorageType storage, const void* grad, const uint8_t* mask, void* dx, int64_t n);
  // signal = sum x^2; noise[k] = sum (x - fake_quantize_k(x))^2; x is read once. zero_point counts as 0, rounding
  // as half_even; n <= kReduceBlock.
  void (*quantization_noise)(StorageType storage, const void* x, int64_t n, const Quantizer* quantizers, int64_t count,
                             double* signal, double* noise);
  // signal = sum reference^2, noise = sum (x - reference)^2. n <= kReduceBlock.
  void (*noise_power)(StorageType storage, const void* x, const void* reference, int64_t n, double* signal,
                      double* noise);
  // NaN anywhere makes min and max NaN. 0 < n <= kReduceBlock.
  void (*observe)(StorageType storage, const void* x, int64_t n, Moments* moments);
  // y[i] = sum_k weights[k] level_k(x[i]), added in order; x is read once. Grids of weight 0 are skipped.
  void (*mixture)(StorageType storage, const void* x, void* y, int64_t n, const Mixture& mixture, bool stream);
  // dx[i] and, over the run, the sums of what `form` needs; n <= kReduceBlock. Null: not asked for (steps only together
  // with levels).
  //   kMixture: dx = grad times the weights of the grids in which x lies; levels[k] = sum grad level_k,
  //     steps[k] = sum grad step_gradient_k.
  //   gated: dx = grad inside the last grid; levels[k] = sum grad (level_(k+1) - level_k), count - 1 of them;
  //     steps[0] = sum grad step_gradient of the last grid.
  void (*mixture_backward)(StorageType storage, const void* grad, const void* x, void* dx, int64_t n,
                           const Mixture& mixture, double* levels, double* steps, bool stream);
  // y[i] = extra_level_fake_quantize(x[i]) with extra[i] extra bits, each at most kMaxExtraBits. zero_point counts as
  // 0; the range is that of the base grid.
  void (*extra_levels)(StorageType storage, const void* x, const uint8_t* extra, void* y, int64_t n,
                       const Quantizer& quantizer, bool stream);
  // dx[i] and the sum of dscale; n <= kReduceBlock. Null: not asked for.
  void (*extra_levels_backward)(StorageType storage, const void* grad, const void* x, const uint8_t* extra, void* dx,
                                int64_t n, const Quantizer& quantizer, double* dscale, bool stream);
  // Counts level switches of the signed weights x, whose grids have extra_bits[i] more bits (null: none), and keeps
  // their codes, which must fit int8.
  LevelFindings (*count_switches)(StorageType storage, const void* x, const uint8_t* extra_bits, int64_t n,
                                  const Quantizer& quantizer, SwitchScore score, float momentum,
                                  const SwitchStates& states);
  // Takes x in and holds what is frozen at its level; bit_width + kMaxExtraBits <= 8.
  LevelFindings (*freeze_oscillating)(StorageType storage, void* x, const uint8_t* extra_bits, int64_t n,
                                      const Quantizer& quantizer, float momentum, float threshold,
                                      const FreezeStates& states);
  // sgd_step and adam_step of common/steps.h, everything read and written once. A grad_scale other than 1 divides the
  // gradients, which are stored so.
  void (*sgd_step)(StorageType storage, const StepRun& run, const Quantizer& quantizer,
                   const StepMultiplier& multiplier, const SgdRule& rule, float grad_scale);
  void (*adam_step)(StorageType storage, const StepRun& run, const Quantizer& quantizer,
                    const StepMultiplier& multiplier, const AdamRule& rule, float grad_scale);
  // weight[i] = scaled_update(before[i], weight[i], g(before[i])).
  void (*scale_updates)(StorageType storage, const void* before, void* weight, const uint8_t* extra_bits, int64_t n,
                        const Quantizer& quantizer, const StepMultiplier& multiplier);
  // out[i] = g(weight[i]).
  void (*step_multipliers)(StorageType storage, const void* weight, void* out, const uint8_t* extra_bits, int64_t n,
                           const Quantizer& quantizer, const StepMultiplier& multiplier);
};

// The widest instruction set of this processor, not beyond the cap in MIXBIT_CPU_ISA.
Isa detected_isa();

// The kernels of the widest available instruction set up to `isa`.
const KernelTable& kernels(Isa isa);

}  // namespace mixbit::kernels::cpu
