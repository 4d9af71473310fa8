#include <mixbit/common/numerics.h>

#include <gtest/gtest.h>

#include <limits>

namespace {

using mixbit::Rounding;

TEST(QuantRange, HasTheEndsOfTheContract) {
  EXPECT_EQ(mixbit::quant_range(4, true, false).quant_min, -8.0f);
  EXPECT_EQ(mixbit::quant_range(4, true, false).quant_max, 7.0f);
  EXPECT_EQ(mixbit::quant_range(4, true, true).quant_min, -7.0f);
  EXPECT_EQ(mixbit::quant_range(4, false, false).quant_min, 0.0f);
  EXPECT_EQ(mixbit::quant_range(4, false, true).quant_max, 15.0f);
  EXPECT_EQ(mixbit::quant_range(16, false, false).quant_max, 65535.0f);
  EXPECT_EQ(mixbit::quant_range(1, true, false).quant_min, -1.0f);
  EXPECT_EQ(mixbit::quant_range(1, true, false).quant_max, 0.0f);
}

TEST(Quantize, RoundsTiesAsAsked) {
  const auto range = mixbit::quant_range(8, true, false);
  EXPECT_EQ(mixbit::quantize(2.5f, 1.0f, 0.0f, range, Rounding::kHalfEven), 2.0f);
  EXPECT_EQ(mixbit::quantize(3.5f, 1.0f, 0.0f, range, Rounding::kHalfEven), 4.0f);
  EXPECT_EQ(mixbit::quantize(2.5f, 1.0f, 0.0f, range, Rounding::kHalfUp), 3.0f);
  EXPECT_EQ(mixbit::quantize(-2.5f, 1.0f, 0.0f, range, Rounding::kHalfUp), -2.0f);
}

TEST(FakeQuantize, KeepsNanAndSaturatesInfinity) {
  const auto range = mixbit::quant_range(4, true, false);
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isnan(mixbit::fake_quantize(std::nanf(""), 0.5f, 0.0f, range, Rounding::kHalfEven)));
  EXPECT_EQ(mixbit::fake_quantize(inf, 0.5f, 0.0f, range, Rounding::kHalfEven), 3.5f);
  EXPECT_EQ(mixbit::fake_quantize(-inf, 0.5f, 0.0f, range, Rounding::kHalfEven), -4.0f);
}

}  // namespace
