// The mapper on MobileNetV1 (28 layers, depthwise as full convolutions): seconds, nodes and sums of the optima.
// Usage: bench_mapper [eyeriss|simba] [edp|energy|delay|accesses] [bounded|exhaustive] [one|all] [THREADS]

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>

#include <mixbit/hw/search.h>

#include "reference.h"

int main(int argc, char** argv) {
  using namespace mixbit::hw;
  const auto arg = [&](int i, const char* otherwise) { return std::string(argc > i ? argv[i] : otherwise); };
  const Arch arch = arg(1, "eyeriss") == "simba" ? mixbit::test::simba() : mixbit::test::eyeriss();
  const std::map<std::string, Objective> objectives = {{"edp", Objective::kEdp},
                                                       {"energy", Objective::kEnergy},
                                                       {"delay", Objective::kDelay},
                                                       {"accesses", Objective::kLastLevelAccesses}};
  SearchOptions options;
  options.objective = objectives.at(arg(2, "edp"));
  options.method = arg(3, "bounded") == "exhaustive" ? Method::kExhaustive : Method::kBounded;
  const bool all = arg(4, "one") == "all";
  const bool verbose = arg(6, "") == "-v";
  options.threads = std::atoi(arg(5, "1").c_str());
  WidthLists widths;
  for (auto& bits : widths.bits) bits = all ? std::vector<int>{2, 3, 4, 5, 8, 16} : std::vector<int>{8};

  double total = 0.0, energy = 0.0, edp = 0.0, space = 0.0, evaluated = 0.0;
  int64_t nodes = 0;
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>, SweepResult> known;
  for (const ConvShape& shape : mixbit::test::mobilenet_v1()) {
    const auto key = std::make_tuple(shape.c, shape.m, shape.r, shape.p, shape.w_stride);
    if (!known.contains(key)) {
      const auto start = std::chrono::steady_clock::now();
      const SweepResult& r = known[key] = sweep(arch, conv(shape), widths, options);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      total += seconds;
      space += r.certificate.total;
      evaluated += r.certificate.evaluated;
      nodes += r.certificate.nodes;
      if (verbose) {
        std::printf("C %ld M %ld R %ld P %ld: %.4f s, %.4g mappings, %.4g evaluated, %.4g bound, %ld nodes, EDP %.4f\n",
                    shape.c, shape.m, shape.r, shape.p, seconds, r.certificate.total, r.certificate.evaluated,
                    r.certificate.bound_pruned, r.certificate.nodes, r.found.back().evaluation.edp);
      }
    }
    const SweepResult& r = known[key];
    const Evaluation& e = r.found[static_cast<size_t>(r.index[all ? 4 * (36 + 6 + 1) : 0])].evaluation;  // 8/8/8
    energy += e.energy_pj / 1e6;
    edp += e.edp;
  }
  std::printf("%.4f s, %.4g mappings, %.4g evaluated, %ld nodes; 8/8/8: %.1f uJ, EDP %.1f\n", total, space, evaluated,
              nodes, energy, edp);
  return 0;
}
