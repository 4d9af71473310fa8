#include <mixbit/hw/model.h>

#include <algorithm>
#include <cmath>

#include "nest.h"
#include "text.h"

namespace mixbit::hw {

int64_t operands_per_word(int64_t word_bits, int bits) {
  if (bits < 0) fail("bits: ", bits, ", expected at least 1, or 0 for the width of the memory");
  // Words of one bit mark a level without storage of its own.
  if (bits == 0 || word_bits == 1) return 1;
  if (bits > word_bits) fail("bits: an element of ", bits, " bits does not fit a word of ", word_bits);
  return word_bits / bits;
}

std::vector<std::array<int64_t, kTensors>> packing(const Arch& arch, const Widths& widths) {
  std::vector<std::array<int64_t, kTensors>> operands(arch.levels.size());
  for (size_t l = 0; l < arch.levels.size(); ++l) {
    for (const Tensor t : kAllTensors) {
      const bool partial = t == kOutputs && widths.partial_bits > 0 && l + 1 < arch.levels.size();
      const int bits = partial ? widths.partial_bits : widths.bits[t];
      if (bits > arch.levels[l].word_bits && arch.levels[l].word_bits > 1) {
        fail("bits: ", kTensorNames[t], " has ", bits, " bits, but level ", arch.levels[l].name, " has words of ",
             arch.levels[l].word_bits);
      }
      operands[l][t] = operands_per_word(arch.levels[l].word_bits, bits);
    }
  }
  return operands;
}

double mac_energy(const Arch& arch, const Widths& widths, const ModelOptions& options) {
  if (!options.scale_mac) return arch.mac_pj;
  if (!arch.mac_scaling) fail("scale_mac: the architecture's mac gives no scaling (multiplier and adder energies)");
  if (widths.bits[kInputs] == 0 || widths.bits[kWeights] == 0) {
    fail("scale_mac: expected widths of Inputs and Weights, came native words");
  }
  const MacScaling& scaling = *arch.mac_scaling;
  const double act = widths.bits[kInputs] / scaling.reference_bits;
  const double weight = widths.bits[kWeights] / scaling.reference_bits;
  return scaling.multiplier_pj * act * weight + scaling.adder_pj * std::max(act, weight);
}

namespace {

// Where cycles stop being counted: evaluate() refuses what is so slow.
constexpr double kMostCycles = static_cast<double>(int64_t{1} << 53);

}  // namespace

int64_t throttled_cycles(const Level& level, int64_t cycles, const std::array<double, kTensors>& read_words,
                         const std::array<double, kTensors>& written_words) {
  // Doubles in this order, not an integer ceil: the published counts come from it and differ by one at times.
  const auto steps = static_cast<double>(cycles);
  double reads = 0.0, writes = 0.0;
  for (const Tensor t : kAllTensors) {
    reads += read_words[t] / steps;
    writes += written_words[t] / steps;
  }
  double speed = 1.0;
  const auto limit = [&](const std::optional<double>& bandwidth, double demand) {
    if (bandwidth && demand > 0.0) speed = std::min(speed, *bandwidth / demand);
  };
  limit(level.read_bw, reads);
  limit(level.write_bw, writes);
  limit(level.shared_bw, reads + writes);
  return static_cast<int64_t>(std::min(std::ceil(steps / speed), kMostCycles));
}

double paid_instances(const Level& level, int64_t used_instances) {
  const auto used = static_cast<double>(used_instances);
  const double clusters = static_cast<double>(level.instances()) / static_cast<double>(level.cluster);
  return std::min(used, clusters);
}

namespace {

__extension__ using Wide = __int128;

// The nest of one mapping with what is known of it at each level.
class Nest {
 public:
  Nest(const Arch& arch, const Layer& layer, const Mapping& mapping, const ModelOptions& options)
      : arch_(arch),
        layer_(layer),
        mapping_(mapping),
        options_(options),
        levels_(static_cast<int>(arch.levels.size())) {
    check_shape();
    std::vector<int64_t> inside(layer.bounds.size(), 1);
    for (int l = 0; l < levels_; ++l) {
      spatial_.emplace_back();
      for (const auto* loops : {&mapping[l].spatial_x, &mapping[l].spatial_y}) {
        append(*loops, l, &inside, &spatial_.back());
      }
      append(mapping[l].temporal, l, &inside, &temporal_);
      cumulative_.push_back(inside);
    }
    for (size_t d = 0; d < layer.bounds.size(); ++d) {
      if (inside[d] != layer.bounds[d]) {
        fail("mapping: the factors of ", layer.dims[d], " multiply to ", inside[d], ", expected ", layer.bounds[d]);
      }
    }
    check_fanout();
  }

