// Times layers on request, so that bench/bench_runtime.py can measure other engines in between. Each line of the input
//   SIZE INPUTS OUTPUTS KERNEL STRIDE GROUPS ACT_BITS SIGNED_ACT WEIGHT_BITS ISA COPIES REPEATS
// is answered with the smallest seconds of REPEATS calls. The layers are kept for later requests. With several COPIES
// each call takes the next one: its weights and activations have left the caches when there are enough.

#include <chrono>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "runtime_layers.h"

namespace {

struct Copies {
  std::vector<mixbit::bench::LayerRun> runs;
  size_t next = 0;
};

}  // namespace

int main() {
  using Clock = std::chrono::steady_clock;
  std::map<std::string, Copies> layers;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream fields(line);
    int64_t size, inputs, outputs, kernel, stride, groups;
    int32_t act_bits, weight_bits, copies, repeats;
    bool signed_act;
    std::string isa_text;
    mixbit::Isa isa;
    if (!(fields >> size >> inputs >> outputs >> kernel >> stride >> groups >> act_bits >> signed_act >> weight_bits >>
          isa_text >> copies >> repeats) ||
        !mixbit::runtime::parse_isa(isa_text.c_str(), &isa)) {
      std::cerr << "time_runtime_layers: cannot read '" << line << "'\n";
      return 2;
    }
    Copies& layer = layers[line.substr(0, line.rfind(' '))];
    if (layer.runs.empty()) {
      const auto shape =
          mixbit::bench::square_layer(size, inputs, outputs, kernel, stride, groups, act_bits, signed_act, weight_bits);
      for (int32_t i = 0; i < copies; ++i) {
        layer.runs.emplace_back(shape, mixbit::runtime::kernels(isa));
      }
    }
    double best = 1e9;
    for (int32_t i = 0; i < repeats; ++i) {
      auto& run = layer.runs[layer.next++ % layer.runs.size()];
      const auto start = Clock::now();
      run();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::cout << best << std::endl;
  }
}
