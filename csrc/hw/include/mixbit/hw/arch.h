#pragma once

// A spatial accelerator: storage levels from the MACs outwards, and what a mapping may do at each.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <mixbit/hw/workload.h>

namespace mixbit::hw {

// A place where loops can stand at a level.
enum LoopKind { kSpatialX = 0, kSpatialY = 1, kTemporal = 2 };
inline constexpr int kLoopKinds = 3;
inline constexpr std::array<const char*, kLoopKinds> kLoopKindNames = {"spatial_x", "spatial_y", "temporal"};

// Stands for the whole bound of a dimension.
inline constexpr int64_t kWholeDim = 0;

struct LoopConstraint {
  std::optional<std::vector<std::string>> dims = {};  // the only dimensions with factors above 1; absent: all of them
  std::map<std::string, int64_t> factors = {};        // fixed factors; kWholeDim: the whole bound
  std::map<std::string, int64_t> max_factors = {};    // largest factor
  // Order inner to outer, kAnyOrder where the dimensions not named stand, in any order; without it they stand outside.
  // Absent: any order. Of meaning to temporal loops only: the order of spatial loops changes nothing.
  std::optional<std::vector<std::string>> order = {};
};
inline constexpr const char* kAnyOrder = "*";

struct LevelConstraints {
  std::array<std::optional<bool>, kTensors> keep;  // absent: the search decides
  std::array<LoopConstraint, kLoopKinds> loops;
};

struct Level {
  std::string name;
  std::optional<int64_t> size = {};      // words of one instance; absent: unlimited
  int64_t word_bits = 16;                //
  int64_t block = 1;                     // words of one access
  int64_t cluster = 1;                   // instances that share one access
  int64_t mesh_x = 1, mesh_y = 1;        // instances = mesh_x * mesh_y
  std::optional<double> read_bw = {};    // words a cycle and instance; absent: unlimited
  std::optional<double> write_bw = {};   //
  std::optional<double> shared_bw = {};  // reads and writes together
  double read_pj = 0.0;                  // of one access
  double write_pj = 0.0;                 // of one access, fills and updates alike
  LevelConstraints constraints = {};

  int64_t instances() const { return mesh_x * mesh_y; }
};

// Energy of a multiply-accumulate as a function of its operand widths:
// multiplier_pj * act * weight / reference_bits^2 + adder_pj * max(act, weight) / reference_bits.
struct MacScaling {
  double multiplier_pj = 0.0;
  double adder_pj = 0.0;
  double reference_bits = 32.0;
};

struct Arch {
  double mac_pj = 0.0;
  int64_t mac_mesh_x = 1, mac_mesh_y = 1;
  std::optional<MacScaling> mac_scaling;
  std::vector<Level> levels;  // innermost first

  int64_t mac_instances() const { return mac_mesh_x * mac_mesh_y; }
  // Instances below one instance of the level in each direction: of the next inner level, or of the MACs.
  int64_t fanout_x(int level) const;
  int64_t fanout_y(int level) const;
  int level(const std::string& name) const;  // throws if there is no such level
};

// Throws std::invalid_argument, naming level and field, where a value is out of range, names repeat, meshes do not
// divide each other, or a constraint contradicts itself.
void check(const Arch& arch);

}  // namespace mixbit::hw