  int64_t steps() const {
    int64_t product = 1;
    for (const Placed& loop : temporal_) product *= loop.bound;
    return product;
  }

  // Instances used of one child array of a level, and of the level itself.
  int64_t children(int level) const {
    int64_t product = 1;
    for (const Placed& loop : spatial_[level]) product *= loop.bound;
    return product;
  }
  int64_t instances(int level) const {
    int64_t product = 1;
    for (int l = level + 1; l < levels_; ++l) product *= children(l);
    return product;
  }

  int64_t volume(int level, Tensor t) const { return volume(cumulative_[level], t); }

  // Elements that an instance of the level asks of its parent; level -1: that a MAC asks of its memory.
  int64_t requested_by(int level, Tensor t) const {
    if (level < 0) return steps();
    const RankVector extent = extents(cumulative_[level], t);
    std::vector<Step> around;
    for (const Placed& loop : temporal_) {
      if (loop.level > level) around.push_back(step(loop, t));
    }
    const auto run = [&]<Semantics s>() {
      const auto count = [&]<Reuse r>() {
        return requested<s, r>(around.data(), static_cast<int>(around.size()), extent, ranks(t), volume(level, t));
      };
      switch (options_.reuse) {
        case Reuse::kWalked:
          return count.template operator()<Reuse::kWalked>();
        case Reuse::kWindow:
          return count.template operator()<Reuse::kWindow>();
        default:
          return count.template operator()<Reuse::kSampled>();
      }
    };
    return options_.semantics == Semantics::kV3 ? run.template operator()<Semantics::kV3>()
                                                : run.template operator()<Semantics::kV4>();
  }

  int64_t distinct_children_of(int level, Tensor t) const {
    std::vector<Step> loops;
    for (const Placed& loop : spatial_[level]) loops.push_back(step(loop, t));
    return distinct_children(loops);
  }

  // [levels]: elements of the tensor that an instance ever sees.
  std::vector<int64_t> partitions(Tensor t) const {
    std::vector<int64_t> parts(levels_);
    parts.back() = volume(levels_ - 1, t);
    for (int l = levels_ - 2; l >= 0; --l) {
      std::vector<int64_t> spread = cumulative_[l];
      for (const Placed& loop : spatial_[l + 1]) spread[loop.dim] *= loop.bound;
      // Division of the product, as published; 128 bits, for both may be tensors of 2^48 elements.
      parts[l] = static_cast<int64_t>(Wide{parts[l + 1]} * volume(l, t) / volume(spread, t));
    }
    return parts;
  }

 private:
  struct Placed {
    int dim;
    int64_t bound;
    int64_t stride;  // product of the factors of the dimension inside this loop
    int level;
  };

  void append(const std::vector<Loop>& loops, int level, std::vector<int64_t>* inside, std::vector<Placed>* placed) {
    for (const Loop& loop : loops) {
      if (loop.factor > layer_.bounds[loop.dim] / (*inside)[loop.dim]) {
        fail("mapping: the factors of ", layer_.dims[loop.dim], " multiply to ",
             static_cast<double>(loop.factor) * static_cast<double>((*inside)[loop.dim]), ", expected ",
             layer_.bounds[loop.dim]);
      }
      if (loop.factor > 1) placed->push_back({loop.dim, loop.factor, (*inside)[loop.dim], level});
      (*inside)[loop.dim] *= loop.factor;
    }
  }

