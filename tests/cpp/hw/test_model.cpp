// The cost of one mapping: points measured on the peer, cases small enough to count by hand, packing, bad input.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "reference.h"

namespace {

using namespace mixbit::hw;
using mixbit::test::Json;
using mixbit::test::reference;
using mixbit::test::reference_arch;
using mixbit::test::reference_layer;
using mixbit::test::reference_mapping;
using mixbit::test::reference_widths;

void expect_equal(const Evaluation& got, const Json& expected, const Arch& arch, bool percent) {
  EXPECT_EQ(got.cycles, expected["cycles"].integer());
  EXPECT_EQ(got.macs, expected["mac"]["computes"].integer());
  EXPECT_EQ(got.utilized_instances, expected["mac"]["utilized_instances"].integer());
  EXPECT_NEAR(got.mac_energy_pj, expected["mac"]["energy_pJ"].number(), 0.01);
  // v4 prints percent.
  const double printed = expected["utilization_printed"].number() / (percent ? 100.0 : 1.0);
  EXPECT_NEAR(got.utilization, printed, percent ? 0.0000501 : 0.00501);
  for (const Json& level : expected["levels"].array()) {
    const LevelCounts& counts = got.levels[arch.level(level["name"].string())];
    EXPECT_EQ(counts.cycles, level["cycles"].integer());
    for (const Tensor t : kAllTensors) {
      SCOPED_TRACE(level["name"].string() + ' ' + kTensorNames[t]);
      const TensorCounts& c = counts.tensors[t];
      ASSERT_EQ(c.kept, level["data"].has(kTensorNames[t]));
      if (!c.kept) continue;
      const Json& data = level["data"][kTensorNames[t]];
      EXPECT_EQ(c.tile_words, data["tile_words"].integer());
      EXPECT_EQ(c.operands_per_word, data["operands_per_word"].integer());
      EXPECT_EQ(c.partition, data["partition"].integer());
      EXPECT_EQ(c.instances, data["instances"].integer());
      EXPECT_EQ(c.reads, data["reads_words_per_instance"].integer());
      EXPECT_EQ(c.updates, data["updates_words_per_instance"].integer());
      EXPECT_EQ(c.fills, data["fills_words_per_instance"].integer());
      const double energy = data["energy_total_pJ"].number();
      EXPECT_NEAR(c.energy_pj, energy, std::max(0.01 * static_cast<double>(c.instances), 1e-9 * energy));
    }
  }
  // v4 prints a total with leakage; v3's is the sum of what is compared above.
  if (expected.has("energy_total_pJ")) {
    EXPECT_NEAR(got.energy_pj, expected["energy_total_pJ"].number(), 1e-7 * got.energy_pj);
  }
}

TEST(Model, ReferencePoints) {
  int points = 0, sampled_differs = 0;
  for (const Json& point : reference()["points"].array()) {
    SCOPED_TRACE(point["id"].string());
    const Arch arch = reference_arch(point["arch"].string());
    const Layer layer = reference_layer(point["problem"]);
    const Mapping mapping = reference_mapping(point["mapping"], arch, layer);
    const Widths widths = reference_widths(point["problem"]);
    ModelOptions options;
    if (point.has("semantics")) options.semantics = Semantics::kV4;
    const bool sampled = std::get<bool>(point["independent_closed_form_agrees"].value);
    if (!sampled) {
      // These ran with the peer's sampling off: its walk is ours with true displacements, and differs from sampling.
      const double e = evaluate(arch, layer, mapping, widths, options).energy_pj;
      sampled_differs += e < point["expected"]["energy_total_pJ"].number() - 1.0;
      options.reuse = Reuse::kWalked;
    }
    expect_equal(evaluate(arch, layer, mapping, widths, options), point["expected"], arch, point.has("semantics"));
    ++points;
  }
  EXPECT_EQ(points, 66);
  EXPECT_EQ(sampled_differs, 2);
}

// Four levels, RF and DRAM keep everything unless a case says otherwise.
enum { kRf, kBuf, kGlb, kDram };
struct Tiny {
  Arch arch = reference_arch("test4level");
  Layer layer;
  Mapping mapping = Mapping(4);
  Widths widths;

