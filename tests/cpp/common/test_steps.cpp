// The multiplier of threshold-aware steps: golden values of the specification, properties, and the optimizers' updates.
#include <mixbit/common/steps.h>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace {

using mixbit::QuantRange;
using mixbit::StepMultiplier;
using mixbit::StepShape;

float distance(float w, float scale, int bits, int extra = 0, bool narrow = false) {
  const QuantRange range = mixbit::quant_range(bits, true, narrow);
  return mixbit::threshold_distance(w, mixbit::extra_step(scale, extra), mixbit::extra_range(range, extra));
}

TEST(ThresholdDistance, GoldenValues) {
  EXPECT_EQ(distance(0.25f, 0.5f, 2), 0.0f);
  EXPECT_EQ(distance(0.0f, 0.5f, 2), 0.5f);
  EXPECT_NEAR(distance(0.3f, 0.5f, 2), 0.1f, 1e-6f);
  EXPECT_NEAR(distance(-0.20f, 0.5f, 2), 0.1f, 1e-6f);
  EXPECT_EQ(distance(0.25f, 0.5f, 2, 1), 0.5f);  // the old threshold is a level now
  EXPECT_EQ(distance(0.125f, 0.5f, 2, 1), 0.0f);
}

TEST(ThresholdDistance, BeyondTheLastThresholdItIsTheDistanceFromThatOne) {
  // Two bits: levels -2 ... 1, thresholds -1.5, -0.5, 0.5; narrow: -0.5, 0.5.
  EXPECT_NEAR(distance(0.9f, 1.0f, 2), 0.4f, 1e-6f);
  EXPECT_EQ(distance(1.5f, 1.0f, 2), 0.5f);  // no threshold there: 1 is the last level
  EXPECT_EQ(distance(100.0f, 1.0f, 2), 0.5f);
  EXPECT_NEAR(distance(-1.6f, 1.0f, 2), 0.1f, 1e-6f);
  EXPECT_EQ(distance(-1.5f, 1.0f, 2), 0.0f);
  EXPECT_EQ(distance(-1.5f, 1.0f, 2, 0, true), 0.5f);
  EXPECT_EQ(distance(-40.0f, 1.0f, 2), 0.5f);
  EXPECT_EQ(distance(std::numeric_limits<float>::infinity(), 1.0f, 2), 0.5f);
  EXPECT_EQ(distance(std::numeric_limits<float>::quiet_NaN(), 1.0f, 2), 0.5f);
}

TEST(ThresholdDistance, IsTheLeastDistanceFromAllThresholds) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (int i = 0; i < 3000; ++i) {
    const int bits = 2 + i % 3, extra = i % 4 % 3;
    const bool narrow = i % 2 == 0;
    const float w = normal(random), scale = 0.3f;
    const QuantRange range = mixbit::quant_range(bits + extra, true, narrow);
    double least = 0.5;
    for (float code = range.quant_min; code < range.quant_max; code += 1.0f) {
      const double step = static_cast<double>(scale) / (1 << extra);
      least = std::min(least, std::abs(static_cast<double>(w) / step - (static_cast<double>(code) + 0.5)));
    }
    EXPECT_NEAR(static_cast<double>(distance(w, scale, bits, extra, narrow)), least, 1e-5) << w << " " << bits;
  }
}

TEST(StepMultiplier, GoldenTable) {
  const float distances[] = {0.0f, 0.05f, 0.1f, 0.125f, 0.2f, 0.5f};
  const float step[] = {0.1f, 0.1f, 0.1f, 1.0f, 1.0f, 1.0f};
  const float linear[] = {0.1f, 0.46f, 0.82f, 1.0f, 1.0f, 1.0f};
  const float gauss[] = {0.1f, 0.233071f, 0.525437f, 0.668909f, 0.930426f, 1.0f};
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(mixbit::step_multiplier(distances[i], {StepShape::kStep, 0.1f, 0.125f}), step[i]);
    EXPECT_NEAR(mixbit::step_multiplier(distances[i], {StepShape::kLinear, 0.1f, 0.125f}), linear[i], 1e-6f);
    EXPECT_NEAR(mixbit::step_multiplier(distances[i], {StepShape::kGauss, 0.1f, 0.125f}), gauss[i], 1e-6f);
    EXPECT_EQ(mixbit::step_multiplier(distances[i], {StepShape::kOff, 0.1f, 0.125f}), 1.0f);
  }
}

