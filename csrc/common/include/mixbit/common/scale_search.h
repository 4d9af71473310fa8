#pragma once

// The scale of least squared error among k * largest / quant_max, k in {0.20, 0.21, ..., 1.00}, from cumulative sums of
// the data: the error of a candidate needs one look-up per level of the grid instead of one read of the data.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <mixbit/common/numerics.h>

namespace mixbit {

constexpr int kScaleCandidates = 81;

// Candidate i (0 ... 80) as a share of the largest value: 0.20 ... 1.00.
MIXBIT_HD double scale_candidate(int i) { return static_cast<double>(20 + i) / 100.0; }

// Count and sum of all elements below a threshold.
struct Below {
  double count;
  double sum;
};

// Cumulative sums of n sorted values: sums[i] is the sum of the first i; sum_squares that of all squares.
struct SortedView {
  const float* values;
  const double* sums;  // [n + 1]
  int64_t n;
  double squares;

  MIXBIT_HD Below below(double threshold) const {
    int64_t low = 0;
    int64_t high = n;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (static_cast<double>(values[middle]) < threshold) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return {static_cast<double>(low), sums[low]};
  }
  MIXBIT_HD Below total() const { return {static_cast<double>(n), sums[n]}; }
  MIXBIT_HD double sum_squares() const { return squares; }
};

// Cumulative sums of a histogram with moments over [-range, range): inside a bin the elements are taken as uniform,
// shifted so that the whole bin keeps its own sum.
struct HistogramView {
  const double* counts;    // [bins]
  const double* bin_sums;  // [bins]
  const Below* starts;     // [bins + 1]: all bins before one
  int64_t bins;
  double range;
  double squares;

  MIXBIT_HD Below below(double threshold) const {
    const double width = 2.0 * range / static_cast<double>(bins);
    const double position = (threshold + range) / width;
    if (!(position > 0.0)) {
      return {0.0, 0.0};
    }
    if (position >= static_cast<double>(bins)) {
      return total();
    }
    const auto bin = static_cast<int64_t>(position);
    const double share = position - static_cast<double>(bin);
    const double low = -range + width * static_cast<double>(bin);
    const double count = share * counts[bin];
    const double shift = bin_sums[bin] - counts[bin] * (low + 0.5 * width);
    return {starts[bin].count + count, starts[bin].sum + count * (low + 0.5 * share * width) + share * shift};
  }
  MIXBIT_HD Below total() const { return starts[bins]; }
  MIXBIT_HD double sum_squares() const { return squares; }
};

// The bin of a value in a histogram over [-range, range).
MIXBIT_HD int64_t histogram_bin(double value, double range, int64_t bins) {
  const auto bin = static_cast<int64_t>((value + range) * (static_cast<double>(bins) / (2.0 * range)));
  return bin < bins - 1 ? bin : bins - 1;
}

// The range of a histogram: the smallest power of two above |x| for every finite x up to `largest`; 1 for all zeros.
MIXBIT_HD double histogram_range(double largest) {
  if (!(largest > 0.0)) {
    return 1.0;
  }
  int exponent = 0;
  frexp(largest, &exponent);  // largest = m * 2^exponent, 1/2 <= m < 1
  return ldexp(1.0, exponent);
}

// Exact cumulative sums of values in memory of its own.
class SortedCumulative {
 public:
  // `values` is sorted in place.
  explicit SortedCumulative(std::vector<float>& values) : values_(values), sums_(values.size() + 1, 0.0) {
    std::sort(values.begin(), values.end());
    for (size_t i = 0; i < values.size(); ++i) {
      sums_[i + 1] = sums_[i] + static_cast<double>(values[i]);
      sum_squares_ += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
  }

  SortedView view() const { return {values_.data(), sums_.data(), static_cast<int64_t>(values_.size()), sum_squares_}; }

 private:
  const std::vector<float>& values_;
  std::vector<double> sums_;
  double sum_squares_ = 0.0;
};

class HistogramCumulative {
 public:
  // counts, sums, squares: [bins] each; counts and sums must outlive this.
  HistogramCumulative(const double* counts, const double* sums, const double* squares, int64_t bins, double range)
      : counts_(counts), bin_sums_(sums), starts_(static_cast<size_t>(bins) + 1, {0.0, 0.0}), range_(range) {
    for (int64_t i = 0; i < bins; ++i) {
      const Below& last = starts_[static_cast<size_t>(i)];
      starts_[static_cast<size_t>(i) + 1] = {last.count + counts[i], last.sum + sums[i]};
      sum_squares_ += squares[i];
    }
  }

  HistogramView view() const {
    return {counts_, bin_sums_, starts_.data(), static_cast<int64_t>(starts_.size()) - 1, range_, sum_squares_};
  }

 private:
  const double* counts_;
  const double* bin_sums_;
  std::vector<Below> starts_;
  double range_;
  double sum_squares_ = 0.0;
};

// What level q adds to the error: sum of (q s)^2 - 2 q s x over the elements between two thresholds.
MIXBIT_HD double level_error(int64_t q, double scale, Below low, Below high) {
  const double level = static_cast<double>(q) * scale;
  return level * (level * (high.count - low.count) - 2.0 * (high.sum - low.sum));
}

// The elements below the upper threshold of level q.
template <typename View>
MIXBIT_HD Below below_level(const View& data, int64_t q, int64_t last_level, double scale) {
  return q == last_level ? data.total() : data.below((static_cast<double>(q) + 0.5) * scale);
}

// sum (x - x^)^2 for x^ = scale * clamp(round(x / scale)); levels that hold no element cost a look-up and add nothing.
//   sum over levels of (sum x^2 - 2 q s sum x + q^2 s^2 n)
template <typename View>
double squared_error(const View& data, double scale, QuantRange range) {
  double error = data.sum_squares();
  Below last{0.0, 0.0};
  const auto first_level = static_cast<int64_t>(range.quant_min);
  const auto last_level = static_cast<int64_t>(range.quant_max);
  for (int64_t q = first_level; q <= last_level; ++q) {
    const Below next = below_level(data, q, last_level, scale);
    error += level_error(q, scale, last, next);
    last = next;
  }
  return error;
}

// The candidate of least error; of equal ones the largest. `largest` is max |x| for signed grids, max x for unsigned
// ones; where it is not positive every value rounds to zero at any scale and 1 is returned.
template <typename View>
float best_scale(const View& data, double largest, QuantRange range) {
  if (!(largest > 0.0) || !(range.quant_max > 0.0f)) {
    return 1.0f;
  }
  double best_error = std::numeric_limits<double>::infinity();
  double best = largest / static_cast<double>(range.quant_max);
  for (int i = kScaleCandidates - 1; i >= 0; --i) {
    const double scale = scale_candidate(i) * largest / static_cast<double>(range.quant_max);
    const double error = squared_error(data, scale, range);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  // A denormal maximum can underflow; the smallest positive float keeps the scale valid.
  return std::max(static_cast<float>(best), std::numeric_limits<float>::denorm_min());
}

}  // namespace mixbit
