// Nested grids and gates against golden values and the sums written out.
#include <mixbit/common/gates.h>

#include <gtest/gtest.h>

#include <vector>

namespace {

using namespace mixbit;

TEST(Gates, StepsOfNestedGrids) {
  EXPECT_EQ(gated_step(6.0f, 2, false), 2.0f);
  EXPECT_EQ(gated_step(6.0f, 4, false), 6.0f / 15.0f);
  EXPECT_EQ(gated_step(1.0f, 2, true), 0.5f);
  EXPECT_EQ(gated_step(1.0f, 8, true), 0.0078125f);
  EXPECT_EQ(grid_ratio(quant_range(4, false, false), quant_range(2, false, false)), 5.0f);
  EXPECT_EQ(grid_ratio(quant_range(8, false, false), quant_range(4, false, false)), 17.0f);
  EXPECT_EQ(grid_ratio(quant_range(8, true, false), quant_range(2, true, false)), 64.0f);
}

TEST(Gates, ResidualCodesAreTheDirectOnesBetweenTies) {
  for (const bool is_signed : {true, false}) {
    const QuantRange coarse = quant_range(2, is_signed, false);
    const QuantRange fine = quant_range(4, is_signed, false);
    const float coarse_step = gated_step(3.7f, 2, is_signed);
    const float fine_step = gated_step(3.7f, 4, is_signed);
    for (int i = -1000; i <= 1000; ++i) {
      const float x = 0.00513f * static_cast<float>(i);
      const float distance = x / fine_step - std::floor(x / fine_step) - 0.5f;
      if (std::abs(distance) < 1e-4f) continue;
      const float code = level_code(x, coarse_step, coarse);
      const float residual = residual_code(x, code, code * coarse_step, grid_ratio(fine, coarse), fine_step, fine);
      ASSERT_EQ(residual, level_code(x, fine_step, fine)) << x;
    }
  }
}

TEST(Gates, SharesAreTheNestedProducts) {
  const std::vector<float> gates = {0.5f, 0.25f};
  std::vector<float> shares(3);
  gate_shares(gates.data(), 1, 3, shares.data());
  EXPECT_EQ(shares, (std::vector<float>{0.5f, 0.375f, 0.125f}));
  // A closed gate closes everything above it.
  const std::vector<float> strided = {0.0f, 9.0f, 1.0f, 9.0f};
  gate_shares(strided.data(), 2, 3, shares.data());
  EXPECT_EQ(shares, (std::vector<float>{1.0f, 0.0f, 0.0f}));
}

TEST(Gates, GradientsAreTheDerivativesOfTheNestedSum) {
  const std::vector<double> sums = {1.5, -2.0, 3.0};
  const auto value = [&](const std::vector<float>& z) {
    double total = 0.0, open = 1.0;
    for (size_t j = 0; j < z.size(); ++j) {
      open *= static_cast<double>(z[j]);
      total += open * sums[j];
    }
    return total;
  };
  for (const std::vector<float>& z : {std::vector<float>{0.5f, 0.25f, 0.75f}, {0.0f, 1.0f, 0.5f}, {1.0f, 1.0f, 0.0f}}) {
    std::vector<float> gradients(3);
    gate_gradients(sums.data(), z.data(), 1, 4, gradients.data());
    for (size_t j = 0; j < z.size(); ++j) {
      std::vector<float> up = z;
      up[j] += 1.0f;  // the sum is linear in each gate
      EXPECT_NEAR(static_cast<double>(gradients[j]), value(up) - value(z), 1e-6);
    }
  }
}

TEST(Gates, StepGradientIsThatOfLearnedSteps) {
  const QuantRange range = quant_range(4, true, false);
  for (const float x : {0.3f, -1.7f, 3.5f, 3.6f, -4.0f, -5.0f, 100.0f}) {
    const float code = level_code(x, 0.5f, range);
    EXPECT_EQ(step_gradient(x, code, 0.5f, range),
              fake_quantize_grad(1.0f, x, 0.5f, 0.0f, range, Rounding::kHalfEven).dscale);
  }
}

}  // namespace
