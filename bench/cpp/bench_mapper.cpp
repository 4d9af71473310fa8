// The mapper on MobileNetV1 (28 layers, 20 different shapes, depthwise as full convolutions): seconds, nodes and sums
// of the optima. "check" runs the bounded search and the exhaustive one and compares the optimum of every class.
// Usage: bench_mapper [eyeriss|simba] [edp|energy|delay|accesses] [bounded|exhaustive|check] [one|all] [THREADS]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <string>
#include <tuple>

#include <mixbit/hw/search.h>

#include "reference.h"

using namespace mixbit::hw;

namespace {

double objective_of(const Evaluation& e, Objective objective) {
  switch (objective) {
    case Objective::kEnergy:
      return e.energy_pj;
    case Objective::kDelay:
      return static_cast<double>(e.cycles);
    case Objective::kEdp:
      return e.edp;
    default:
      return static_cast<double>(e.last_level_accesses);
  }
}

// Classes whose optima differ by more than rounding.
int differences(const SweepResult& a, const SweepResult& b, Objective objective) {
  if (a.index != b.index) return static_cast<int>(a.index.size());
  int count = 0;
  for (size_t i = 0; i < a.found.size(); ++i) {
    const double x = objective_of(a.found[i].evaluation, objective), y = objective_of(b.found[i].evaluation, objective);
    count += std::abs(x - y) > 1e-12 * y;
  }
  return count;
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
  const size_t eights = all ? 4 * 36 + 4 * 6 + 4 : 0;

  double total = 0.0, energy = 0.0, edp = 0.0, space = 0.0, evaluated = 0.0;
  int64_t nodes = 0, wrong = 0;
  const std::clock_t cpu = std::clock();
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>, SweepResult> known;
  for (const ConvShape& shape : mixbit::test::mobilenet_v1()) {
    const auto key = std::make_tuple(shape.c, shape.m, shape.r, shape.p, shape.w_stride);
    if (!known.contains(key)) {
      const auto start = std::chrono::steady_clock::now();
      const SweepResult& r = known[key] = sweep(arch, conv(shape), widths, options);
      total += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      space += r.certificate.total;
      evaluated += r.certificate.evaluated;
      nodes += r.certificate.nodes;
      if (method == "check") {
        SearchOptions full = options;
        full.method = Method::kExhaustive;
        const int here = differences(r, sweep(arch, conv(shape), widths, full), options.objective);
        wrong += here;
        std::printf("C %ld M %ld R %ld P %ld: %d of %ld classes differ\n", shape.c, shape.m, shape.r, shape.p, here,
                    r.classes);
        std::fflush(stdout);
      }
    }
    const SweepResult& r = known[key];
    const Evaluation& e = r.found[static_cast<size_t>(r.index[eights])].evaluation;
    energy += e.energy_pj / 1e6;
    edp += e.edp;
  }
  std::printf("%.4f s (%.4f s of CPU), %.4g mappings, %.4g evaluated, %ld nodes; 8/8/8: %.1f uJ, EDP %.1f\n", total,
              static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC, space, evaluated, nodes, energy, edp);
  return wrong == 0 ? 0 : 1;
}
