// Counting of level switches and freezing, on trajectories of codes written out by hand.
#include <mixbit/common/switches.h>

#include <gtest/gtest.h>

#include <vector>

namespace {

using mixbit::FreezeState;
using mixbit::Rounding;
using mixbit::SwitchScore;
using mixbit::SwitchState;

template <SwitchScore kScore>
SwitchState counted(const std::vector<int>& codes, float momentum = 0.1f, int* switches = nullptr) {
  SwitchState state{codes[0], 0, 0, 0, 0.0f};
  for (size_t i = 1; i < codes.size(); ++i) {
    const bool switched = mixbit::count_switch<kScore>(codes[i], momentum, state);
    if (switches != nullptr) *switches += switched ? 1 : 0;
  }
  return state;
}

struct Trajectory {
  std::vector<int> codes;
  int raw, adjacent, longest_run, oscillations;
  float ema;  // momentum 0.1
};

TEST(Switches, OfTrajectoriesOfCodes) {
  const Trajectory all[] = {
      {{0, 0, 0, 0, 0, 0, 0, 0}, 0, 0, 0, 0, 0.0f},      {{0, 1, 0, 1, 0, 1, 0, 1}, 7, 7, 7, 6, 0.468559f},
      {{0, 1, 2, 3, 4, 5, 6, 7}, 7, 7, 1, 0, 0.0f},  // drift is no oscillation
      {{0, 1, 1, 0, 0, 1, 1, 0}, 4, 4, 4, 3, 0.246610f}, {{0, 1, 0, -1, 0, 1, 0, -1}, 7, 7, 2, 3, 0.221949f},
      {{0, 2, 0, 2, 0, 2, 0, 2}, 7, 0, 0, 6, 0.468559f},  // no contiguous levels
      {{3, 3, 2, 3, 3, 3, 2, 3}, 4, 4, 4, 3, 0.255610f}, {{0, 0, 0, 1, 1, 1, 1, 1}, 1, 1, 1, 0, 0.0f},
      {{1, 0, 1, 2, 1, 2, 1, 0}, 7, 7, 4, 4, 0.302949f},
  };
  for (const Trajectory& t : all) {
    int raw = 0;
    EXPECT_EQ(counted<SwitchScore::kAdjacent>(t.codes, 0.1f, &raw).count, t.adjacent);
    EXPECT_EQ(raw, t.raw);
    EXPECT_EQ(counted<SwitchScore::kPair>(t.codes).count, t.longest_run);
    EXPECT_EQ(counted<SwitchScore::kOscillation>(t.codes).count, t.oscillations);
    EXPECT_NEAR(counted<SwitchScore::kEma>(t.codes).frequency, t.ema, 1e-6);
  }
}

TEST(Switches, Saturate) {
  SwitchState adjacent{0, 0, mixbit::kMaxSwitchCount, 0, 0.0f}, pair{0, 0, mixbit::kMaxSwitchCount, 32767, 0.0f};
  mixbit::count_switch<SwitchScore::kAdjacent>(1, 0.1f, adjacent);
  mixbit::count_switch<SwitchScore::kPair>(1, 0.1f, pair);
  EXPECT_EQ(adjacent.count, mixbit::kMaxSwitchCount);
  EXPECT_EQ(pair.run, mixbit::kMaxSwitchCount);
  EXPECT_EQ(mixbit::update_frequency(false, 0.5f, mixbit::kSmallestFrequency), 0.0f);
}

TEST(Freezing, HoldsAWeightAtItsAverageLevel) {
  const mixbit::QuantRange base = mixbit::quant_range(2, true, false);
  const auto freeze = [&](float x, float threshold, FreezeState& state) {
    return mixbit::freeze_oscillating(x, 0.5f, base, 0, Rounding::kHalfUp, 0.1f, threshold, state);
  };
  FreezeState state{0, 0, 0.0f, 0.0f};
  // Codes 0 1 0 1 0 in units of scale / 4: 0 4 0 4 0; two oscillations until the third step.
  EXPECT_EQ(freeze(0.3f, 0.0f, state), 0.3f);
  EXPECT_EQ(state.code, 4);
  EXPECT_EQ(freeze(0.2f, 0.15f, state), 0.2f);
  EXPECT_FLOAT_EQ(state.frequency, 0.1f);
  EXPECT_FLOAT_EQ(state.average, 0.36f);        // 0.1 * 4, then 0.9 of it
  EXPECT_EQ(freeze(0.3f, 0.15f, state), 0.0f);  // frequency 0.19: frozen at round(0.36 / 4) = 0
  EXPECT_EQ(state.mark, mixbit::kFrozen);
  EXPECT_EQ(freeze(0.4f, 0.0f, state), 0.0f);
  EXPECT_EQ(state.code, 0);
  // Most of the time at 1: frozen there, though it is now at 0.
  state = {4, 1, 0.14f, 3.9f};
  EXPECT_EQ(freeze(0.1f, 0.2f, state), 0.5f);
  // A finer grid of the weight keeps the units.
  state = {2, 1, 0.14f, 1.2f};
  EXPECT_EQ(mixbit::freeze_oscillating(0.1f, 0.5f, base, 1, Rounding::kHalfUp, 0.1f, 0.2f, state), 0.25f);
}

}  // namespace
