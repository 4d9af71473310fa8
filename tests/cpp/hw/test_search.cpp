// The search: counts and optima of the reference's spaces, bounded against full enumeration, certificates, messages.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include <mixbit/hw/mapspace.h>
#include <mixbit/hw/search.h>

#include "enumerate.h"
#include "reference.h"

namespace {

using namespace mixbit::hw;
using mixbit::test::EveryMapping;
using mixbit::test::eyeriss;
using mixbit::test::Json;
using mixbit::test::kObjectives;
using mixbit::test::mobilenet_v1;
using mixbit::test::reference;
using mixbit::test::simba;
using mixbit::test::value;

Widths same(int bits) { return {{bits, bits, bits}}; }

double parts(const Certificate& c) {
  return c.fanout_invalid + c.capacity_invalid + c.bound_pruned + c.dominance_pruned + c.evaluated;
}

TEST(Factorizations, AllCountPick) {
  Factorizations free(std::vector<FactorRule>(3));
  EXPECT_EQ(free.count(12), 18.0);  // 2^2 * 3 in 3 places: C(4, 2) * C(3, 2)
  const auto all = free.all(12);
  EXPECT_EQ(all.size(), 18u);
  std::vector<std::vector<int64_t>> picked;
  for (int i = 0; i < 18; ++i) picked.push_back(free.pick(12, (i + 0.5) / 18.0));
  EXPECT_EQ(picked, all);
  Factorizations ruled({{.fixed = 2}, {.max = 3}, {}});
  for (const auto& factors : ruled.all(24)) {
    EXPECT_EQ(factors[0], 2);
    EXPECT_LE(factors[1], 3);
    EXPECT_EQ(factors[0] * factors[1] * factors[2], 24);
  }
  EXPECT_EQ(ruled.all(24).size(), 3u);
  EXPECT_EQ(ruled.count(9), 0.0);
}

TEST(Counts, ValidMappingsOfTheSecondLayer) {
  const std::vector<std::pair<std::array<int, 3>, double>> published = {
      // Inputs / Weights / Outputs
      {{16, 16, 16}, 11778}, {{8, 8, 8}, 15021}, {{8, 4, 8}, 15054},  {{8, 2, 8}, 15054},  {{4, 4, 4}, 16417},
      {{2, 2, 2}, 16877},    {{4, 8, 4}, 16315}, {{8, 16, 8}, 14849}, {{16, 8, 16}, 11778}};
  const Layer layer = conv(mobilenet_v1()[1]);
  for (const auto& [bits, valid] : published) {
    const MappingCounts counts = count_mappings(eyeriss(), layer, {{bits[1], bits[0], bits[2]}});
    EXPECT_EQ(counts.total, 70560);
    EXPECT_EQ(counts.fanout_invalid, 53677);
    EXPECT_EQ(counts.valid, valid);
    EXPECT_EQ(counts.capacity_invalid, 70560 - 53677 - valid);
  }
}

TEST(Counts, AreThoseOfTheEnumeration) {
  const Layer layer = conv(mobilenet_v1()[1]);
  const EveryMapping all(eyeriss(), layer, {{{2, 8, 16}, {4, 16}, {3, 8}}});
  ASSERT_EQ(all.combinations(), 12u);
  for (size_t i = 0; i < all.combinations(); ++i) {
    EXPECT_EQ(all.valid(i), count_mappings(eyeriss(), layer, all.widths(i)).valid);
  }
}

TEST(Counts, SimbaAsTheSpecificationCounts) {
  // 35 * 56 * 30 * 30 factorizations; P and Q in both orders at two levels.
  EXPECT_EQ(count_mappings(simba(), conv(mobilenet_v1()[4]), same(8)).total, 1764000.0 * 4);
  // Three channels are not spread over four: that factor is free there.
  EXPECT_EQ(MapSpace(simba(), conv(mobilenet_v1()[0])).relaxed(),
            std::vector<std::string>{"PEAccuBuffer.spatial_y.C=4"});
}

TEST(Search, EyerissOptimaOfTheReference) {
  const auto layers = mobilenet_v1();
  for (const auto& [name, bits] : {std::pair{"16_16_16", 16}, std::pair{"8_8_8", 8}}) {
    for (const Json& expected : reference()["exhaustive_optimum_eyeriss"][name].array()) {
      const int64_t number = expected["layer"].integer();
      SCOPED_TRACE(std::to_string(bits) + " bits, layer " + std::to_string(number));
      const Layer layer = conv(layers[number - 1]);
      const MappingCounts counts = count_mappings(eyeriss(), layer, same(bits));
      EXPECT_EQ(counts.total, expected["total"].number());
      EXPECT_EQ(counts.fanout_invalid, expected["fanout_invalid"].number());
      EXPECT_EQ(counts.capacity_invalid, expected["capacity_invalid"].number());
      EXPECT_EQ(counts.valid, expected["valid"].number());
      const SearchResult found = search(eyeriss(), layer, same(bits));
      EXPECT_NEAR(found.best.evaluation.edp, expected["edp"].number(), 0.5001e-4);
      EXPECT_NEAR(found.best.evaluation.energy_pj, expected["energy_uJ"].number() * 1e6, 501.0);
      EXPECT_EQ(found.best.evaluation.cycles, expected["cycles"].integer());
      EXPECT_EQ(parts(found.certificate), counts.total);
      EXPECT_EQ(found.certificate.fanout_invalid, counts.fanout_invalid);
      EXPECT_GE(found.certificate.least_open_bound, found.best.evaluation.edp * 1e12 * (1 - 1e-12));
    }
  }
}

TEST(Search, EyerissSumsOfTheSpecification) {
  const std::vector<std::tuple<std::array<int, 3>, double, double>> published = {{{16, 16, 16}, 28399.8, 60583.8},
                                                                                 {{8, 8, 8}, 18689.3, 40562.9},
                                                                                 {{8, 4, 8}, 16334.8, 35425.1},
                                                                                 {{4, 4, 4}, 14423.3, 31698.1},
                                                                                 {{2, 2, 2}, 12451.7, 27592.6}};
  for (const auto& [bits, energy, edp] : published) {
    double energies = 0.0, edps = 0.0;
    for (const ConvShape& shape : mobilenet_v1()) {
      const Evaluation e = search(eyeriss(), conv(shape), {{bits[1], bits[0], bits[2]}}).best.evaluation;
      energies += e.energy_pj / 1e6;
      edps += e.edp;
    }
    EXPECT_NEAR(energies, energy, 0.0501);
    EXPECT_NEAR(edps, edp, 0.0501);
  }
}

// Holds the optimum of every class and objective against every mapping of the space.
void expect_optima(const Arch& arch, const Layer& layer, const WidthLists& widths, SearchOptions options = {}) {
  const EveryMapping all(arch, layer, widths.bits, options.model);
  for (const Objective objective : kObjectives) {
    options.objective = objective;
    for (const Method method : {Method::kBounded, Method::kExhaustive}) {
      options.method = method;
      const SweepResult found = sweep(arch, layer, widths, options);
      const Certificate& c = found.certificate;
      EXPECT_EQ(parts(c), c.total);
      EXPECT_EQ(c.total, all.total);
      EXPECT_EQ(c.fanout_invalid, all.fanout_invalid);
      if (method == Method::kExhaustive) {
        EXPECT_EQ(c.bound_pruned, 0.0);
        EXPECT_EQ(c.capacity_invalid, all.capacity_invalid);
      }
      for (size_t i = 0; i < all.combinations(); ++i) {
        EXPECT_TRUE(mixbit::test::agree(found, all, i, objective)) << "combination " << i;
      }
    }
  }
}

TEST(Search, FindsTheBestOfEveryMappingOfTheReferenceSpaces) {
  const auto layers = mobilenet_v1();
  WidthLists widths;
  for (auto& bits : widths.bits) bits = {2, 3, 4, 5, 8, 16};
  for (const size_t number : {0, 1, 23, 27}) expect_optima(eyeriss(), conv(layers[number]), widths);
  expect_optima(simba(), conv(layers[27]), widths);
}

// Small spaces of every kind: free factors, orders and bypasses, strides, dilations, groups, few words, bandwidths.
class RandomSpaces : public testing::TestWithParam<unsigned> {
 protected:
  int64_t pick(std::initializer_list<int64_t> from) { return from.begin()[random_() % from.size()]; }

