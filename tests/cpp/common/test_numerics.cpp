#include <mixbit/common/numerics.h>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace {

using mixbit::FakeQuantizeGrad;
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

bool equals(const FakeQuantizeGrad& g, float dx, float dscale, float dzero_point) {
  return g.dx == dx && g.dscale == dscale && g.dzero_point == dzero_point;
}

// With PACT's clip = 15 steps of 0.4 the gradient of the clip is that of the scale / 15: 1 for values of 6 and more.
TEST(ClipGrad, IsThatOfTheClippedAlone) {
  const auto range = mixbit::quant_range(4, false, false);
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, -0.1f, 0.4f, 0.0f, range), 0.0f, 0.0f, -2.0f * 0.4f));
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, 0.0f, 0.4f, 0.0f, range), 2.0f, 0.0f, 0.0f));
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, 0.5f, 0.4f, 0.0f, range), 2.0f, 0.0f, 0.0f));
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, 5.9f, 0.4f, 0.0f, range), 2.0f, 0.0f, 0.0f));
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, 6.0f, 0.4f, 0.0f, range), 0.0f, 30.0f, -2.0f * 0.4f));
  EXPECT_TRUE(equals(mixbit::clip_grad(2.0f, 7.0f, 0.4f, 0.0f, range), 0.0f, 30.0f, -2.0f * 0.4f));
}

TEST(ClipGrad, CountsEndsFromTheZeroPoint) {
  const auto range = mixbit::quant_range(3, true, false);
  EXPECT_TRUE(equals(mixbit::clip_grad(1.0f, -2.5f, 0.5f, 1.0f, range), 1.0f, 0.0f, 0.0f));
  EXPECT_TRUE(equals(mixbit::clip_grad(1.0f, -2.6f, 0.5f, 1.0f, range), 0.0f, -5.0f, -0.5f));
  EXPECT_TRUE(equals(mixbit::clip_grad(1.0f, 0.9f, 0.5f, 1.0f, range), 1.0f, 0.0f, 0.0f));
  EXPECT_TRUE(equals(mixbit::clip_grad(1.0f, 1.0f, 0.5f, 1.0f, range), 0.0f, 2.0f, -0.5f));
  const FakeQuantizeGrad nan = mixbit::clip_grad(1.0f, std::nanf(""), 0.5f, 1.0f, range);
  EXPECT_EQ(nan.dx, 0.0f);
  EXPECT_TRUE(std::isnan(nan.dscale));
}

// A level is the product of a code and the scale; divided by the scale it may come out below the code.
TEST(ClipGrad, TheHighestLevelIsAtTheEndForEveryScale) {
  int lost_by_division = 0;
  for (const int bits : {2, 4, 8}) {
    const auto range = mixbit::quant_range(bits, false, false);
    for (int i = 1; i <= 20000; ++i) {
      const float scale = 1.0f / static_cast<float>(i);
      const float highest = mixbit::fake_quantize(1e9f, scale, 0.0f, range, Rounding::kHalfEven);
      ASSERT_FALSE(mixbit::is_unclipped(highest, scale, 0.0f, range)) << scale;
      ASSERT_TRUE(mixbit::is_unclipped(std::nextafter(highest, 0.0f), scale, 0.0f, range)) << scale;
      lost_by_division += highest / scale < range.quant_max ? 1 : 0;
    }
  }
  EXPECT_GT(lost_by_division, 0);
}

}  // namespace
