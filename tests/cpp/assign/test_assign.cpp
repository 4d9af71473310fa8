#include <mixbit/assign/assign.h>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

namespace {

using namespace mixbit::assign;

// The toy of the specification: NSR_l(b) = c_l 4^-b, one width for both operands, b = 2 ... 8.
Problem toy() {
  Problem p{4, 7, 1, {}, std::vector<uint8_t>(28, 1), {0, 1, 2, 3}};
  for (const double c : {1.0, 4.0, 0.25, 16.0}) {
    for (int b = 2; b <= 8; ++b) p.nsr.push_back(c * std::pow(4.0, -b));
  }
  return p;
}

Cost linear(const std::vector<double>& per_bit) {
  Cost cost;
  for (const double v : per_bit) {
    for (int b = 2; b <= 8; ++b) cost.values.push_back(v * b);
  }
  return cost;
}

TEST(Greedy, ReproducesTheToyInItsOrder) {
  const auto result = greedy_target(toy(), linear({1000, 200, 50, 10}), std::pow(10.0, -2.0));
  EXPECT_TRUE(result.feasible);
  EXPECT_EQ(result.choice.act, (std::vector<int64_t>{2, 3, 2, 5}));  // 4, 5, 4, 7 bits
  std::string order;
  for (const Step& step : result.steps) order += static_cast<char>('A' + step.layer);
  EXPECT_EQ(order, "AACABCABCBCD");
}

TEST(Threshold, ReproducesTheToy) {
  const Problem p = toy();
  std::vector<double> gamma;
  for (const double v : p.nsr) gamma.push_back(-10.0 * std::log10(v));
  EXPECT_EQ(threshold(gamma, 7, {1, 1, 1, 1}, p.groups, 20.0), (std::vector<int64_t>{3, 4, 2, 5}));
  EXPECT_EQ(threshold(gamma, 7, {1000, 200, 50, 10}, p.groups, 20.0), (std::vector<int64_t>{2, 4, 3, 6}));
  EXPECT_EQ(threshold(gamma, 7, {10, 100, 1000, 20}, p.groups, 20.0), (std::vector<int64_t>{5, 5, 1, 6}));
}

TEST(Greedy, StaysWithinBudgetsAndNearTheOptimum) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0.1, 2.0);
    Problem p{3, 3, 3, {}, std::vector<uint8_t>(27, 1), {0, 1, 1}};
    Cost cost;
    for (int l = 0; l < 3; ++l) {
      const double c = uniform(random), d = uniform(random), m = uniform(random);
      for (int a = 2; a < 5; ++a) {
        for (int w = 2; w < 5; ++w) {
          p.nsr.push_back(c * std::pow(4.0, -a) + d * std::pow(4.0, -w));
          cost.values.push_back(m * a * w);
        }
      }
    }
    Choice choice{{0, 0, 0}, {0, 0, 0}};
    double best = std::numeric_limits<double>::infinity();
    cost.budget = 0.6 * total_cost(p, cost, widest(p));
    for (int code = 0; code < 243; ++code) {  // two group acts, three weights
      const int64_t a0 = code % 3, a1 = code / 3 % 3;
      choice.act = {a0, a1, a1};
      choice.weight = {code / 9 % 3, code / 27 % 3, code / 81 % 3};
      if (total_cost(p, cost, choice) <= cost.budget) best = std::min(best, total_nsr(p, choice));
    }
    const auto result = greedy_budget(p, {cost});
    EXPECT_TRUE(result.feasible);
    EXPECT_LE(total_cost(p, cost, result.choice), cost.budget * (1 + 1e-12));
    EXPECT_EQ(result.choice.act[1], result.choice.act[2]);
    EXPECT_LE(total_nsr(p, result.choice), 2.0 * best);
  }
}

TEST(Greedy, AnImpossibleTargetLeavesTheWidest) {
  const auto result = greedy_target(toy(), linear({1, 1, 1, 1}), 1e-12);
  EXPECT_FALSE(result.feasible);
  EXPECT_EQ(result.choice.act, (std::vector<int64_t>{6, 6, 6, 6}));
}

TEST(Greedy, InfiniteNoiseIsLeftAlone) {
  Problem p = toy();
  for (size_t l = 0; l < 4; ++l) p.nsr[l * 7] = std::numeric_limits<double>::infinity();
  const auto result = greedy_target(p, linear({1, 1, 1, 1}), 100.0);
  EXPECT_TRUE(result.feasible);
  EXPECT_EQ(result.choice.act, (std::vector<int64_t>{1, 1, 1, 1}));
}

TEST(AimetOrder, IsBySqnrThenWidthThenLayer) {
  std::vector<int64_t> widths;
  const auto order = aimet_order({10, 20, 30, 10, 25, 30}, 3, &widths);
  ASSERT_EQ(order.size(), 4u);
  EXPECT_EQ(order[0].layer, 1);  // 25 dB
  EXPECT_EQ(order[1].layer, 0);  // 20 dB
  EXPECT_EQ(widths, (std::vector<int64_t>{1, 1, 0, 0}));
}

TEST(Problem, SizesThatDoNotFitAreRefused) {
  Problem p = toy();
  p.nsr.pop_back();
  EXPECT_THROW(widest(p), std::invalid_argument);
  p = toy();
  p.allowed.assign(28, 0);
  EXPECT_THROW(widest(p), std::invalid_argument);
  EXPECT_THROW(threshold({1, 2}, 2, {0.0}, {0}, 20.0), std::invalid_argument);
}

}  // namespace