  ConvShape draw_shape() {
    return {.c = pick({1, 2, 4}),
            .m = pick({1, 2, 3}),
            .r = pick({1, 2, 3}),
            .s = pick({1, 1, 2}),
            .n = pick({1, 1, 2}),
            .p = pick({2, 4, 6}),
            .q = pick({1, 2, 3}),
            .g = pick({1, 1, 1, 2}),
            .w_stride = pick({1, 1, 2, 3}),
            .h_stride = pick({1, 2}),
            .w_dilation = pick({1, 1, 2}),
            .h_dilation = 1};
  }

  Arch draw_arch() {
    Arch arch;
    arch.mac_pj = 1.0;
    arch.mac_mesh_x = pick({1, 2, 4});
    arch.mac_mesh_y = pick({1, 1, 3});
    arch.levels = {{.name = "inner", .size = pick({4, 8, 16}), .mesh_x = arch.mac_mesh_x, .mesh_y = arch.mac_mesh_y},
                   {.name = "middle", .size = pick({16, 32, 64}), .block = pick({1, 2, 4})},
                   {.name = "outer", .block = pick({1, 4})}};
    double energy = 1.0;
    for (size_t l = 0; l < arch.levels.size(); ++l, energy *= 6.0) {
      Level& level = arch.levels[l];
      level.read_pj = energy * static_cast<double>(pick({1, 2, 3}));
      level.write_pj = level.read_pj * (1.0 + static_cast<double>(pick({0, 1, 2})) / 4.0);
      if (pick({0, 0, 1})) level.read_bw = 0.5 * static_cast<double>(pick({1, 2, 3, 4}));
      if (pick({0, 0, 0, 1})) level.write_bw = 0.5 * static_cast<double>(pick({1, 2, 3, 4}));
      if (pick({0, 0, 0, 0, 1})) level.shared_bw = static_cast<double>(pick({1, 2, 3, 4}));
      for (const Tensor t : kAllTensors) {
        if (pick({0, 1, 1, 1})) level.constraints.keep[t] = l == 2 || pick({0, 1});
      }
    }
    auto& middle = arch.levels[1].constraints.loops[kTemporal];
    if (pick({0, 0, 1})) middle.order = {{"P", "*", "M"}};
    if (pick({0, 0, 1})) middle.dims = {{"R", "P", "Q", "C"}};
    if (pick({0, 0, 1})) arch.levels[2].constraints.loops[kTemporal].order = {{"M", "C", "P"}};
    return arch;
  }

