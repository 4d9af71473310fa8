// Drawn architectures, layers and mappings, sound ones and senseless ones, with numbers up to the limits of int64: each
// is refused with std::invalid_argument or priced with counts that make sense. Worth most under the sanitizers.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <mixbit/hw/mapspace.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/search.h>

namespace {

using namespace mixbit::hw;

constexpr std::array<int64_t, 16> kOdd = {0,
                                          -1,
                                          1,
                                          2,
                                          3,
                                          5,
                                          1000,
                                          int64_t{1} << 20,
                                          int64_t{1} << 24,
                                          int64_t{1} << 31,
                                          int64_t{1} << 40,
                                          int64_t{1} << 48,
                                          (int64_t{1} << 48) + 1,
                                          int64_t{1} << 62,
                                          std::numeric_limits<int64_t>::max(),
                                          std::numeric_limits<int64_t>::min()};
constexpr std::array<double, 8> kOddNumbers = {0.0,
                                               -1.0,
                                               1e-320,
                                               1e-6,
                                               1e15,
                                               1e308,
                                               std::numeric_limits<double>::infinity(),
                                               std::numeric_limits<double>::quiet_NaN()};

class Drawn {
 public:
  explicit Drawn(unsigned seed) : random_(seed) {}

  bool chance(int of) { return random_() % static_cast<unsigned>(of) == 0; }
  template <typename List>
  auto pick(const List& list) {
    return list[random_() % list.size()];
  }
  int64_t of(std::initializer_list<int64_t> list) { return list.begin()[random_() % list.size()]; }

  // A sound number, or rarely an odd one.
  int64_t whole(std::initializer_list<int64_t> list) { return chance(odd_) ? pick(kOdd) : of(list); }
  double number(std::initializer_list<int64_t> list) {
    return chance(odd_) ? pick(kOddNumbers) : static_cast<double>(of(list)) / 4.0;
  }

  Arch arch() {
    Arch result;
    result.mac_pj = number({1, 4, 9});
    result.mac_mesh_x = whole({1, 2, 4});
    result.mac_mesh_y = whole({1, 3});
    if (chance(4)) result.mac_scaling = MacScaling{number({4, 9}), number({1, 2}), number({64, 128})};
    const auto levels = static_cast<size_t>(of({1, 2, 3, 4}));
    for (size_t l = 0; l < levels; ++l) {
      Level level;
      level.name = std::string(1, static_cast<char>('a' + l));
      if (l + 1 < levels || chance(4)) level.size = whole({8, 64, 512, 4096});
      level.word_bits = whole({8, 16, 16, 64});
      level.block = whole({1, 1, 4});
      level.mesh_x = l == 0 ? result.mac_mesh_x : whole({1, 1, 2});
      level.mesh_y = l == 0 ? result.mac_mesh_y : whole({1, 1, 3});
      level.cluster = whole({1, 1, 1, 1, 1, 2});
      if (chance(3)) level.read_bw = number({1, 4, 16});
      if (chance(3)) level.write_bw = number({1, 4, 16});
      if (chance(6)) level.shared_bw = number({1, 4, 16});
      level.read_pj = number({1, 10, 100});
      level.write_pj = number({1, 10, 100});
      result.levels.push_back(level);
    }
    return result;
  }

  Layer layer() {
    if (chance(2)) {
      return conv({.c = whole({1, 2, 4}),
                   .m = whole({1, 2, 3}),
                   .r = whole({1, 2, 3}),
                   .s = whole({1, 1, 2}),
                   .n = whole({1, 1, 2}),
                   .p = whole({2, 4, 6}),
                   .q = whole({1, 2, 3}),
                   .g = whole({1, 1, 1, 2}),
                   .w_stride = whole({1, 1, 2, 3}),
                   .h_stride = whole({1, 2}),
                   .w_dilation = whole({1, 1, 2}),
                   .h_dilation = whole({1, 1, 2})});
    }
    if (chance(3)) return gemm(whole({1, 4, 6}), whole({1, 2, 8}), whole({2, 3, 12}));
    Layer result;
    const auto dims = static_cast<size_t>(of({1, 2, 3, 4}));
    for (size_t d = 0; d < dims; ++d) {
      result.dims.push_back(std::string(1, static_cast<char>('A' + d)));
      result.bounds.push_back(whole({1, 2, 4, 6}));
    }
    for (const Tensor t : kAllTensors) {
      const auto ranks = static_cast<size_t>(of({0, 1, 2, 3}));
      for (size_t r = 0; r < ranks; ++r) {
        result.tensors[t].emplace_back();
        for (int64_t terms = of({1, 1, 2}); terms > 0; --terms) {
          result.tensors[t].back().push_back({static_cast<int>(random_() % dims), whole({1, 1, 2, 3})});
        }
      }
    }
    return result;
  }