  explicit Tiny(const ConvShape& shape) : layer(conv(shape)) {
    mapping[kRf].keep = mapping[kDram].keep = {true, true, true};
  }
  std::vector<Loop> loops(const std::vector<std::pair<std::string, int64_t>>& named) const {
    std::vector<Loop> result;
    for (const auto& [name, factor] : named) result.push_back({layer.dim(name), factor});
    return result;
  }
  Evaluation run(Semantics semantics = Semantics::kV3) const {
    return evaluate(arch, layer, mapping, widths, {semantics, Reuse::kSampled, false});
  }
};

// (RF fills, DRAM reads, DRAM updates) of a tensor.
std::vector<int64_t> traffic(const Evaluation& e, Tensor t) {
  const TensorCounts &rf = e.levels[kRf].tensors[t], &dram = e.levels[kDram].tensors[t];
  return {rf.fills, dram.reads, dram.updates};
}
using Counts = std::vector<int64_t>;

void expect_traffic(const Evaluation& e, int64_t cycles, const Counts& w, const Counts& i, const Counts& o) {
  EXPECT_EQ(e.cycles, cycles);
  EXPECT_EQ(traffic(e, kWeights), w);
  EXPECT_EQ(traffic(e, kInputs), i);
  EXPECT_EQ(traffic(e, kOutputs), o);
  // The MACs ask the register file once a cycle.
  EXPECT_EQ(e.levels[kRf].tensors[kWeights].reads, cycles);
  EXPECT_EQ(e.levels[kRf].tensors[kInputs].reads, cycles);
}

TEST(Model, T1OrderRInnerP) {
  Tiny t({.r = 3, .p = 4});
  t.mapping[kDram].temporal = t.loops({{"R", 3}, {"P", 4}});
  expect_traffic(t.run(), 12, {12, 12, 0}, {12, 12, 0}, {4, 0, 4});
}

TEST(Model, T2OrderPInnerR) {
  Tiny t({.r = 3, .p = 4});
  t.mapping[kDram].temporal = t.loops({{"P", 4}, {"R", 3}});
  expect_traffic(t.run(), 12, {3, 3, 0}, {12, 12, 0}, {12, 8, 12});
}

TEST(Model, T3Halo) {
  Tiny t({.r = 3, .p = 4});
  t.mapping[kRf].temporal = t.loops({{"R", 3}});
  t.mapping[kDram].temporal = t.loops({{"P", 4}});
  expect_traffic(t.run(), 12, {3, 3, 0}, {6, 6, 0}, {4, 0, 4});
}

TEST(Model, T4HaloInsideChannels) {
  Tiny t({.c = 2, .r = 3, .p = 4});
  t.mapping[kRf].temporal = t.loops({{"R", 3}});
  t.mapping[kDram].temporal = t.loops({{"P", 4}, {"C", 2}});
  expect_traffic(t.run(), 24, {6, 6, 0}, {12, 12, 0}, {8, 4, 8});
}

TEST(Model, T5Multicast) {
  Tiny t({.c = 2, .m = 4});
  t.mapping[kGlb].spatial_x = t.loops({{"M", 4}});
  t.mapping[kDram].temporal = t.loops({{"C", 2}});
  expect_traffic(t.run(), 2, {2, 8, 0}, {2, 2, 0}, {1, 0, 4});
}

TEST(Model, T6SpatialReduction) {
  Tiny t({.c = 4, .m = 2});
  t.mapping[kGlb].spatial_x = t.loops({{"C", 4}});
  t.mapping[kDram].temporal = t.loops({{"M", 2}});
  expect_traffic(t.run(), 2, {2, 8, 0}, {1, 4, 0}, {2, 0, 2});
}

TEST(Model, T7Diagonal) {
  Tiny t({.r = 2, .p = 3});
  t.mapping[kGlb].spatial_x = t.loops({{"P", 3}});
  t.mapping[kGlb].spatial_y = t.loops({{"R", 2}});
  expect_traffic(t.run(), 1, {1, 2, 0}, {1, 4, 0}, {1, 0, 3});
}

TEST(Model, T8OutputsOutermostOnly) {
  Tiny t({.c = 4, .m = 2});
  t.mapping[kRf].keep[kOutputs] = false;
  t.mapping[kDram].temporal = t.loops({{"M", 2}, {"C", 4}});
  expect_traffic(t.run(), 8, {8, 8, 0}, {4, 4, 0}, {0, 6, 8});
}

TEST(Model, T9MiddleLevel) {
  Tiny t({.c = 4, .m = 6});
  t.mapping[kRf].temporal = t.loops({{"C", 4}});
  t.mapping[kGlb].temporal = t.loops({{"M", 3}});
  t.mapping[kGlb].keep[kInputs] = true;
  t.mapping[kDram].temporal = t.loops({{"M", 2}});
  const Evaluation e = t.run();
  expect_traffic(e, 24, {24, 24, 0}, {4, 4, 0}, {6, 0, 6});
  EXPECT_EQ(e.levels[kGlb].tensors[kInputs].reads, 4);
  EXPECT_EQ(e.levels[kGlb].tensors[kInputs].fills, 4);
}

TEST(Model, T10Packing) {
  Tiny t({.c = 7, .m = 5});
  t.mapping[kRf].temporal = t.loops({{"C", 7}});
  t.mapping[kDram].temporal = t.loops({{"M", 5}});
  t.widths.bits[kInputs] = 5;
  t.widths.bits[kWeights] = 3;
  t.widths.bits[kOutputs] = 7;
  const Evaluation e = t.run();
  EXPECT_EQ(e.cycles, 35);
  const auto& rf = e.levels[kRf].tensors;
  EXPECT_EQ(rf[kWeights].tile_words, 2);
  EXPECT_EQ(rf[kWeights].fills, 7);
  EXPECT_EQ(e.levels[kDram].tensors[kWeights].reads, 7);
  EXPECT_EQ(rf[kInputs].tile_words, 3);
  EXPECT_EQ(rf[kInputs].fills, 3);
  EXPECT_EQ(rf[kInputs].reads, 12);
  EXPECT_EQ(rf[kOutputs].reads, 15);
  EXPECT_EQ(rf[kOutputs].updates, 18);
  EXPECT_EQ(rf[kOutputs].fills, 3);
}

TEST(Model, T11Stride) {
  Tiny t({.r = 3, .p = 4, .w_stride = 2});
  t.mapping[kRf].temporal = t.loops({{"R", 3}});
  t.mapping[kDram].temporal = t.loops({{"P", 4}});
  expect_traffic(t.run(), 12, {3, 3, 0}, {9, 9, 0}, {4, 0, 4});
}

TEST(Model, T12Bandwidth) {
  Tiny t({.c = 8, .m = 8});
  t.mapping[kGlb].spatial_x = t.loops({{"C", 8}});
  t.mapping[kGlb].spatial_y = t.loops({{"M", 8}});
  t.mapping[kGlb].keep = {true, true, true};
  const Evaluation e = t.run();
  EXPECT_EQ(e.cycles, 22);
  const auto& glb = e.levels[kGlb].tensors;
  EXPECT_EQ(glb[kWeights].reads, 64);
  EXPECT_EQ(glb[kWeights].fills, 64);
  EXPECT_EQ(glb[kInputs].reads, 8);
  EXPECT_EQ(glb[kInputs].fills, 8);
  EXPECT_EQ(glb[kOutputs].updates, 8);
  EXPECT_EQ(glb[kOutputs].fills, 8);
}

TEST(Model, T13WeightStationary) {
  Tiny t({.c = 2, .n = 3});
  t.mapping[kDram].temporal = t.loops({{"N", 3}, {"C", 2}});
  expect_traffic(t.run(), 6, {2, 2, 0}, {6, 6, 0}, {6, 3, 6});
}

TEST(Model, V4ElidesFirstFillsOfOutputs) {
  Tiny t({.c = 2, .n = 3});
  t.mapping[kDram].temporal = t.loops({{"N", 3}, {"C", 2}});
  EXPECT_EQ(traffic(t.run(Semantics::kV4), kOutputs), (Counts{3, 3, 6}));
}

TEST(Model, GroupsAreADimension) {
  Tiny grouped({.c = 2, .m = 3, .g = 4});
  grouped.mapping[kDram].temporal = grouped.loops({{"C", 2}, {"M", 3}, {"G", 4}});
  EXPECT_EQ(grouped.layer.elements(kWeights), 24);
  EXPECT_EQ(grouped.layer.elements(kInputs), 8);
  EXPECT_EQ(grouped.layer.elements(kOutputs), 12);
  // Outputs stay while C runs, and nothing is shared between groups.
  expect_traffic(grouped.run(), 24, {24, 24, 0}, {24, 24, 0}, {12, 0, 12});
}

TEST(Model, MatrixProductIsAPointwiseConvolution) {
  const Arch arch = reference_arch("test4level");
  const auto run = [&](const Layer& layer, const char* k) {
    Mapping mapping(4);
    mapping[kRf].keep = mapping[kDram].keep = {true, true, true};
    mapping[kRf].temporal = {{layer.dim(k), 4}};
    mapping[kDram].temporal = {{layer.dim("N"), 3}, {layer.dim("M"), 5}, {layer.dim(k), 2}};
    return evaluate(arch, layer, mapping, {});
  };
  const Evaluation a = run(gemm(5, 3, 8), "K"), b = run(conv({.c = 8, .m = 5, .n = 3}), "C");
  EXPECT_EQ(a.energy_pj, b.energy_pj);
  EXPECT_EQ(a.cycles, b.cycles);
}

TEST(Model, ScaledMacsAndPartialSums) {
  Tiny t({.c = 8, .m = 2});
  t.mapping[kRf].temporal = t.loops({{"C", 8}});
  t.mapping[kDram].temporal = t.loops({{"M", 2}});
  t.widths.bits = {4, 8, 4};
  const Evaluation plain = t.run();
  EXPECT_EQ(plain.mac_energy_pj, 16.0);
  t.arch.mac_scaling = MacScaling{8.63, 0.0857, 32.0};
  const Evaluation scaled = evaluate(t.arch, t.layer, t.mapping, t.widths, {Semantics::kV3, Reuse::kSampled, true});
  EXPECT_NEAR(scaled.mac_energy_pj, 16.0 * (8.63 * 8 * 4 / 1024 + 0.0857 * 8 / 32), 1e-9);
  t.widths.bits = {16, 16, 16};
  EXPECT_NEAR(mac_energy(t.arch, t.widths, {Semantics::kV3, Reuse::kSampled, true}), 2.20035, 1e-9);

  t.widths.bits = {4, 8, 4};
  t.widths.partial_bits = 16;
  const Evaluation wide = t.run();
  EXPECT_EQ(plain.levels[kRf].tensors[kOutputs].updates, 4);
  EXPECT_EQ(wide.levels[kRf].tensors[kOutputs].updates, 16);
  EXPECT_EQ(wide.levels[kDram].tensors[kOutputs].updates, plain.levels[kDram].tensors[kOutputs].updates);
}

TEST(Packing, OperandsAndWaste) {
  for (const int64_t word : {8, 16, 32}) {
    for (int bits = 1; bits <= word; ++bits) {
      const int64_t k = operands_per_word(word, bits);
      EXPECT_LE(k * bits, word);
      EXPECT_GT((k + 1) * bits, word);
      EXPECT_EQ(words(0, k), 0);
      EXPECT_EQ(words(1, k), 1);
      EXPECT_EQ(words(k, k), 1);
      EXPECT_EQ(words(k + 1, k), 2);
      EXPECT_EQ(words(k - 1, k), k > 1 ? 1 : 0);
    }
    EXPECT_EQ(operands_per_word(word, 0), 1);
    EXPECT_THROW(operands_per_word(word, static_cast<int>(word) + 1), std::invalid_argument);
  }
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

TEST(BadInput, SaysWhatAndWhere) {
  Tiny t({.c = 4, .m = 64});
  t.mapping[kDram].temporal = t.loops({{"C", 4}, {"M", 64}});
  EXPECT_EQ(message_of([&] { t.run(); }), "nothing thrown");

  Tiny wrong = t;
  wrong.mapping[kDram].temporal = t.loops({{"C", 4}, {"M", 32}});
  EXPECT_EQ(message_of([&] { wrong.run(); }), "mapping: the factors of M multiply to 32, expected 64");
  wrong.mapping[kDram].temporal = t.loops({{"C", 4}, {"M", 4}});
  wrong.mapping[kGlb].spatial_x = t.loops({{"M", 16}});
  EXPECT_EQ(message_of([&] { wrong.run(); }),
            "mapping: level GLB spreads over 16 instances in X, but has a fan-out of 8");
  wrong = t;
  wrong.arch.levels[kRf].size = 2;
  EXPECT_EQ(message_of([&] { wrong.run(); }),
            "mapping: level RF needs 3 words (1 for Weights and 1 for Inputs and 1 for Outputs), but has 2");
  wrong = t;
  wrong.mapping[kRf].keep[kInputs] = wrong.mapping[kDram].keep[kInputs] = false;
  EXPECT_EQ(message_of([&] { wrong.run(); }), "mapping: no level keeps Inputs");
  wrong = t;
  wrong.widths.bits[kWeights] = 17;
  EXPECT_EQ(message_of([&] { wrong.run(); }), "bits: Weights has 17 bits, but level RF has words of 16");
  EXPECT_EQ(message_of([&] { conv({.c = 0}); }), "problem: C is 0, expected at least 1");
  EXPECT_EQ(message_of([&] { t.layer.dim("Z"); }), "dimension Z is not one of this layer's: C, M, R, S, N, P, Q, G");
  wrong = t;
  wrong.arch.levels[kGlb].mesh_x = 3;
  EXPECT_EQ(message_of([&] { wrong.run(); }),
            "architecture: level GLB is a mesh of 3 x 1, expected divisors of the 8 x 8 below it");
}

TEST(BadInput, WhatCouldOverflowIsRefused) {
  const int64_t large = int64_t{1} << 17;
  Tiny t({.c = large, .m = large});
  t.mapping[kDram].temporal = t.loops({{"C", large}, {"M", large}});
  t.arch.levels[kDram].read_bw = 1.0;
  EXPECT_EQ(message_of([&] { t.run(); }), "nothing thrown");

  Tiny wrong = t;
  wrong.arch.levels[kDram].read_bw = 1e-320;
  EXPECT_NE(message_of([&] { wrong.run(); }).find("read_bw is 9.99989e-321, expected at least 1e-06"),
            std::string::npos);
  wrong.arch.levels[kDram].read_bw = 1e-6;
  EXPECT_EQ(message_of([&] { wrong.run(); }), "mapping: level DRAM is so slow that it takes 9.0072e+15 cycles or more");
  wrong = t;
  wrong.arch.levels[kDram].read_pj = 1e16;
  EXPECT_EQ(message_of([&] { wrong.run(); }),
            "architecture: level DRAM: Er or Ew is 1e+16, expected picojoules of at least 0 and at most 1e+15");
  wrong = t;
  wrong.arch.mac_mesh_x = int64_t{1} << 25;
  EXPECT_EQ(message_of([&] { wrong.run(); }),
            "architecture: a mesh of 33554432 MACs, expected at least one and at most 16777216 in a row");
  wrong = t;
  wrong.mapping[kGlb].temporal = t.loops({{"C", large}});
  EXPECT_EQ(message_of([&] { wrong.run(); }), "mapping: the factors of C multiply to 1.71799e+10, expected 131072");
  EXPECT_EQ(message_of([&] { conv({.c = 1, .m = 1, .r = 2, .p = 2, .w_stride = int64_t{1} << 47}); }),
            "problem: up to 5.6295e+14 elements of Inputs may be moved; exact counts end at 2^48");
}

}  // namespace
