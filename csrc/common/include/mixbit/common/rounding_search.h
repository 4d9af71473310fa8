#pragma once

// Which of its two neighbours on the grid each weight of a row becomes, so that the row's output changes least: the
// objective of AdaRound (Nagel et al., arXiv 2004.10568, eq. 13), a quadratic form of the rounding errors with the
// second moments of the inputs. Descended coordinate by coordinate, as in the greedy updates of QuIP (Chee et al.,
// arXiv 2307.13304, section 4.2): each move lowers the objective, so the result is never worse than rounding to
// nearest.

#include <cmath>
#include <cstdint>

#include <mixbit/common/numerics.h>

namespace mixbit {

// The larger and the smaller neighbour of v on a grid, clamped: equal where v is a level or outside the grid.
struct Neighbours {
  float below;
  float above;
};
MIXBIT_HD Neighbours grid_neighbours(float v, QuantRange range) {
  return {clamp_code(std::floor(v), range), clamp_code(std::ceil(v), range)};
}

// One row of n weights. moments: [n, n] symmetric; damping is added to its diagonal. codes: out, integers. slope: [n]
// scratch. At most `sweeps` passes over the row; ends early where a pass moves nothing.
inline void search_rounding(int64_t n, const float* weight, const float* moments, float scale, QuantRange range,
                            double damping, int64_t sweeps, float* codes, double* slope) {
  const double step = static_cast<double>(scale);
  for (int64_t i = 0; i < n; ++i) {
    slope[i] = 0.0;
  }
  const auto add_error = [&](int64_t i, double error) {
    const float* row = moments + i * n;
    for (int64_t j = 0; j < n; ++j) {
      slope[j] += error * static_cast<double>(row[j]);
    }
    slope[i] += error * damping;
  };
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = quantize(weight[i], scale, 0.0f, range, Rounding::kHalfEven);
    const double error = static_cast<double>(codes[i]) * step - static_cast<double>(weight[i]);
    if (error != 0.0) {
      add_error(i, error);
    }
  }
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    bool moved = false;
    for (int64_t i = 0; i < n; ++i) {
      const Neighbours neighbours = grid_neighbours(weight[i] / scale, range);
      const float other = codes[i] == neighbours.below ? neighbours.above : neighbours.below;
      const double change = (static_cast<double>(other) - static_cast<double>(codes[i])) * step;
      const double curvature = static_cast<double>(moments[i * n + i]) + damping;
      // (e + change)' H (e + change) - e' H e = change (2 slope_i + change H_ii).
      if (change * (2.0 * slope[i] + change * curvature) < 0.0) {
        add_error(i, change);
        codes[i] = other;
        moved = true;
      }
    }
    if (!moved) {
      return;
    }
  }
}

}  // namespace mixbit
