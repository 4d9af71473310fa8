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

}  // namespace
