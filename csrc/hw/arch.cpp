#include <mixbit/hw/arch.h>

#include <algorithm>
#include <set>

#include "text.h"

namespace mixbit::hw {

int64_t Arch::fanout_x(int level) const {
  return (level == 0 ? mac_mesh_x : levels[level - 1].mesh_x) / levels[level].mesh_x;
}

int64_t Arch::fanout_y(int level) const {
  return (level == 0 ? mac_mesh_y : levels[level - 1].mesh_y) / levels[level].mesh_y;
}

int Arch::level(const std::string& name) const {
  std::vector<std::string> names;
  for (size_t l = 0; l < levels.size(); ++l) {
    if (levels[l].name == name) return static_cast<int>(l);
    names.push_back(levels[l].name);
  }
  fail("level ", name, " is not one of this architecture's: ", joined(names));
}

namespace {

void check_order(const std::string& where, const std::vector<std::string>& order) {
  if (std::set<std::string>(order.begin(), order.end()).size() != order.size()) {
    fail(where, ": order names one dimension twice: ", joined(order));
  }
}

// Beyond these no count or sum could overflow, for layers that check(Layer) lets through.
constexpr int64_t kMostWords = int64_t{1} << 48;
constexpr int64_t kMostInARow = int64_t{1} << 24;
constexpr double kMostNumber = 1e15;      // pJ, words a cycle, bits
constexpr double kLeastBandwidth = 1e-6;  // words a cycle

bool is_energy(double value) { return value >= 0.0 && value <= kMostNumber; }

void check_level(const Level& level) {
  const std::string where = "architecture: level " + level.name;
  const auto from_one_to = [&](int64_t most, const char* field, int64_t value) {
    if (value < 1 || value > most) fail(where, ": ", field, " is ", value, ", expected at least 1 and at most ", most);
  };
  const auto bandwidth = [&](const char* field, const std::optional<double>& value) {
    if (value && !(*value >= kLeastBandwidth && *value <= kMostNumber)) {
      fail(where, ": ", field, " is ", *value, ", expected at least ", kLeastBandwidth, " and at most ", kMostNumber,
           ", or none for no limit");
    }
  };
  if (level.size) from_one_to(kMostWords, "size", *level.size);
  from_one_to(kMostWords, "word_bits", level.word_bits);
  from_one_to(kMostWords, "block", level.block);
  from_one_to(kMostWords, "cluster", level.cluster);
  from_one_to(kMostInARow, "meshX", level.mesh_x);
  from_one_to(kMostInARow, "meshY", level.mesh_y);
  if (level.instances() % level.cluster != 0) {
    fail(where, ": cluster is ", level.cluster, ", expected a divisor of its ", level.instances(), " instances");
  }
  bandwidth("read_bw", level.read_bw);
  bandwidth("write_bw", level.write_bw);
  bandwidth("shared_bw", level.shared_bw);
  for (const double energy : {level.read_pj, level.write_pj}) {
    if (!is_energy(energy)) {
      fail(where, ": Er or Ew is ", energy, ", expected picojoules of at least 0 and at most ", kMostNumber);
    }
  }
  for (int kind = 0; kind < kLoopKinds; ++kind) {
    const LoopConstraint& loops = level.constraints.loops[kind];
    const std::string place = where + ": constraints." + kLoopKindNames[kind];
    for (const auto& [dim, factor] : loops.factors) {
      if (factor < 0) fail(place, ": the factor of ", dim, " is ", factor, ", expected 0 (the whole bound) or more");
      if (loops.max_factors.contains(dim)) fail(place, ": ", dim, " has both a factor and a largest factor");
    }
    for (const auto& [dim, factor] : loops.max_factors) {
      if (factor < 1) fail(place, ": the largest factor of ", dim, " is ", factor, ", expected at least 1");
    }
    if (loops.order) check_order(place, *loops.order);
  }
}

}  // namespace

void check(const Arch& arch) {
  if (arch.levels.empty()) fail("architecture: no levels, expected at least one");
  if (!is_energy(arch.mac_pj)) {
    fail("architecture: the energy of a MAC is ", arch.mac_pj, ", expected picojoules of at least 0 and at most ",
         kMostNumber);
  }
  for (const int64_t mesh : {arch.mac_mesh_x, arch.mac_mesh_y}) {
    if (mesh < 1 || mesh > kMostInARow) {
      fail("architecture: a mesh of ", mesh, " MACs, expected at least one and at most ", kMostInARow, " in a row");
    }
  }
  if (const auto& scaling = arch.mac_scaling;
      scaling && !(scaling->reference_bits >= 1.0 && scaling->reference_bits <= kMostNumber &&
                   is_energy(scaling->multiplier_pj) && is_energy(scaling->adder_pj))) {
    fail(
        "architecture: mac scaling: expected reference_bits of at least 1, multiplier and adder of at least 0, all of ",
        "at most ", kMostNumber);
  }
  std::set<std::string> names;
  for (size_t l = 0; l < arch.levels.size(); ++l) {
    const Level& level = arch.levels[l];
    check_level(level);
    if (!names.insert(level.name).second) fail("architecture: two levels are named ", level.name);
    const int64_t below_x = l == 0 ? arch.mac_mesh_x : arch.levels[l - 1].mesh_x;
    const int64_t below_y = l == 0 ? arch.mac_mesh_y : arch.levels[l - 1].mesh_y;
    if (below_x % level.mesh_x != 0 || below_y % level.mesh_y != 0) {
      fail("architecture: level ", level.name, " is a mesh of ", level.mesh_x, " x ", level.mesh_y,
           ", expected divisors of the ", below_x, " x ", below_y, " below it");
    }
  }
}

}  // namespace mixbit::hw
