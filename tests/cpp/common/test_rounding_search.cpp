// The search for the rounding of a row: a case done by hand, ends of the grid, and that no move is left.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include <mixbit/common/rounding_search.h>

namespace mixbit {
namespace {

std::vector<float> search(const std::vector<float>& weight, const std::vector<float>& moments, float scale,
                          QuantRange range, double damping = 0.0, int64_t sweeps = 20) {
  const auto n = static_cast<int64_t>(weight.size());
  std::vector<float> codes(weight.size());
  std::vector<double> slope(weight.size());
  search_rounding(n, weight.data(), moments.data(), scale, range, damping, sweeps, codes.data(), slope.data());
  return codes;
}

TEST(SearchRounding, EqualInputsKeepTheirSum) {
  // Both inputs are the same: rounding both 0.4 down loses 0.8 of the sum, one up and one down 0.2.
  const std::vector<float> ones{1, 1, 1, 1};
  EXPECT_EQ(search({0.4f, 0.4f}, ones, 1.0f, {-7, 7}), (std::vector<float>{1, 0}));
  // Opposite inputs: the errors cancel as they are.
  EXPECT_EQ(search({0.4f, 0.4f}, {1, -1, -1, 1}, 1.0f, {-7, 7}), (std::vector<float>{0, 0}));
  EXPECT_EQ(search({0.4f, 0.4f}, ones, 1.0f, {-7, 7}, 100.0), (std::vector<float>{0, 0}));
  EXPECT_EQ(search({0.4f, 0.4f}, ones, 1.0f, {-7, 7}, 0.0, 0), (std::vector<float>{0, 0}));
}

TEST(SearchRounding, StaysOnTheGrid) {
  const std::vector<float> ones(9, 1.0f);
  const auto codes = search({9.4f, -9.4f, 6.6f}, ones, 1.0f, {-7, 7});
  EXPECT_EQ(codes, (std::vector<float>{7, -7, 7}));
  EXPECT_EQ(grid_neighbours(6.5f, {-7, 7}).above, 7.0f);
  EXPECT_EQ(grid_neighbours(7.5f, {-7, 7}).below, 7.0f);
  EXPECT_EQ(grid_neighbours(3.0f, {-7, 7}).below, grid_neighbours(3.0f, {-7, 7}).above);
}

TEST(SearchRounding, LeavesNoMoveThatHelps) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  constexpr int64_t n = 12;
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<float> root(n * n);
    for (auto& v : root) v = normal(generator);
    std::vector<float> moments(n * n, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t k = 0; k < n; ++k) moments[i * n + j] += root[i * n + k] * root[j * n + k];
      }
    }
    std::vector<float> weight(n);
    for (auto& v : weight) v = normal(generator);
    const auto error = [&](const std::vector<float>& codes) {
      double total = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          total +=
              (codes[i] * 0.5 - weight[i]) * static_cast<double>(moments[i * n + j]) * (codes[j] * 0.5 - weight[j]);
        }
      }
      return total;
    };
    const QuantRange range{-3, 3};
    const auto found = search(weight, moments, 0.5f, range);
    EXPECT_LE(error(found), error(search(weight, moments, 0.5f, range, 0.0, 0)) + 1e-9);
    for (int64_t i = 0; i < n; ++i) {
      const auto [below, above] = grid_neighbours(weight[i] / 0.5f, range);
      auto moved = found;
      moved[i] = found[i] == below ? above : below;
      EXPECT_GE(error(moved), error(found) - 1e-6);
    }
  }
}

}  // namespace
}  // namespace mixbit