  void check_shape() const {
    if (static_cast<int>(mapping_.size()) != levels_) {
      fail("mapping: ", mapping_.size(), " levels, expected the architecture's ", levels_);
    }
    for (int l = 0; l < levels_; ++l) {
      const LevelMapping& at = mapping_[l];
      for (const auto* loops : {&at.temporal, &at.spatial_x, &at.spatial_y}) {
        for (const Loop& loop : *loops) {
          if (loop.dim < 0 || loop.dim >= static_cast<int>(layer_.dims.size())) {
            fail("mapping: level ", arch_.levels[l].name, " has a loop over dimension number ", loop.dim, " of ",
                 layer_.dims.size());
          }
          if (loop.factor < 1 || loop.factor > layer_.bounds[loop.dim]) {
            fail("mapping: level ", arch_.levels[l].name, ": the factor of ", layer_.dims[loop.dim], " is ",
                 loop.factor, ", expected 1 to ", layer_.bounds[loop.dim]);
          }
        }
      }
    }
    for (const Tensor t : kAllTensors) {
      if (std::none_of(mapping_.begin(), mapping_.end(), [&](const LevelMapping& at) { return at.keep[t]; })) {
        fail("mapping: no level keeps ", kTensorNames[t]);
      }
    }
  }

  void check_fanout() const {
    for (int l = 0; l < levels_; ++l) {
      const auto one = [&](const std::vector<Loop>& loops, int64_t fanout, const char* axis) {
        double product = 1.0;
        for (const Loop& loop : loops) product *= static_cast<double>(loop.factor);
        if (product > static_cast<double>(fanout)) {
          throw DoesNotFit(DoesNotFit::Limit::kFanout,
                           text("mapping: level ", arch_.levels[l].name, " spreads over ", product, " instances in ",
                                axis, ", but has a fan-out of ", fanout));
        }
      };
      one(mapping_[l].spatial_x, arch_.fanout_x(l), "X");
      one(mapping_[l].spatial_y, arch_.fanout_y(l), "Y");
    }
  }

  int ranks(Tensor t) const { return static_cast<int>(layer_.tensors[t].size()); }

  RankVector extents(const std::vector<int64_t>& factors, Tensor t) const {
    RankVector extent{};
    for (int r = 0; r < ranks(t); ++r) {
      extent[r] = 1;
      for (const Term& term : layer_.tensors[t][r]) extent[r] += term.coefficient * (factors[term.dim] - 1);
    }
    return extent;
  }

  int64_t volume(const std::vector<int64_t>& factors, Tensor t) const {
    const RankVector extent = extents(factors, t);
    int64_t product = 1;
    for (int r = 0; r < ranks(t); ++r) product *= extent[r];
    return product;
  }

  Step step(const Placed& loop, Tensor t) const {
    Step result{loop.bound, {}};
    for (int r = 0; r < ranks(t); ++r) {
      for (const Term& term : layer_.tensors[t][r]) {
        if (term.dim == loop.dim) result.move[r] += term.coefficient * loop.stride;
      }
    }
    return result;
  }

