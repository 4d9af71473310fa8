// Times layers on request, so that bench/bench_runtime.py can measure other engines in between. Each line of the input
//   SIZE INPUTS OUTPUTS KERNEL STRIDE GROUPS ACT_BITS SIGNED_ACT WEIGHT_BITS ISA COPIES REPEATS
// is answered with the smallest seconds of REPEATS calls. The layers are kept for later requests. With several COPIES
// of the weights each call takes the next one, which has left the nearer caches when there are enough.

#include <chrono>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "runtime_layers.h"

int main() {
  using Clock = std::chrono::steady_clock;
  std::map<std::string, mixbit::bench::LayerRun> layers;
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
        !mixbit::parse_isa(isa_text.c_str(), &isa)) {
      std::cerr << "time_runtime_layers: cannot read '" << line << "'\n";
      return 2;
    }
    const std::string key = line.substr(0, line.rfind(' '));
    auto found = layers.find(key);
    if (found == layers.end()) {
      const auto shape =
          mixbit::bench::square_layer(size, inputs, outputs, kernel, stride, groups, act_bits, signed_act, weight_bits);
      found = layers.try_emplace(key, shape, mixbit::runtime::kernels(isa), copies).first;
    }
    double best = 1e9;
    for (int32_t i = 0; i < repeats; ++i) {
      const auto start = Clock::now();
      found->second();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::cout << best << std::endl;
  }
}