TEST(StepMultiplier, RisesFromAlphaToOne) {
  for (const auto shape : {StepShape::kStep, StepShape::kLinear, StepShape::kGauss}) {
    for (const float alpha : {0.0f, 0.1f, 0.37f, 1.0f}) {
      for (const float rho : {1e-6f, 0.01f, 0.125f, 0.5f}) {
        float last = mixbit::step_multiplier(0.0f, StepMultiplier{shape, alpha, rho});
        EXPECT_NEAR(last, alpha, 1e-6f);
        for (int i = 1; i <= 1000; ++i) {
          const float g = mixbit::step_multiplier(0.0005f * static_cast<float>(i), StepMultiplier{shape, alpha, rho});
          EXPECT_GE(g, last - 1e-7f);
          EXPECT_LE(g, 1.0f);
          last = g;
        }
      }
    }
  }
}

TEST(StepMultiplier, TheExponentialIsRightToAUnitOrTwo) {
  for (int i = 0; i <= 86990; ++i) {
    const float y = -0.001f * static_cast<float>(i);
    const double exact = std::exp(static_cast<double>(y));
    ASSERT_NEAR(static_cast<double>(mixbit::exp_negative(y)), exact, 2.5e-7 * exact) << y;
  }
  EXPECT_LT(mixbit::exp_negative(-std::numeric_limits<float>::infinity()), 1e-37f);
  EXPECT_EQ(mixbit::exp_negative(0.0f), 1.0f);
}

TEST(Steps, AMultiplierOfZeroKeepsTheWeightAndItsMomentumGoesOn) {
  const mixbit::SgdRule rule = {0.1f, 0.9f, 1.0f, 1e-2f, false, false, false, false};
  const mixbit::SgdState state = mixbit::sgd_step(2.0f, 0.5f, 0.25f, 0.0f, rule);
  EXPECT_EQ(state.weight, 2.0f);
  EXPECT_NEAR(state.momentum, 0.9f * 0.25f + 0.5f + 1e-2f * 2.0f, 1e-6f);
}

TEST(Steps, OnGradMultipliesTheGradientAlone) {
  mixbit::SgdRule rule = {0.1f, 0.9f, 1.0f, 0.5f, false, false, false, true};
  EXPECT_NEAR(mixbit::sgd_step(2.0f, 0.5f, 0.0f, 0.1f, rule).momentum, 0.1f * 0.5f + 0.5f * 2.0f, 1e-6f);
  EXPECT_NEAR(mixbit::sgd_step(2.0f, 0.5f, 0.0f, 0.1f, rule).weight, 2.0f - 0.1f * 1.05f, 1e-6f);
}

TEST(Steps, TheFirstMomentumIsTheGradientUndampened) {
  mixbit::SgdRule rule = {0.1f, 0.9f, 0.5f, 0.0f, false, false, true, false};
  EXPECT_EQ(mixbit::sgd_step(0.0f, 0.5f, NAN, 1.0f, rule).momentum, 0.5f);
  rule.first = false;
  EXPECT_EQ(mixbit::sgd_step(0.0f, 0.5f, 0.0f, 1.0f, rule).momentum, 0.25f);
}

TEST(Steps, DecoupledDecayIsPartOfTheScaledUpdate) {
  mixbit::AdamRule rule{};
  mixbit::set_adam_step(&rule, 0.1, 0.9, 0.999, 0.5, 1.0, true);
  rule.epsilon = 1e-8f;
  // A gradient of 0: the update is the decay alone.
  EXPECT_NEAR(mixbit::adam_step(1.0f, 0.0f, 0.0f, 0.0f, 0.0f, false, 1.0f, rule).weight, 0.95f, 1e-6f);
  EXPECT_NEAR(mixbit::adam_step(1.0f, 0.0f, 0.0f, 0.0f, 0.0f, false, 0.1f, rule).weight, 0.995f, 1e-6f);
  // The first step of Adam has the size of the learning rate.
  mixbit::set_adam_step(&rule, 0.1, 0.9, 0.999, 0.0, 1.0, true);
  EXPECT_NEAR(mixbit::adam_step(1.0f, 7.0f, 0.0f, 0.0f, 0.0f, false, 1.0f, rule).weight, 0.9f, 1e-6f);
  EXPECT_NEAR(mixbit::adam_step(1.0f, 7.0f, 0.0f, 0.0f, 0.0f, false, 0.25f, rule).weight, 0.975f, 1e-6f);
}

TEST(Steps, TheWholeOfAnUpdateHasTheBitsOfTheOptimizersResult) {
  EXPECT_EQ(mixbit::scaled_update(0.1f, 0.7f, 1.0f), 0.7f);
  EXPECT_EQ(mixbit::scaled_update(0.1f, 0.7f, 0.0f), 0.1f);
  EXPECT_NEAR(mixbit::scaled_update(0.1f, 0.7f, 0.5f), 0.4f, 1e-6f);
}

}  // namespace
