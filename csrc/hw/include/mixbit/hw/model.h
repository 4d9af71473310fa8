#pragma once

// The cost of one mapping, in closed form: docs/mapper.md has the formulas and where they come from.

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <mixbit/hw/arch.h>
#include <mixbit/hw/mapping.h>
#include <mixbit/hw/workload.h>

namespace mixbit::hw {

// How a level counts what it asks of its parent. v3 is the model of the published quantization study; v4 the later
// one: a step that does not move a tile leaves the reference stride alone, and first fills of outputs are elided.
enum class Semantics { kV3, kV4 };

// What a step to the next tile saves. kSampled: the overlap counts where the tile moves as with the first loop ("same
// stride"), else the tile is fetched whole; inner loops are taken to have moved one step when they wrap, as the peer
// samples them. kWalked: the same with the true displacement. kWindow: the true displacement, and every overlap counts.
enum class Reuse { kSampled, kWalked, kWindow };

// Bits of an element of each tensor; 0: one element a word of whatever memory.
struct Widths {
  std::array<int, kTensors> bits = {};
  int partial_bits = 0;  // of Outputs below the outermost level; 0: as bits[kOutputs]
};

struct ModelOptions {
  Semantics semantics = Semantics::kV3;
  Reuse reuse = Reuse::kSampled;
  bool scale_mac = false;  // use Arch::mac_scaling
};

// floor(word_bits / bits); 1 where bits is 0. Throws where an element does not fit a word.
int64_t operands_per_word(int64_t word_bits, int bits);

// Words that n elements take.
constexpr int64_t words(int64_t n, int64_t operands) { return (n + operands - 1) / operands; }

// [levels][tensors]; throws, naming level and tensor, where a width exceeds a word.
std::vector<std::array<int64_t, kTensors>> packing(const Arch& arch, const Widths& widths);

// Energy of one multiply-accumulate in pJ.
double mac_energy(const Arch& arch, const Widths& widths, const ModelOptions& options);

// Counts of one instance of a level in words, partition in elements.
struct TensorCounts {
  bool kept = false;
  int64_t tile_words = 0;
  int64_t operands_per_word = 1;
  int64_t partition = 0;  // elements that an instance ever sees
  int64_t instances = 0;
  int64_t reads = 0;
  int64_t updates = 0;
  int64_t fills = 0;
  double energy_pj = 0.0;  // of all instances
};

struct LevelCounts {
  int64_t cycles = 0;
  std::array<TensorCounts, kTensors> tensors;
};

struct Evaluation {
  double energy_pj = 0.0;
  int64_t cycles = 0;
  double edp = 0.0;                 // J * cycle
  int64_t last_level_accesses = 0;  // words read, updated and filled at the outermost level
  int64_t macs = 0;
  double mac_energy_pj = 0.0;
  int64_t utilized_instances = 0;  // of MACs
  double utilization = 0.0;        // macs / (MAC instances * cycles)
  std::vector<LevelCounts> levels;
};

// Cycles of a level that moves these words (of one instance) while `cycles` steps are computed.
int64_t throttled_cycles(const Level& level, int64_t cycles, const std::array<double, kTensors>& read_words,
                         const std::array<double, kTensors>& written_words);

// Accesses that are paid for where `used_instances` of a level work: clusters share theirs.
double paid_instances(const Level& level, int64_t used_instances);

// Energy of the accesses (not words) of one instance, times what paid_instances gives.
inline double access_energy(const Level& level, double reads, double updates, double fills, double instances) {
  return instances * (reads * level.read_pj + (updates + fills) * level.write_pj);
}

// A mapping of the layer that exceeds a fan-out or the size of a level.
class DoesNotFit : public std::invalid_argument {
 public:
  enum class Limit { kFanout, kCapacity };
  DoesNotFit(Limit what, const std::string& message) : std::invalid_argument(message), limit(what) {}
  Limit limit;
};

// Throws std::invalid_argument where the mapping is not one of this architecture and layer: factors that do not
// multiply to a bound, loops over the fan-out, tiles over the size (level, tensors and words named), a tensor kept
// nowhere.
Evaluation evaluate(const Arch& arch, const Layer& layer, const Mapping& mapping, const Widths& widths,
                    const ModelOptions& options = {});

}  // namespace mixbit::hw
