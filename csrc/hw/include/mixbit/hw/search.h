#pragma once

// The best mappings of a layer. Optima are proven: a mapping is passed over only where a bound shows that it cannot be
// better, or where another one is at least as good in every count (docs/mapper.md gives the proofs).

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <mixbit/hw/arch.h>
#include <mixbit/hw/mapping.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/workload.h>

namespace mixbit::hw {

// Ties go to the lower energy, then to the fewer cycles.
enum class Objective { kEnergy, kDelay, kEdp, kLastLevelAccesses };

enum class Method {
  kBounded,     // the optimum, with bounds and dominance
  kExhaustive,  // every mapping that fits, one order of loops for all orders with the same counts
};

struct SearchOptions {
  Objective objective = Objective::kEdp;
  Method method = Method::kBounded;
  int threads = 1;  // the result does not depend on it
  ModelOptions model = {};
};

// What became of each mapping of the space, in mappings; doubles hold spaces beyond 2^63. The parts sum to `total`.
struct Certificate {
  double total = 0.0;
  double fanout_invalid = 0.0;
  double capacity_invalid = 0.0;  // too large for a level at the narrowest widths asked for
  double bound_pruned = 0.0;
  double dominance_pruned = 0.0;  // orders of loops that another order is as good as
  double evaluated = 0.0;
  int64_t nodes = 0;              // bounds and mappings that were computed
  double least_open_bound = 0.0;  // least bound of what bound_pruned counts, in the objective; +inf: nothing pruned
};

struct MappingCounts {
  double total = 0.0;
  double fanout_invalid = 0.0;
  double capacity_invalid = 0.0;
  double valid = 0.0;
};

struct Found {
  Mapping mapping;
  Evaluation evaluation;
};

struct SearchResult {
  Found best;
  Certificate certificate;
  std::vector<std::string> relaxed;  // see MapSpace::relaxed
};

// Widths of each tensor to combine with all of the others.
struct WidthLists {
  std::array<std::vector<int>, kTensors> bits;
  int partial_bits = 0;
};

struct SweepResult {
  // [outputs of WidthLists order Inputs, Weights, Outputs]: index into `found`, -1 where nothing fits.
  std::vector<int64_t> index;
  std::vector<Found> found;  // one for each class of widths
  int64_t classes = 0;       // triples that differ in what fits a word
  Certificate certificate;
  std::vector<std::string> relaxed;
};

struct ParetoResult {
  std::vector<Found> points;  // ascending in the first objective
  Certificate certificate;
  std::vector<std::string> relaxed;
};

struct RandomOptions {
  uint64_t seed = 0;
  int64_t victory = 500;    // valid mappings in a row without a better one
  int64_t timeout = 15000;  // invalid mappings in a row
  int64_t orders = 16;      // orders tried for each choice of factors
};

struct RandomResult {
  Found best;
  MappingCounts counts;
  std::vector<std::string> relaxed;
};

MappingCounts count_mappings(const Arch& arch, const Layer& layer, const Widths& widths, int threads = 1);

// All throw std::invalid_argument where no mapping fits, naming the level, the tensors and the words they need.
SearchResult search(const Arch& arch, const Layer& layer, const Widths& widths, const SearchOptions& options = {});
SweepResult sweep(const Arch& arch, const Layer& layer, const WidthLists& widths, const SearchOptions& options = {});
ParetoResult pareto(const Arch& arch, const Layer& layer, const Widths& widths,
                    const std::vector<Objective>& objectives, const SearchOptions& options = {});

// The baseline: factors drawn at random, the peer's stopping rule.
RandomResult random_search(const Arch& arch, const Layer& layer, const Widths& widths, const SearchOptions& options,
                           const RandomOptions& random);

}  // namespace mixbit::hw
