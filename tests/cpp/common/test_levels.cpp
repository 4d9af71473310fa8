// Grids with extra levels: nested in each other, and those of the wider bit-width at the finer step.
#include <mixbit/common/levels.h>

#include <gtest/gtest.h>

#include <cmath>

namespace {

using mixbit::Rounding;

TEST(ExtraLevels, AreTheGridOfMoreBitsAtAFinerStep) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool narrow : {false, true}) {
      if (narrow && bits == 1) continue;
      const mixbit::QuantRange base = mixbit::quant_range(bits, true, narrow);
      for (int extra = 0; extra <= mixbit::kMaxExtraBits; ++extra) {
        const mixbit::QuantRange range = mixbit::extra_range(base, extra);
        const mixbit::QuantRange expected = mixbit::quant_range(bits + extra, true, narrow);
        EXPECT_EQ(range.quant_min, expected.quant_min);
        EXPECT_EQ(range.quant_max, expected.quant_max);
        EXPECT_EQ(mixbit::extra_step(0.3f, extra), std::ldexp(0.3f, -extra));
        for (float x = -3.0f; x <= 3.0f; x += 0.0371f) {
          for (const auto rounding : {Rounding::kHalfEven, Rounding::kHalfUp}) {
            EXPECT_EQ(mixbit::extra_level_code(x, 0.3f, base, extra, rounding),
                      mixbit::quantize(x, std::ldexp(0.3f, -extra), 0.0f, expected, rounding));
          }
        }
      }
    }
  }
}

TEST(ExtraLevels, KeepEveryLevelAndAddTheThresholds) {
  const mixbit::QuantRange base = mixbit::quant_range(2, true, false);
  for (int code = -2; code <= 1; ++code) {
    const float level = static_cast<float>(code) * 0.5f;
    EXPECT_EQ(mixbit::extra_level_code(level, 0.5f, base, 1, Rounding::kHalfUp), static_cast<float>(2 * code));
    EXPECT_EQ(mixbit::extra_level_code(level + 0.25f, 0.5f, base, 1, Rounding::kHalfUp),
              static_cast<float>(2 * code + 1));
  }
  EXPECT_TRUE(std::isnan(mixbit::extra_level_code(NAN, 0.5f, base, 1, Rounding::kHalfUp)));
  EXPECT_EQ(mixbit::extra_level_code(-INFINITY, 0.5f, base, 2, Rounding::kHalfUp), -8.0f);
  EXPECT_EQ(mixbit::extra_level_code(INFINITY, 0.5f, base, 2, Rounding::kHalfUp), 7.0f);
}

// A finer grid never moves a weight away from its value: it holds the levels of the coarser one.
TEST(ExtraLevels, Nest) {
  for (const bool narrow : {false, true}) {
    for (const int bits : {2, 3, 8}) {
      const mixbit::QuantRange base = mixbit::quant_range(bits, true, narrow);
      for (int i = -3000; i <= 3000; ++i) {
        const float x = static_cast<float>(i) * 0.0371f;
        float before = std::abs(x - mixbit::fake_quantize(x, 0.37f, 0.0f, base, Rounding::kHalfUp));
        for (int extra = 0; extra <= mixbit::kMaxExtraBits; ++extra) {
          const float y = mixbit::extra_level_fake_quantize(x, 0.37f, base, extra, Rounding::kHalfUp);
          EXPECT_LE(std::abs(x - y), before) << x << " " << extra;
          before = std::abs(x - y);
        }
      }
    }
  }
}

TEST(ExtraLevels, HaveTheGradientOfTheirOwnStep) {
  const mixbit::QuantRange base = mixbit::quant_range(3, true, false);
  // v = 1.2, q = 1
  const auto inside = mixbit::extra_level_fake_quantize_grad(2.0f, 0.3f, 0.5f, base, 1, Rounding::kHalfUp);
  EXPECT_EQ(inside.dx, 2.0f);
  EXPECT_FLOAT_EQ(inside.dscale, 2.0f * (1.0f - 1.2f) / 2.0f);
  const auto outside = mixbit::extra_level_fake_quantize_grad(2.0f, 9.0f, 0.5f, base, 2, Rounding::kHalfUp);
  EXPECT_EQ(outside.dx, 0.0f);
  EXPECT_EQ(outside.dscale, 2.0f * 15.0f / 4.0f);
  EXPECT_TRUE(mixbit::is_valid_extra(14, 2));
  EXPECT_FALSE(mixbit::is_valid_extra(15, 2));
  EXPECT_FALSE(mixbit::is_valid_extra(2, 3));
}

}  // namespace
