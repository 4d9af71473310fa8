// The mapper on MobileNetV1 (28 layers, 20 different shapes, depthwise as full convolutions): seconds, nodes and sums
// of the optima. "check" holds the bounded search's optima of all four objectives against every mapping of the space;
// "check_grouped" does so for the depthwise layers as they are, with one channel a group.
// Usage: bench_mapper [eyeriss|simba] [edp|energy|delay|accesses] [bounded|exhaustive|check|check_grouped] [one|all]
//                     [THREADS]

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <mixbit/hw/search.h>

#include "enumerate.h"
#include "reference.h"

using namespace mixbit::hw;

namespace {

using ShapeKey = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

ShapeKey key_of(const ConvShape& shape) { return {shape.c, shape.m, shape.r, shape.p, shape.w_stride, shape.g}; }

// Prints, for each different layer, what was enumerated and in how many of the width triples the search's optimum
// differs from the best of all mappings, and the sums as one line of JSON. Returns the number of differences.
int64_t check(const Arch& arch, const std::vector<ConvShape>& shapes, const WidthLists& widths, SearchOptions options) {
  using mixbit::test::EveryMapping;
  double total = 0.0, fits = 0.0, priced = 0.0, distinct = 0.0;
  int64_t layers = 0, optima = 0, wrong = 0;
  size_t combinations = 0;
  const std::clock_t cpu = std::clock();
  std::set<ShapeKey> known;
  for (const ConvShape& shape : shapes) {
    if (!known.insert(key_of(shape)).second) continue;
    const std::clock_t start = std::clock();
    const Layer layer = conv(shape);
    const EveryMapping all(arch, layer, widths.bits, options.model);
    combinations = all.combinations();
    int64_t here = 0;
    for (const Objective objective : mixbit::test::kObjectives) {
      options.objective = objective;
      const SweepResult found = sweep(arch, layer, widths, options);
      for (size_t c = 0; c < all.combinations(); ++c) {
        ++optima;
        here += !mixbit::test::agree(found, all, c, objective);
      }
      here += found.certificate.total != all.total;
      here += found.certificate.fanout_invalid != all.fanout_invalid;
    }
    ++layers;
    wrong += here;
    total += all.total;
    fits += all.total - all.fanout_invalid - all.capacity_invalid;
    priced += all.priced;
    distinct += all.distinct;
    std::fprintf(stderr,
                 "G %ld C %ld M %ld R %ld P %ld: %.0f mappings, %.0f nests, %.0f distinct; %ld differ; %.1f s\n",
                 shape.g, shape.c, shape.m, shape.r, shape.p, all.total, all.priced, all.distinct, here,
                 static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  std::printf(
      "{\"layers\": %ld, \"width triples\": %zu, \"optima\": %ld, \"differ\": %ld, \"mappings\": %.0f, "
      "\"fit\": %.0f, \"nests\": %.0f, \"priced\": %.0f, \"CPU s\": %.1f}\n",
      layers, combinations, optima, wrong, total, fits, priced, distinct,
      static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC);
  return wrong;
}

// Groups where the shipped designs take them: from the column (Eyeriss) or the global buffer (Simba) outwards.
Arch with_groups(Arch arch) {
  for (Level& level : arch.levels) {
    if (level.name != "DummyBuffer" && level.name != "shared_glb" && level.name != "GlobalBuffer" &&
        level.name != "DRAM") {
      continue;
    }
    for (LoopConstraint& loops : level.constraints.loops) {
      if (!loops.dims || loops.dims->empty()) continue;
      loops.dims->push_back("G");
      if (loops.order) loops.order->push_back("G");
    }
  }
  return arch;
}

// The depthwise layers with one channel a group.
std::vector<ConvShape> grouped(const std::vector<ConvShape>& layers) {
  std::vector<ConvShape> result;
  for (ConvShape shape : layers) {
    if (shape.r == 1 || shape.c != shape.m) continue;
    shape.g = shape.c;
    shape.c = shape.m = 1;
    result.push_back(shape);
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  const auto arg = [&](int i, const char* otherwise) { return std::string(argc > i ? argv[i] : otherwise); };
  const Arch arch = arg(1, "eyeriss") == "simba" ? mixbit::test::simba() : mixbit::test::eyeriss();
  const std::map<std::string, Objective> objectives = {{"edp", Objective::kEdp},
                                                       {"energy", Objective::kEnergy},
                                                       {"delay", Objective::kDelay},
                                                       {"accesses", Objective::kLastLevelAccesses}};
  SearchOptions options;
  options.objective = objectives.at(arg(2, "edp"));
  const std::string method = arg(3, "bounded");
  options.method = method == "exhaustive" ? Method::kExhaustive : Method::kBounded;
  const bool all = arg(4, "one") == "all";
  options.threads = std::max(1, std::atoi(arg(5, "1").c_str()));
  WidthLists widths;
  for (auto& bits : widths.bits) bits = all ? std::vector<int>{2, 3, 4, 5, 8, 16} : std::vector<int>{8};
  if (method == "check") return check(arch, mixbit::test::mobilenet_v1(), widths, options) == 0 ? 0 : 1;
  if (method == "check_grouped") {
    return check(with_groups(arch), grouped(mixbit::test::mobilenet_v1()), widths, options) == 0 ? 0 : 1;
  }
  const size_t eights = all ? 4 * 36 + 4 * 6 + 4 : 0;

  double total = 0.0, energy = 0.0, edp = 0.0, space = 0.0, evaluated = 0.0;
  int64_t nodes = 0;
  const std::clock_t cpu = std::clock();
  std::map<ShapeKey, SweepResult> known;
  for (const ConvShape& shape : mixbit::test::mobilenet_v1()) {
    const auto key = key_of(shape);
    if (!known.contains(key)) {
      const auto start = std::chrono::steady_clock::now();
      const SweepResult& r = known[key] = sweep(arch, conv(shape), widths, options);
      total += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      space += r.certificate.total;
      evaluated += r.certificate.evaluated;
      nodes += r.certificate.nodes;
    }
    const SweepResult& r = known[key];
    const Evaluation& e = r.found[static_cast<size_t>(r.index[eights])].evaluation;
    energy += e.energy_pj / 1e6;
    edp += e.edp;
  }
  std::printf("%.4f s (%.4f s of CPU), %.4g mappings, %.4g evaluated, %ld nodes; 8/8/8: %.1f uJ, EDP %.1f\n", total,
              static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC, space, evaluated, nodes, energy, edp);
}