  const Arch& arch_;
  const Layer& layer_;
  const Mapping& mapping_;
  const ModelOptions& options_;
  int levels_;
  std::vector<Placed> temporal_;                  // inner to outer
  std::vector<std::vector<Placed>> spatial_;      // [levels]
  std::vector<std::vector<int64_t>> cumulative_;  // [levels][dims]: product of the factors at levels up to this one
};

void check_capacity(const Level& level, const LevelCounts& counts) {
  if (!level.size) return;
  int64_t needed = 0;
  std::string parts;
  for (const Tensor t : kAllTensors) {
    if (!counts.tensors[t].kept) continue;
    needed += counts.tensors[t].tile_words;
    parts += text(parts.empty() ? "" : " and ", counts.tensors[t].tile_words, " for ", kTensorNames[t]);
  }
  if (needed > *level.size) {
    throw DoesNotFit(DoesNotFit::Limit::kCapacity, text("mapping: level ", level.name, " needs ", needed, " words (",
                                                        parts, "), but has ", *level.size));
  }
}

}  // namespace

Evaluation evaluate(const Arch& arch, const Layer& layer, const Mapping& mapping, const Widths& widths,
                    const ModelOptions& options) {
  check(arch);
  check(layer);
  return evaluate_checked(arch, layer, mapping, widths, options);
}

Evaluation evaluate_checked(const Arch& arch, const Layer& layer, const Mapping& mapping, const Widths& widths,
                            const ModelOptions& options) {
  const auto operands = packing(arch, widths);
  const Nest nest(arch, layer, mapping, options);
  const int levels = static_cast<int>(arch.levels.size());
  const int64_t steps = nest.steps();

  Evaluation result;
  result.levels.resize(arch.levels.size());
  result.cycles = steps;
  result.macs = layer.macs();
  for (const Tensor t : kAllTensors) {
    const std::vector<int64_t> parts = nest.partitions(t);
    int outermost = levels - 1;
    while (!mapping[outermost].keep[t]) --outermost;
    int below = -1;       // nearest level inside that keeps the tensor
    int64_t fan_out = 1;  // distinct children of one instance of this level, down to `below`
    for (int l = 0; l < levels; ++l) {
      fan_out *= nest.distinct_children_of(l, t);
      if (!mapping[l].keep[t]) continue;
      TensorCounts& counts = result.levels[l].tensors[t];
      const int64_t content = nest.requested_by(below, t) * fan_out;
      int64_t fills = l == outermost ? 0 : nest.requested_by(l, t);
      if (t == kOutputs && options.semantics == Semantics::kV4) fills = std::max<int64_t>(0, fills - parts[l]);
      const auto packed = [&](int64_t n) { return words(n, operands[l][t]); };
      counts.kept = true;
      counts.operands_per_word = operands[l][t];
      counts.tile_words = packed(nest.volume(l, t));
      counts.partition = parts[l];
      counts.instances = nest.instances(l);
      counts.reads = packed(t == kOutputs ? std::max<int64_t>(0, content - parts[l]) : content);
      counts.updates = packed(t == kOutputs ? content : 0);
      counts.fills = packed(fills);
      const auto accesses = [&](int64_t n) { return static_cast<double>(words(n, arch.levels[l].block)); };
      counts.energy_pj = access_energy(arch.levels[l], accesses(counts.reads), accesses(counts.updates),
                                       accesses(counts.fills), paid_instances(arch.levels[l], counts.instances));
      below = l;
      fan_out = 1;
    }
  }
  for (int l = 0; l < levels; ++l) {
    LevelCounts& counts = result.levels[l];
    check_capacity(arch.levels[l], counts);
    std::array<double, kTensors> reads{}, writes{};
    for (const Tensor t : kAllTensors) {
      reads[t] = static_cast<double>(counts.tensors[t].reads);
      writes[t] = static_cast<double>(counts.tensors[t].updates + counts.tensors[t].fills);
      result.energy_pj += counts.tensors[t].energy_pj;
    }
    counts.cycles = throttled_cycles(arch.levels[l], steps, reads, writes);
    if (static_cast<double>(counts.cycles) >= kMostCycles) {
      fail("mapping: level ", arch.levels[l].name, " is so slow that it takes ", kMostCycles, " cycles or more");
    }
    result.cycles = std::max(result.cycles, counts.cycles);
  }
  for (const TensorCounts& counts : result.levels.back().tensors) {
    result.last_level_accesses +=
        (counts.reads + counts.updates + counts.fills) * std::max<int64_t>(1, counts.instances);
  }
  result.mac_energy_pj = static_cast<double>(result.macs) * mac_energy(arch, widths, options);
  result.energy_pj += result.mac_energy_pj;
  result.utilized_instances = nest.instances(-1);
  result.utilization =
      static_cast<double>(result.macs) / static_cast<double>(arch.mac_instances()) / static_cast<double>(result.cycles);
  result.edp = result.energy_pj * static_cast<double>(result.cycles) / 1e12;
  return result;
}

}  // namespace mixbit::hw
