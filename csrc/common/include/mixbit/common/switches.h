#pragma once

// What training with switching weights counts and freezes, for one weight and one step of the optimizer. The scores are
// those after which weights are given extra levels (Kim et al., IEEE TNNLS 32(7), 2021; the definitions are ours, since
// the paper's abstract names none); oscillations and freezing are those of Nagel et al., ICML 2022 (arXiv 2203.11086,
// section 4 and algorithm 1).

#include <cstdint>

#include <mixbit/common/levels.h>

namespace mixbit {

// What is counted. The values are part of the op schemas (torch.ops.mixbit.*): do not renumber.
enum class SwitchScore : int32_t {
  kAdjacent = 0,     // switches between contiguous levels
  kPair = 1,         // the longest run of such switches between the same two levels
  kOscillation = 2,  // switches in the direction opposite to the switch before
  kEma = 3,          // the exponential average of oscillations a step
};

constexpr int kMaxSwitchCount = 32767;
// Averages below this are 0: they would decay into subnormal numbers, which are slow.
constexpr float kSmallestFrequency = 0x1p-100f;

// What is kept of a weight from step to step.
struct SwitchState {
  int code;         // the last one
  int mark;         // pair: the lower code of the last switch between contiguous levels; else the last direction
  int count;        // saturates
  int run;          // pair: contiguous switches on this pair until now
  float frequency;  // ema
};

// -1, 0 or 1.
MIXBIT_HD int switch_direction(int before, int code) { return code > before ? 1 : code < before ? -1 : 0; }

MIXBIT_HD float update_frequency(bool oscillates, float momentum, float frequency) {
  const float updated = (oscillates ? momentum : 0.0f) + (1.0f - momentum) * frequency;
  return updated >= kSmallestFrequency ? updated : 0.0f;
}

// Takes in the code of this step; whether it is another one.
template <SwitchScore kScore>
MIXBIT_HD bool count_switch(int code, float momentum, SwitchState& state) {
  const int direction = switch_direction(state.code, code);
  if constexpr (kScore == SwitchScore::kAdjacent || kScore == SwitchScore::kPair) {
    if ((code - state.code) * direction == 1) {
      if constexpr (kScore == SwitchScore::kAdjacent) {
        state.count += state.count < kMaxSwitchCount ? 1 : 0;
      } else {
        const int pair = code < state.code ? code : state.code;
        state.run = pair != state.mark ? 1 : state.run < kMaxSwitchCount ? state.run + 1 : kMaxSwitchCount;
        state.mark = pair;
        state.count = state.run > state.count ? state.run : state.count;
      }
    }
  } else {
    const bool oscillates = direction * state.mark == -1;
    if constexpr (kScore == SwitchScore::kOscillation) {
      state.count += oscillates && state.count < kMaxSwitchCount ? 1 : 0;
    } else {
      state.frequency = update_frequency(oscillates, momentum, state.frequency);
    }
    state.mark = direction != 0 ? direction : state.mark;
  }
  state.code = code;
  return direction != 0;
}

// The code of a weight as counting takes it: that of its own grid; a weight that is NaN keeps the code before.
MIXBIT_HD int counted_code(float x, float scale, QuantRange base, int extra, Rounding rounding, int before) {
  const float code = extra_level_code(x, scale, base, extra, rounding);
  return code == code ? static_cast<int>(code) : before;
}

// Iterative freezing. Codes are kept in units of scale / 2^kMaxExtraBits, so that extra levels given on the way change
// none of them.
constexpr int kFrozen = 2;

struct FreezeState {
  int code;         // the last one; of a frozen weight the one it is held at
  int mark;         // the last direction, or kFrozen
  float frequency;  // exponential average of oscillations
  float average;    // exponential average of codes
};

// Takes in a weight and returns it, or the level at which it is frozen: once its frequency is above the threshold, the
// one next to the average code of the steps before (the code of this step counts only afterwards). threshold 0: nothing
// new is frozen.
MIXBIT_HD float freeze_oscillating(float x, float scale, QuantRange base, int extra, Rounding rounding, float momentum,
                                   float threshold, FreezeState& state) {
  if (state.mark != kFrozen) {
    const float units = extra_steps(kMaxExtraBits - extra);
    const float level = extra_level_code(x, scale, base, extra, rounding) * units;
    const int code = level == level ? static_cast<int>(level) : state.code;
    const int direction = switch_direction(state.code, code);
    state.frequency = update_frequency(direction * state.mark == -1, momentum, state.frequency);
    state.mark = direction != 0 ? direction : state.mark;
    if (!(threshold > 0.0f && state.frequency > threshold)) {
      state.code = code;
      state.average = momentum * static_cast<float>(code) + (1.0f - momentum) * state.average;
      return x;
    }
    state.mark = kFrozen;
    state.code = static_cast<int>(round_half_even(state.average / units) * units);
  }
  return static_cast<float>(state.code) * extra_step(scale, kMaxExtraBits);
}

}  // namespace mixbit