  std::mt19937 random_{GetParam()};
};

TEST_P(RandomSpaces, FindTheBestOfEveryMapping) {
  ConvShape shape;
  Arch arch;
  double total;
  do {
    shape = draw_shape();
    arch = draw_arch();
    total = MapSpace(arch, conv(shape)).total();
  } while (total < 1e3 || total > 1e6);
  WidthLists widths;
  widths.bits = {{{4, 16}, {3, 8}, {5, 16}}};
  SearchOptions options{.objective = kObjectives[random_() % kObjectives.size()],
                        .threads = static_cast<int>(pick({1, 2}))};
  options.model.semantics = pick({0, 1}) ? Semantics::kV3 : Semantics::kV4;
  expect_optima(arch, conv(shape), widths, options);
  // Drawn mappings are priced by the model, not by the search.
  const Widths some = {{8, 4, 16}};
  const double optimum = value(search(arch, conv(shape), some, options).best.evaluation, options.objective);
  const RandomResult drawn = random_search(arch, conv(shape), some, options, {.seed = GetParam(), .victory = 200});
  EXPECT_GE(value(drawn.best.evaluation, options.objective), optimum * (1 - 1e-12));
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomSpaces, testing::Range(0u, 40u));

TEST(Search, AnyNumberOfThreadsGivesTheSame) {
  const Layer layer = conv(mobilenet_v1()[4]);
  WidthLists widths;
  for (auto& bits : widths.bits) bits = {2, 4, 8};
  const SweepResult one = sweep(simba(), layer, widths, {.threads = 1});
  for (const int threads : {2, 3}) {
    const SweepResult many = sweep(simba(), layer, widths, {.threads = threads});
    ASSERT_EQ(many.index, one.index);
    for (size_t i = 0; i < one.found.size(); ++i) {
      EXPECT_EQ(many.found[i].evaluation.energy_pj, one.found[i].evaluation.energy_pj);
      for (size_t l = 0; l < one.found[i].mapping.size(); ++l) {
        const auto &a = one.found[i].mapping[l].temporal, &b = many.found[i].mapping[l].temporal;
        ASSERT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end(),
                               [](const Loop& x, const Loop& y) { return x.dim == y.dim && x.factor == y.factor; }));
      }
    }
    EXPECT_EQ(many.certificate.nodes, one.certificate.nodes);
    EXPECT_EQ(many.certificate.bound_pruned, one.certificate.bound_pruned);
  }
}

