#pragma once

// The scale of least squared error among k * largest / quant_max, k in {0.20, 0.21, ..., 1.00}, from cumulative sums of
// the data: the error of a candidate needs one look-up per level of the grid instead of one read of the data.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <mixbit/common/numerics.h>

namespace mixbit {

constexpr int kScaleCandidates = 81;

// Candidate i (0 ... 80) as a share of the largest value: 0.20 ... 1.00.
inline double scale_candidate(int i) { return static_cast<double>(20 + i) / 100.0; }

// Count and sum of all elements below a threshold.
struct Below {
  double count;
  double sum;
};

// Exact cumulative sums of n sorted values.
class SortedCumulative {
 public:
  // `values` is sorted in place.
  explicit SortedCumulative(std::vector<float>& values) : values_(values), sums_(values.size() + 1, 0.0) {
    std::sort(values.begin(), values.end());
    double squares = 0.0;
    for (size_t i = 0; i < values.size(); ++i) {
      sums_[i + 1] = sums_[i] + static_cast<double>(values[i]);
      squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    sum_squares_ = squares;
  }

  Below below(double threshold) const {
    const auto at = std::lower_bound(values_.begin(), values_.end(), threshold,
                                     [](float v, double t) { return static_cast<double>(v) < t; });
    const auto index = static_cast<size_t>(at - values_.begin());
    return {static_cast<double>(index), sums_[index]};
  }

  Below total() const { return {static_cast<double>(values_.size()), sums_.back()}; }
  double sum_squares() const { return sum_squares_; }

 private:
  const std::vector<float>& values_;
  std::vector<double> sums_;
  double sum_squares_ = 0.0;
};

// Cumulative sums of a histogram with moments over [-range, range): inside a bin the elements are taken as uniform,
// shifted so that the whole bin keeps its own sum.
class HistogramCumulative {
 public:
  // counts, sums: [bins] each.
  HistogramCumulative(const double* counts, const double* sums, const double* squares, int64_t bins, double range)
      : counts_(counts), bin_sums_(sums), bins_(bins), range_(range), width_(2.0 * range / static_cast<double>(bins)) {
    cumulative_.assign(static_cast<size_t>(bins) + 1, {0.0, 0.0});
    for (int64_t i = 0; i < bins; ++i) {
      const Below& last = cumulative_[static_cast<size_t>(i)];
      cumulative_[static_cast<size_t>(i) + 1] = {last.count + counts[i], last.sum + sums[i]};
      sum_squares_ += squares[i];
    }
  }

  Below below(double threshold) const {
    const double position = (threshold + range_) / width_;
    if (!(position > 0.0)) {
      return {0.0, 0.0};
    }
    if (position >= static_cast<double>(bins_)) {
      return total();
    }
    const auto bin = static_cast<int64_t>(position);
    const double share = position - static_cast<double>(bin);
    const double low = -range_ + width_ * static_cast<double>(bin);
    const double count = share * counts_[bin];
    const double shift = bin_sums_[bin] - counts_[bin] * (low + 0.5 * width_);
    const Below& start = cumulative_[static_cast<size_t>(bin)];
    return {start.count + count, start.sum + count * (low + 0.5 * share * width_) + share * shift};
  }

  Below total() const { return cumulative_.back(); }
  double sum_squares() const { return sum_squares_; }

 private:
  const double* counts_;
  const double* bin_sums_;
  int64_t bins_;
  double range_;
  double width_;
  std::vector<Below> cumulative_;
  double sum_squares_ = 0.0;
};

// sum (x - x^)^2 for x^ = scale * clamp(round(x / scale)); levels that hold no element cost a look-up and add nothing.
//   sum over levels of (sum x^2 - 2 q s sum x + q^2 s^2 n)
template <typename Cumulative>
double squared_error(const Cumulative& data, double scale, QuantRange range) {
  double error = data.sum_squares();
  Below last{0.0, 0.0};
  const auto first_level = static_cast<int64_t>(range.quant_min);
  const auto last_level = static_cast<int64_t>(range.quant_max);
  for (int64_t q = first_level; q <= last_level; ++q) {
    const Below next = q == last_level ? data.total() : data.below((static_cast<double>(q) + 0.5) * scale);
    const double level = static_cast<double>(q) * scale;
    error += level * (level * (next.count - last.count) - 2.0 * (next.sum - last.sum));
    last = next;
  }
  return error;
}

// The candidate of least error; of equal ones the largest. `largest` is max |x| for signed grids, max x for unsigned
// ones; where it is not positive every value rounds to zero at any scale and 1 is returned.
template <typename Cumulative>
float best_scale(const Cumulative& data, double largest, QuantRange range) {
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
