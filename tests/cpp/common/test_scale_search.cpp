#include <mixbit/common/scale_search.h>

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace {

double direct_error(const std::vector<float>& values, double scale, mixbit::QuantRange range) {
  double error = 0.0;
  for (const float v : values) {
    const double q = std::clamp(std::nearbyint(static_cast<double>(v) / scale), static_cast<double>(range.quant_min),
                                static_cast<double>(range.quant_max));
    error += (v - q * scale) * (v - q * scale);
  }
  return error;
}

TEST(ScaleSearch, CumulativeErrorIsTheErrorOfEveryElement) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(997);
  for (float& v : values) v = normal(random);
  const std::vector<float> original = values;
  const mixbit::SortedCumulative cumulative(values);
  for (const int bits : {2, 3, 5, 8}) {
    for (const bool narrow : {true, false}) {
      const auto range = mixbit::quant_range(bits, true, narrow);
      for (const double scale : {0.011, 0.1, 0.7}) {
        EXPECT_NEAR(mixbit::squared_error(cumulative.view(), scale, range), direct_error(original, scale, range), 1e-9);
      }
    }
  }
}

TEST(ScaleSearch, FindsTheBestOfTheCandidates) {
  std::mt19937 random(2);
  std::exponential_distribution<float> exponential;
  std::vector<float> values(500);
  for (float& v : values) v = exponential(random);
  const std::vector<float> original = values;
  const mixbit::SortedCumulative cumulative(values);
  const auto largest = static_cast<double>(values.back());
  for (const int bits : {2, 4, 8}) {
    const auto range = mixbit::quant_range(bits, false, false);
    const float found = mixbit::best_scale(cumulative.view(), largest, range);
    for (int i = 0; i < mixbit::kScaleCandidates; ++i) {
      const double scale = mixbit::scale_candidate(i) * largest / static_cast<double>(range.quant_max);
      EXPECT_LE(direct_error(original, found, range), direct_error(original, scale, range) * (1.0 + 1e-6));
    }
  }
}

TEST(ScaleSearch, NothingToScaleGivesOne) {
  std::vector<float> zeros(10, 0.0f);
  const mixbit::SortedCumulative cumulative(zeros);
  EXPECT_EQ(mixbit::best_scale(cumulative.view(), 0.0, mixbit::quant_range(4, true, true)), 1.0f);
}

}  // namespace
