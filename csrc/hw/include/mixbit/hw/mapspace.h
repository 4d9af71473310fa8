#pragma once

// All mappings of a layer that an architecture's constraints allow: which factor of each dimension stands where, in
// which order the loops of a level run, which levels keep a tensor.

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <mixbit/hw/arch.h>
#include <mixbit/hw/mapping.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/workload.h>

namespace mixbit::hw {

// One place for a factor of one dimension.
struct FactorRule {
  int64_t fixed = 0;  // 0: free
  int64_t max = 0;    // 0: no limit
  bool admits(int64_t factor) const { return (fixed == 0 || factor == fixed) && (max == 0 || factor <= max); }
};

// The ordered factorizations of a number over a row of places.
class Factorizations {
 public:
  explicit Factorizations(std::vector<FactorRule> rules) : rules_(std::move(rules)) {}

  double count(int64_t n, size_t place = 0);
  // All of them, the last place running fastest.
  std::vector<std::vector<int64_t>> all(int64_t n) const;
  // The one that the number 0 <= u < 1 picks, each equally likely.
  std::vector<int64_t> pick(int64_t n, double u);

 private:
  std::vector<FactorRule> rules_;
  std::map<std::pair<size_t, int64_t>, double> counts_;
};

// Loops of a level from inner to outer: `before`, then those of `free` in any order, then `after`.
struct LoopOrder {
  std::vector<int> before, free, after;
};

// Factors of the loops over instances, by level and dimension.
struct SpatialChoice {
  std::vector<std::vector<int64_t>> x, y;
};

using KeepChoice = std::vector<std::array<bool, kTensors>>;

class MapSpace {
 public:
  // Checks both. Throws std::invalid_argument where a dimension has no factorization or a tensor no level to stay at.
  MapSpace(const Arch& arch, const Layer& layer);

  const Arch& arch() const { return arch_; }
  const Layer& layer() const { return layer_; }
  int levels() const { return static_cast<int>(arch_.levels.size()); }
  int dims() const { return static_cast<int>(layer_.dims.size()); }

  // Fixed factors that do not divide their bounds: they are free, and named here as "level.place.dimension=factor".
  const std::vector<std::string>& relaxed() const { return relaxed_; }
  const LoopOrder& order(int level) const { return orders_[level]; }
  const std::vector<KeepChoice>& keeps() const { return keeps_; }
  // Orders of the loops of all levels, loops over 1 included. The innermost level has one: its order changes nothing.
  double orders() const { return order_count_; }
  // Mappings, those beyond the fan-outs included.
  double total() const;

  // All spatial choices within the fan-outs. Throws, naming level and axis, where there are none.
  std::vector<SpatialChoice> spatial_choices() const;

  // Factors of a dimension over all places: X of each level, then Y, then temporal.
  Factorizations& factorizations(int dim) { return factorizations_[dim]; }
  // Temporal factors by level of what the spatial factors leave of a dimension.
  std::vector<std::vector<int64_t>> temporal_choices(int dim, int64_t rest) const;

 private:
  FactorRule rule(int level, LoopKind kind, int dim);
  void read_order(int level);
  void read_keeps();

  Arch arch_;
  Layer layer_;
  std::vector<std::array<std::vector<FactorRule>, kLoopKinds>> rules_;  // [levels][kinds][dims]
  std::vector<LoopOrder> orders_;
  std::vector<KeepChoice> keeps_;
  std::vector<Factorizations> factorizations_;  // [dims]
  std::vector<std::string> relaxed_;
  double order_count_ = 1.0;
};

}  // namespace mixbit::hw
