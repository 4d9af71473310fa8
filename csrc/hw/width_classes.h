#pragma once

// Widths that fill words alike cost alike: only floor(word / bits) at each level counts.

#include <array>
#include <cstdint>
#include <vector>

#include <mixbit/hw/model.h>
#include <mixbit/hw/search.h>

namespace mixbit::hw {

inline constexpr int kMaxClasses = 32;

// ceil(n / d) of whole doubles without a division: n / d is at least 1 / d away from the next integer or on it, so
// adding half of less than that before rounding gives the ceiling, exactly while n < 2^50.
struct CeilDivide {
  double inverse = 1.0;
  double shift = 0.0;

  CeilDivide() = default;
  explicit CeilDivide(int64_t d) : inverse(1.0 / static_cast<double>(d)), shift(0.5 - 0.5 * inverse) {}
  double operator()(double n) const {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to integers
    return ((n * inverse + shift) + kRound) - kRound;
  }
};

// The classes of one tensor, narrowest first.
struct TensorClasses {
  int count = 0;
  std::vector<int> bits;                       // [count]: a width of the class
  std::vector<std::vector<CeilDivide>> words;  // [levels][count]: elements to words
  std::vector<int> class_of;                   // [widths asked for]
  int widest() const { return count - 1; }
};

struct WidthClasses {
  std::array<TensorClasses, kTensors> tensors;
  std::vector<double> mac_pj;  // [weights * inputs classes]
  int partial_bits = 0;

  WidthClasses(const Arch& arch, const WidthLists& widths, const ModelOptions& options);

  int combinations() const { return tensors[0].count * tensors[1].count * tensors[2].count; }
  int index(int weights, int inputs, int outputs) const {
    return (weights * tensors[kInputs].count + inputs) * tensors[kOutputs].count + outputs;
  }
  Widths widths(int weights, int inputs, int outputs) const;
};

}  // namespace mixbit::hw