  // Factors that multiply to the bounds, but for odd ones, each at some place.
  Mapping mapping(const Arch& arch, const Layer& layer) {
    Mapping result(arch.levels.size());
    for (LevelMapping& level : result) {
      for (const Tensor t : kAllTensors) level.keep[t] = !chance(4);
    }
    if (!chance(8)) result.back().keep = {true, true, true};
    for (size_t d = 0; d < layer.dims.size(); ++d) {
      int64_t left = std::max<int64_t>(1, layer.bounds[d]);
      for (int i = 0; i < 8 && left > 1; ++i) {
        std::vector<int64_t> divisors;
        for (int64_t f = 2; f <= std::min<int64_t>(left, 64); ++f) {
          if (left % f == 0) divisors.push_back(f);
        }
        const int64_t factor = divisors.empty() || i == 7 ? left : pick(divisors);
        left /= factor;
        place(&result, {static_cast<int>(d), chance(4 * odd_) ? pick(kOdd) : factor});
      }
    }
    if (chance(2 * odd_)) place(&result, {static_cast<int>(of({-1, 0, 1, 9})), pick(kOdd)});
    if (chance(4 * odd_)) result.pop_back();
    return result;
  }

  Widths widths() {
    Widths result;
    for (int& bits : result.bits) bits = static_cast<int>(chance(odd_) ? of({-1, 17, 65, 1 << 30}) : of({0, 2, 4, 8}));
    if (chance(4)) result.partial_bits = static_cast<int>(of({0, 8, 16, -5}));
    return result;
  }

  ModelOptions options() {
    return {.semantics = chance(2) ? Semantics::kV3 : Semantics::kV4,
            .reuse = pick(std::array<Reuse, 3>{Reuse::kSampled, Reuse::kWalked, Reuse::kWindow}),
            .scale_mac = chance(6)};
  }

 private:
  void place(Mapping* mapping, Loop loop) {
    LevelMapping& level = (*mapping)[random_() % mapping->size()];
    auto& loops = chance(12) ? level.spatial_x : chance(12) ? level.spatial_y : level.temporal;
    loops.insert(loops.begin() + static_cast<int64_t>(random_() % (loops.size() + 1)), loop);
  }

  static constexpr int odd_ = 120;
  std::mt19937 random_;
};

void expect_sense(const Arch& arch, const Layer& layer, const Evaluation& e) {
  const auto sound = [](double value) { return std::isfinite(value) && value >= 0.0; };
  double energy = e.mac_energy_pj;
  ASSERT_EQ(e.levels.size(), arch.levels.size());
  for (const LevelCounts& level : e.levels) {
    ASSERT_GE(e.cycles, level.cycles);
    for (const Tensor t : kAllTensors) {
      const TensorCounts& counts = level.tensors[t];
      energy += counts.energy_pj;
      for (const int64_t count : {counts.tile_words, counts.partition, counts.reads, counts.updates, counts.fills}) {
        ASSERT_GE(count, 0);
        ASSERT_LE(count, int64_t{1} << 53);
      }
      if (counts.kept) {
        ASSERT_LE(counts.partition, layer.elements(t));
      }
    }
  }
  ASSERT_TRUE(sound(e.energy_pj) && sound(e.edp) && sound(e.utilization));
  ASSERT_NEAR(e.energy_pj, energy, 1e-9 * energy);
  ASSERT_EQ(e.macs, layer.macs());
  ASSERT_GE(static_cast<double>(e.cycles) * static_cast<double>(arch.mac_instances()), static_cast<double>(e.macs));
  ASSERT_LE(e.utilization, 1.0);
  ASSERT_GE(e.last_level_accesses, 0);
}

TEST(Fuzz, EvaluateRefusesOrMakesSense) {
  int priced = 0, refused = 0;
  for (unsigned seed = 0; seed < 20000; ++seed) {
    Drawn drawn(seed);
    try {
      const Arch arch = drawn.arch();
      const Layer layer = drawn.layer();
      const Mapping mapping = drawn.mapping(arch, layer);
      const Evaluation e = evaluate(arch, layer, mapping, drawn.widths(), drawn.options());
      ASSERT_NO_FATAL_FAILURE(expect_sense(arch, layer, e)) << "seed " << seed;
      ++priced;
    } catch (const std::invalid_argument& error) {
      ASSERT_NE(std::string(error.what()), "") << "seed " << seed;
      ++refused;
    }
  }
  EXPECT_GT(priced, 2000);
  EXPECT_GT(refused, 2000);
}

TEST(Fuzz, SearchRefusesOrFindsWhatEvaluatePrices) {
  int found = 0;
  for (unsigned seed = 0; seed < 600; ++seed) {
    Drawn drawn(1000000 + seed);
    try {
      const Arch arch = drawn.arch();
      const Layer layer = drawn.layer();
      const Widths widths = drawn.widths();
      if (MapSpace(arch, layer).total() > 2e4) continue;
      const SearchOptions options{.objective = Objective::kEnergy};
      const SearchResult result = search(arch, layer, widths, options);
      const Certificate& c = result.certificate;
      EXPECT_EQ(c.fanout_invalid + c.capacity_invalid + c.bound_pruned + c.dominance_pruned + c.evaluated, c.total);
      const Evaluation again = evaluate(arch, layer, result.best.mapping, widths);
      EXPECT_EQ(again.energy_pj, result.best.evaluation.energy_pj) << "seed " << seed;
      ASSERT_NO_FATAL_FAILURE(expect_sense(arch, layer, again)) << "seed " << seed;
      const RandomResult lucky =
          random_search(arch, layer, widths, options, {.seed = seed, .victory = 20, .timeout = 200});
      EXPECT_GE(lucky.best.evaluation.energy_pj, again.energy_pj * (1 - 1e-12)) << "seed " << seed;
      ++found;
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT_GT(found, 50);
}

}  // namespace
