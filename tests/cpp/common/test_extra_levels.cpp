#include <mixbit/common/extra_levels.h>

#include <gtest/gtest.h>

#include <cmath>

namespace {

using mixbit::QuantRange;
using mixbit::Rounding;

TEST(ExtraGrid, HasTheEndsOfTheContract) {
  // 2 bits and their nested grids of 3 and 4, in steps of scale / 2^e.
  for (const bool narrow : {false, true}) {
    const QuantRange base = mixbit::quant_range(2, true, narrow);
    for (const int e : {0, 1, 2}) {
      const mixbit::ExtraGrid grid = mixbit::extra_grid(0.5f, base, narrow, e);
      const QuantRange expected = mixbit::quant_range(2 + e, true, narrow);
      EXPECT_EQ(grid.range.quant_min, expected.quant_min);
      EXPECT_EQ(grid.range.quant_max, expected.quant_max);
      EXPECT_EQ(grid.step, std::ldexp(0.5f, -e));
      EXPECT_EQ(grid.fraction, std::ldexp(1.0f, -e));
    }
  }
  EXPECT_TRUE(mixbit::is_valid_extra(14, 2));
  EXPECT_FALSE(mixbit::is_valid_extra(15, 2));
  EXPECT_FALSE(mixbit::is_valid_extra(2, 3));
}

// One more level between each two, at the old threshold: there the weight was switching.
TEST(ExtraLevels, TheMiddleOfTwoLevelsIsOne) {
  const QuantRange base = mixbit::quant_range(2, true, false);
  const auto at = [&](float x, int e) {
    return mixbit::extra_level_fake_quantize(x, 0.5f, base, false, e, Rounding::kHalfUp);
  };
  EXPECT_EQ(at(0.25f, 0), 0.5f);
  EXPECT_EQ(at(0.24f, 0), 0.0f);
  EXPECT_EQ(at(0.25f, 1), 0.25f);
  EXPECT_EQ(at(0.24f, 1), 0.25f);
  EXPECT_EQ(at(0.125f, 1), 0.25f);
  EXPECT_EQ(at(0.124f, 1), 0.0f);
  EXPECT_EQ(at(-0.13f, 2), -0.125f);
  EXPECT_EQ(at(9.0f, 0), 0.5f);  // the ends: -4 ... 3 halves and so on
  EXPECT_EQ(at(9.0f, 1), 0.75f);
  EXPECT_EQ(at(-9.0f, 2), -1.0f);
  EXPECT_TRUE(std::isnan(at(std::nanf(""), 1)));
}

// Every level of a grid is a level of the finer ones, so that an element never moves away from its value.
TEST(ExtraLevels, GridsNest) {
  for (const bool narrow : {false, true}) {
    for (const int bits : {2, 3, 8}) {
      const QuantRange base = mixbit::quant_range(bits, true, narrow);
      for (int i = -3000; i <= 3000; ++i) {
        const float x = static_cast<float>(i) * 0.0371f;
        float before = std::abs(x - mixbit::fake_quantize(x, 0.37f, 0.0f, base, Rounding::kHalfUp));
        for (const int e : {0, 1, 2}) {
          const float y = mixbit::extra_level_fake_quantize(x, 0.37f, base, narrow, e, Rounding::kHalfUp);
          EXPECT_LE(std::abs(x - y), before) << x << " " << e;
          before = std::abs(x - y);
        }
      }
    }
  }
}

TEST(ExtraLevels, GradientIsThatOfTheOwnStep) {
  const QuantRange base = mixbit::quant_range(3, true, false);
  const auto inside =
      mixbit::extra_level_fake_quantize_grad(2.0f, 0.3f, 0.5f, base, false, 1, Rounding::kHalfUp);  // v 1.2, q 1
  EXPECT_EQ(inside.dx, 2.0f);
  EXPECT_FLOAT_EQ(inside.dscale, 2.0f * (1.0f - 1.2f) / 2.0f);
  const auto outside = mixbit::extra_level_fake_quantize_grad(2.0f, 9.0f, 0.5f, base, false, 2, Rounding::kHalfUp);
  EXPECT_EQ(outside.dx, 0.0f);
  EXPECT_EQ(outside.dscale, 2.0f * 15.0f / 4.0f);
}

}  // namespace