TEST(Pareto, BoundedIsExhaustiveAndHoldsTheOptima) {
  const Layer layer = conv(mobilenet_v1()[2]);
  const std::vector<Objective> objectives = {Objective::kEnergy, Objective::kDelay, Objective::kLastLevelAccesses};
  const ParetoResult bounded = pareto(eyeriss(), layer, same(8), objectives);
  const ParetoResult full = pareto(eyeriss(), layer, same(8), objectives, {.method = Method::kExhaustive});
  EXPECT_EQ(parts(bounded.certificate), bounded.certificate.total);
  ASSERT_EQ(bounded.points.size(), full.points.size());
  EXPECT_GT(bounded.points.size(), 1u);
  for (size_t i = 0; i < full.points.size(); ++i) {
    for (const Objective objective : objectives) {
      EXPECT_EQ(value(bounded.points[i].evaluation, objective), value(full.points[i].evaluation, objective));
    }
  }
  for (const Objective objective : kObjectives) {
    double best = value(bounded.points[0].evaluation, objective);
    for (const Found& point : bounded.points) best = std::min(best, value(point.evaluation, objective));
    const Evaluation optimum = search(eyeriss(), layer, same(8), {.objective = objective}).best.evaluation;
    EXPECT_NEAR(best, value(optimum, objective), 1e-12 * best);
  }
}

TEST(Sweep, WidthsOfOneClassShareAMapping) {
  WidthLists widths;
  widths.bits = {{{6, 7, 8}, {8}, {8}}};
  const SweepResult result = sweep(eyeriss(), conv(mobilenet_v1()[27]), widths);
  EXPECT_EQ(result.classes, 1);
  EXPECT_EQ(result.index, (std::vector<int64_t>{0, 0, 0}));
  // With MACs priced by operand widths the three differ.
  Arch arch = eyeriss();
  arch.mac_scaling = MacScaling{8.63, 0.0857, 32.0};
  SearchOptions options;
  options.model.scale_mac = true;
  const SweepResult scaled = sweep(arch, conv(mobilenet_v1()[27]), widths, options);
  EXPECT_EQ(scaled.classes, 3);
  EXPECT_LT(scaled.found[0].evaluation.energy_pj, scaled.found[2].evaluation.energy_pj);
}

TEST(Random, FollowsTheStoppingRuleAndNeverBeatsTheOptimum) {
  const Layer layer = conv(mobilenet_v1()[1]);
  const RandomResult found = random_search(eyeriss(), layer, same(8), {}, {.seed = 3});
  const RandomResult again = random_search(eyeriss(), layer, same(8), {}, {.seed = 3});
  EXPECT_EQ(found.counts.total, again.counts.total);
  EXPECT_EQ(found.best.evaluation.energy_pj, again.best.evaluation.energy_pj);
  EXPECT_NE(found.counts.total, random_search(eyeriss(), layer, same(8), {}, {.seed = 4}).counts.total);
  EXPECT_GE(found.counts.valid, 500);
  EXPECT_EQ(found.counts.total, found.counts.valid + found.counts.fanout_invalid + found.counts.capacity_invalid);
  // 76 % of the space is beyond the fan-out.
  EXPECT_NEAR(found.counts.fanout_invalid / found.counts.total, 53677.0 / 70560.0, 0.03);
  EXPECT_GE(found.best.evaluation.edp, search(eyeriss(), layer, same(8)).best.evaluation.edp);
}

template <typename F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "nothing thrown";
}

TEST(NoMapping, SaysWhatStandsInTheWay) {
  const Layer layer = conv(mobilenet_v1()[1]);
  Arch arch = eyeriss();
  arch.levels[2].size = 2;  // R rows are 3 words
  EXPECT_EQ(message_of([&] { search(arch, layer, same(16)); }),
            "constraints: no mapping fits; the closest needs 3 words at level ifmap_spad (3 for Inputs), which has 2");
  EXPECT_EQ(message_of([&] { search(arch, layer, same(8)); }), "nothing thrown");
  arch = eyeriss();
  arch.levels[5].constraints.loops[kTemporal].dims = {{"C", "M"}};
  EXPECT_EQ(message_of([&] { search(arch, layer, same(16)); }),
            "constraints: no mapping, since no factors that level shared_glb allows in X fit its fan-out of 14");
  arch = eyeriss();
  arch.levels[5].constraints.loops[kTemporal].dims = {{"C", "M"}};
  arch.levels[4].constraints.loops[kSpatialX].dims = {{"C", "M"}};
  EXPECT_EQ(message_of([&] { search(arch, layer, same(16)); }),
            "constraints: no mapping, since no factors of Q that the levels allow multiply to 112");
  arch = eyeriss();
  for (Level& level : arch.levels) level.constraints.keep[kWeights] = false;
  EXPECT_EQ(message_of([&] { search(arch, layer, same(16)); }),
            "constraints: no mapping, since every level bypasses Weights");
}

}  // namespace
