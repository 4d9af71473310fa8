#pragma once

// Costs and lower bounds of partly decided mappings, for all width classes at once.

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include <mixbit/hw/mapspace.h>
#include <mixbit/hw/search.h>

#include "width_classes.h"

namespace mixbit::hw {

inline constexpr int kMaxDims = 12;
inline constexpr int kMaxLevels = 12;

using LevelFactors = std::array<double, kMaxLevels>;

// A tensor as the search sees it: dimensions of bound 1 are dropped. A rank is regular where it is the index of one
// dimension itself: tiles along it then never overlap, and extents multiply.
struct TensorShape {
  struct RankShape {
    std::vector<Term> terms;
    bool regular = true;
  };
  std::vector<RankShape> ranks;
  std::array<int, kMaxDims> rank_of;  // -1: the dimension does not move the tensor
  std::array<double, kMaxDims> coefficient;
  bool regular = true;  // all ranks are

  bool relevant(int dim) const { return rank_of[dim] >= 0; }
};

// Order of a level's loops: `before` of them, then `free` in any order, then the rest.
struct SlotOrder {
  std::array<int8_t, kMaxDims> dims{};
  int before = 0, free = 0, count = 0;
  bool operator==(const SlotOrder&) const = default;
};

// Temporal factors of a dimension by level.
using Choices = std::vector<LevelFactors>;

// Where the loops over instances stand and which levels keep what: all that is decided before the temporal loops.
struct Unit {
  struct Site {
    int level;
    double children;    // distinct children down to the next level that keeps the tensor
    bool diagonal;      // they depend on the strides
    double compulsory;  // elements along regular ranks that an instance ever sees
    bool outermost;
  };
  const KeepChoice* keep;
  const SpatialChoice* spatial;
  double steps;                                                 // compute cycles
  std::array<double, kMaxLevels> instances;                     // that are paid for
  std::array<double, kMaxLevels> used;                          // that work
  std::array<std::array<double, kMaxLevels>, kMaxDims> spread;  // spatial factor by dimension and level
  std::array<std::array<Site, kMaxLevels>, kTensors> sites;
  std::array<int, kTensors> site_count;
  std::span<const Site> sites_of(Tensor t) const { return {sites[t].data(), static_cast<size_t>(site_count[t])}; }
  std::array<double, kMaxDims> rest;  // what temporal loops take up
  std::array<const Choices*, kMaxDims> choices;
  std::vector<int> forced, open;  // dimensions with one choice, and with more, in the order of decisions
  std::vector<double> below;      // [open + 1]: choices of the dimensions from there on
};

struct Cost {
  std::array<std::array<double, kMaxClasses>, kTensors> energy;    // pJ; +inf where a level cannot hold the tensor
  std::array<std::array<double, kMaxClasses>, kTensors> accesses;  // words at the outermost level
  double cycles = 0.0;                                             // of every class, where `cycles_by_class` is empty
  std::vector<double> cycles_by_class;
  std::vector<uint8_t> overflow;  // by combination; empty: what levels share fits for every class
};

// What a search knows before it starts.
class Engine {
 public:
  Engine(const Arch& arch, const Layer& layer, const WidthLists& widths, const SearchOptions& options);

  MapSpace space;
  WidthClasses classes;
  SearchOptions options;
  std::array<TensorShape, kTensors> shapes;
  std::vector<SlotOrder> orders;   // [levels]
  std::vector<CeilDivide> blocks;  // [levels]: words to accesses
  double macs = 0.0;
  std::vector<std::pair<size_t, size_t>> units;  // keep choice, spatial choice
  std::vector<SpatialChoice> spatials;

  int levels() const { return space.levels(); }
  int dims() const { return space.dims(); }
  Unit unit(size_t index) const;
  double mappings(const Unit& unit) const { return unit.below[0] * space.orders(); }
  double total_in_fanout() const;

 private:
  std::vector<std::map<int64_t, Choices>> choices_;   // [dims] by what is left
  std::vector<std::array<int64_t, kMaxDims>> rests_;  // [spatials][dims]: what is left
};

// The tiles that came closest to fitting, for the message where none does.
struct Miss {
  double share = 0.0;  // words needed over words there; 0: nothing missed
  int level = 0;
  std::array<double, kTensors> words{};

  void add(const Miss& other) {
    if (other.share > 0.0 && (share == 0.0 || other.share < share)) *this = other;
  }
};

// Decides one dimension after the other and prices what is decided.
class Nodes {
 public:
  explicit Nodes(const Engine& engine) : engine_(engine) {}

  void enter(const Unit& unit);
  void decide(int dim, const LevelFactors& factors);
  void undecide(int dim);
  bool decided(int dim) const { return decided_[dim]; }
  double factor(int dim, int level) const { return factors_[dim][level]; }

  // Whether the tiles fit at the narrowest widths; dimensions left open count as if they had no loops inside.
  bool fits();
  // A lower bound of every mapping below this node, and the cost itself where everything is decided and no order is
  // open. Call after fits().
  void price(Cost* cost);

  // Orders of the loops of a level, instead of the space's. Only where all dimensions are decided.
  void set_order(int level, const SlotOrder& order) { orders_[level] = order; }
  void reset_orders() { orders_ = engine_.orders; }
  const SlotOrder& order(int level) const { return orders_[level]; }
  // Orders of the free loops of a level that can differ in a count and are not dominated; one at least.
  std::vector<SlotOrder> orders_to_try(int level) const;
  bool open_order(int level) const;  // whether there are two loops or more to order

  Mapping mapping() const;
  const Miss& miss() const { return miss_; }

 private:
  // A temporal loop above 1.
  struct LoopAt {
    int dim;
    int level;
    int group;  // loops of one group may run in any order; -1: the order is given
    double factor;
  };

  void list_loops();
  double volume(int level, Tensor t) const;
  double requested_by(const Unit::Site& site, Tensor t) const;
  double regular_requests(const Unit::Site& site, Tensor t) const;
  double overlapping_requests(const Unit::Site& site, Tensor t) const;
  double walk(const Unit::Site& site, Tensor t, int first) const;
  double children(Tensor t, int from, int to) const;
  bool all_decided() const;
  void price_tensor(Tensor t, Cost* cost);
  void price_sharing(Cost* cost);
  void price_cycles(Cost* cost);

  const Engine& engine_;
  const Unit* unit_ = nullptr;
  std::vector<SlotOrder> orders_;
  std::array<bool, kMaxDims> decided_{};
  std::array<LevelFactors, kMaxDims> factors_;     // temporal
  std::array<LevelFactors, kMaxDims> cumulative_;  // all factors at levels up to this one
  std::array<LevelFactors, kMaxDims> stride_;      // factors inside the temporal loop of this level
  std::array<std::array<double, kTensors>, kMaxLevels> volume_;
  std::array<LoopAt, kMaxDims * kMaxLevels> loops_;  // inner to outer, without those of the innermost level
  int loop_count_ = 0;
  bool any_open_ = false;
  std::array<int, kMaxLevels + 1> first_loop_;  // at this level or further out
  Miss miss_;
  // Words by level, tensor and class, of levels with a bandwidth.
  std::array<std::array<std::array<double, kMaxClasses>, kTensors>, kMaxLevels> read_words_, written_words_;
};

}  // namespace mixbit::hw
