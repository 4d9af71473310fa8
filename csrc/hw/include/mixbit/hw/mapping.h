#pragma once

// A loop nest on an architecture.

#include <array>
#include <cstdint>
#include <vector>

#include <mixbit/hw/workload.h>

namespace mixbit::hw {

struct Loop {
  int dim = 0;
  int64_t factor = 1;
};

// The spatial loops of a level stand inside its temporal loops and spread the level's tile over the instances below.
struct LevelMapping {
  std::array<bool, kTensors> keep = {};
  std::vector<Loop> temporal;  // inner to outer
  std::vector<Loop> spatial_x;
  std::vector<Loop> spatial_y;
};

using Mapping = std::vector<LevelMapping>;  // as Arch::levels

}  // namespace mixbit::hw
