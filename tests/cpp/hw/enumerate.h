#pragma once

// Every mapping of a layer's space, one after the other: what the search is held against. No bounds, no dominance: it
// takes the space's definition (MapSpace) and the model's counting rules (nest.h), nothing of the search. Two mappings
// count as one where the model cannot tell them apart: where they differ in the place of loops over 1, which it drops,
// or where all counts that were computed for them are equal.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <mixbit/hw/mapspace.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/search.h>

#include "nest.h"

namespace mixbit::test {

inline constexpr std::array<hw::Objective, 4> kObjectives = {hw::Objective::kEnergy, hw::Objective::kDelay,
                                                             hw::Objective::kEdp, hw::Objective::kLastLevelAccesses};

inline double value(const hw::Evaluation& e, hw::Objective objective) {
  switch (objective) {
    case hw::Objective::kEnergy:
      return e.energy_pj;
    case hw::Objective::kDelay:
      return static_cast<double>(e.cycles);
    case hw::Objective::kEdp:
      return e.edp;
    default:
      return static_cast<double>(e.last_level_accesses);
  }
}

// hw::words() with the divisors that widths and blocks have known to the compiler, which then multiplies.
inline int64_t words_of(int64_t n, int64_t operands) {
  switch (operands) {
    case 1:
      return n;
    case 2:
      return hw::words(n, 2);
    case 3:
      return hw::words(n, 3);
    case 4:
      return hw::words(n, 4);
    case 5:
      return hw::words(n, 5);
    case 8:
      return hw::words(n, 8);
    case 16:
      return hw::words(n, 16);
    default:
      return hw::words(n, operands);
  }
}

// Vectors where the machine has them; additions, products and comparisons give the same bits anywhere.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define MIXBIT_TEST_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MIXBIT_TEST_WIDE
#endif

// What n combinations cost: value[objective][c], from what their tensors cost. Returns whether one of them is better
// than the best known, where equal values go to the lower energy, and equal energies to the fewer cycles.
struct Numbers {
  std::vector<double> mac, misfit, cycles;                         // +inf in misfit: does not fit
  std::array<std::vector<double>, hw::kTensors> energy, accesses;  // of each tensor
  std::array<std::vector<double>, 4> value, best, best_second;

  explicit Numbers(size_t n) {
    for (auto* v : {&mac, &misfit, &cycles}) v->assign(n, 0.0);
    for (auto* of : {&energy, &accesses}) of->fill(std::vector<double>(n, 0.0));
    value.fill(std::vector<double>(n, 0.0));
    for (auto* of : {&best, &best_second}) of->fill(std::vector<double>(n, std::numeric_limits<double>::infinity()));
  }

  static size_t second(size_t objective) { return objective == 0 ? 1 : 0; }

  MIXBIT_TEST_WIDE bool score() {
    const size_t n = mac.size();
    double *e = value[0].data(), *y = value[1].data(), *edp = value[2].data(), *a = value[3].data();
    for (size_t c = 0; c < n; ++c) {
      e[c] = ((mac[c] + energy[0][c]) + energy[1][c]) + energy[2][c] + misfit[c];
      y[c] = cycles[c] + misfit[c];
      edp[c] = e[c] * cycles[c];
      a[c] = (accesses[0][c] + accesses[1][c]) + accesses[2][c] + misfit[c];
    }
    int64_t better = 0;
    for (size_t o = 0; o < 4; ++o) {
      const double *first = value[o].data(), *then = value[second(o)].data();
      const double *known = best[o].data(), *known_second = best_second[o].data();
      for (size_t c = 0; c < n; ++c) {
        better |= int64_t{first[c] < known[c]} | (int64_t{first[c] == known[c]} & int64_t{then[c] < known_second[c]});
      }
    }
    return better != 0;
  }
};

class EveryMapping {
 public:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  struct Best {
    double first = kInfinity, second = kInfinity;  // the objective, and what decides among equals (search.h)
    std::shared_ptr<const hw::Mapping> mapping;
  };

  // `bits` of each tensor, combined with all of the others: combination (weights * inputs + input) * outputs + output.
  EveryMapping(const hw::Arch& arch, const hw::Layer& layer, const std::array<std::vector<int>, hw::kTensors>& bits,
               const hw::ModelOptions& options = {})
      : space_(arch, layer), arch_(arch), layer_(layer), options_(options) {
    std::vector<double> mac;
    for (const hw::Tensor t : hw::kAllTensors) {
      for (const int b : bits[t]) {
        hw::Widths alone;
        alone.bits[t] = b;
        per_word_[t].push_back({});
        for (const auto& level : hw::packing(arch, alone)) per_word_[t].back().push_back(level[t]);
      }
    }
    for (const int w : bits[hw::kWeights]) {
      for (const int i : bits[hw::kInputs]) {
        for (const int o : bits[hw::kOutputs]) {
          widths_.push_back({{w, i, o}});
          mac.push_back(static_cast<double>(layer.macs()) * hw::mac_energy(arch, widths_.back(), options));
        }
      }
    }
    for (auto& of_objective : best_) of_objective.resize(widths_.size());
    numbers_ = Numbers(widths_.size());
    numbers_.mac = mac;
    valid_.assign(widths_.size(), 0.0);
    for (int d = 0; d < dims(); ++d) choices_.push_back(space_.factorizations(d).all(layer.bounds[d]));
    cumulative_.assign(arch.levels.size(), std::vector<int64_t>(layer.dims.size()));
    for (const hw::KeepChoice& keep : space_.keeps()) {
      keep_ = &keep;
      choose(0);
    }
    confirm_optima();
  }

  size_t combinations() const { return widths_.size(); }
  const hw::Widths& widths(size_t combination) const { return widths_[combination]; }
  // Where SweepResult::index has a combination: its order is inputs, weights, outputs.
  size_t index_in_sweep(size_t combination) const {
    const size_t outputs = per_word_[hw::kOutputs].size(), inputs = per_word_[hw::kInputs].size();
    const size_t o = combination % outputs, i = combination / outputs % inputs, w = combination / outputs / inputs;
    return (i * per_word_[hw::kWeights].size() + w) * outputs + o;
  }
  // [combination]; +inf where nothing fits.
  const std::vector<Best>& best(hw::Objective objective) const { return best_[static_cast<size_t>(objective)]; }
  // Mappings that fit a combination of widths.
  double valid(size_t combination) const { return valid_[combination]; }

  double total = 0.0;             // mappings visited
  double fanout_invalid = 0.0;    //
  double capacity_invalid = 0.0;  // that fit no combination
  double priced = 0.0;            // loop nests whose counts were computed
  double distinct = 0.0;          // of these, with counts that no other order of their factors has

 private:
  int dims() const { return space_.dims(); }
  int levels() const { return space_.levels(); }

  // Factors of one dimension after the other, at all places at once.
  void choose(int dim) {
    if (dim == dims()) return visit();
    for (const std::vector<int64_t>& factors : choices_[dim]) {
      chosen_[dim] = factors.data();
      choose(dim + 1);
    }
  }

  int64_t factor(int dim, hw::LoopKind kind, int level) const { return chosen_[dim][kind * levels() + level]; }

  // All factors are chosen.
  void visit() {
    total += space_.orders();
    for (int l = 0; l < levels(); ++l) {
      int64_t x = 1, y = 1;
      for (int d = 0; d < dims(); ++d) x *= factor(d, hw::kSpatialX, l), y *= factor(d, hw::kSpatialY, l);
      if (x > arch_.fanout_x(l) || y > arch_.fanout_y(l)) {
        fanout_invalid += space_.orders();
        return;
      }
      children_[l] = x * y;
    }
    steps_ = 1;
    for (int d = 0; d < dims(); ++d) {
      int64_t inside = 1;
      for (int l = 0; l < levels(); ++l) {
        before_spatial_[l][d] = inside;
        inside *= factor(d, hw::kSpatialX, l) * factor(d, hw::kSpatialY, l);
        before_temporal_[l][d] = inside;
        inside *= factor(d, hw::kTemporal, l);
        steps_ *= factor(d, hw::kTemporal, l);
        cumulative_[l][d] = inside;
      }
    }
    for (const hw::Tensor t : hw::kAllTensors) {
      for (int l = 0; l < levels(); ++l) volume_[l][t] = volume(cumulative_[l], t, &extent_[l][t]);
    }
    if (!fits()) {
      capacity_invalid += space_.orders();
      return;
    }
    instances_[levels() - 1] = 1;
    for (int l = levels() - 1; l > 0; --l) instances_[l - 1] = instances_[l] * children_[l];
    for (const hw::Tensor t : hw::kAllTensors) spread(t);
    seen_.clear();
    place(levels() - 1, kMost);
  }

  int64_t volume(const std::vector<int64_t>& factors, hw::Tensor t, hw::RankVector* extent) const {
    int64_t product = 1;
    for (size_t r = 0; r < layer_.tensors[t].size(); ++r) {
      int64_t& here = (*extent)[r] = 1;
      for (const hw::Term& term : layer_.tensors[t][r]) here += term.coefficient * (factors[term.dim] - 1);
      product *= here;
    }
    return product;
  }

  // Which combinations fit; false where none does.
  bool fits() {
    std::vector<double>& misfit = numbers_.misfit;
    std::fill(misfit.begin(), misfit.end(), 0.0);
    for (int l = 0; l < levels(); ++l) {
      if (!arch_.levels[l].size) continue;
      const int64_t size = *arch_.levels[l].size;
      std::array<std::vector<int64_t>, hw::kTensors>& words = scratch_words_;
      int64_t least = 0, most = 0;
      for (const hw::Tensor t : hw::kAllTensors) {
        words[t].assign(per_word_[t].size(), 0);
        if (!(*keep_)[l][t]) continue;
        for (size_t c = 0; c < words[t].size(); ++c) words[t][c] = words_of(volume_[l][t], per_word_[t][c][l]);
        least += *std::min_element(words[t].begin(), words[t].end());
        most += *std::max_element(words[t].begin(), words[t].end());
      }
      if (least > size) return false;
      if (most <= size) continue;
      size_t index = 0;
      for (const int64_t w : words[hw::kWeights]) {
        for (const int64_t i : words[hw::kInputs]) {
          for (const int64_t o : words[hw::kOutputs]) {
            if (w + i + o > size) misfit[index] = kInfinity;
            ++index;
          }
        }
      }
    }
    bool any = false;
    for (size_t c = 0; c < misfit.size(); ++c) {
      if (misfit[c] != 0.0) continue;
      any = true;
      valid_[c] += space_.orders();
    }
    return any;
  }

  hw::RankVector move(hw::Tensor t, int dim, int64_t stride) const {
    hw::RankVector result{};
    for (size_t r = 0; r < layer_.tensors[t].size(); ++r) {
      for (const hw::Term& term : layer_.tensors[t][r]) {
        if (term.dim == dim) result[r] += term.coefficient * stride;
      }
    }
    return result;
  }

  // Distinct children and partitions of the levels.
  void spread(hw::Tensor t) {
    partition_[levels() - 1][t] = volume_[levels() - 1][t];
    for (int l = 0; l < levels(); ++l) {
      distinct_[l][t] = 1;
      if (children_[l] == 1) continue;
      std::vector<hw::Step>& loops = scratch_steps_;
      loops.clear();
      for (const hw::LoopKind kind : {hw::kSpatialX, hw::kSpatialY}) {
        for (int d = 0; d < dims(); ++d) {
          if (factor(d, kind, l) == 1) continue;
          // A dimension in both directions: Y stands outside X.
          const int64_t inside = kind == hw::kSpatialY ? factor(d, hw::kSpatialX, l) : 1;
          loops.push_back({factor(d, kind, l), move(t, d, before_spatial_[l][d] * inside)});
        }
      }
      distinct_[l][t] = hw::distinct_children(loops);
    }
    for (int l = levels() - 2; l >= 0; --l) {
      partition_[l][t] = partition_[l + 1][t];
      if (children_[l + 1] == 1) continue;
      hw::RankVector unused;
      std::vector<int64_t> wide = cumulative_[l];
      for (int d = 0; d < dims(); ++d) {
        wide[d] *= factor(d, hw::kSpatialX, l + 1) * factor(d, hw::kSpatialY, l + 1);
      }
      __extension__ using Wide = __int128;
      partition_[l][t] = static_cast<int64_t>(Wide{partition_[l + 1][t]} * volume_[l][t] / volume(wide, t, &unused));
    }
  }

  // Orders of the loops of `level`, then of the levels inside it. The loops outside stand from `begin` on, inner to
  // outer.
  void place(int level, int begin) {
    // What a tile of this level asks of the levels outside does not depend on orders further in.
    for (const hw::Tensor t : hw::kAllTensors) {
      if ((*keep_)[level][t]) asked_[level][t] = ask(level, t, begin);
    }
    if (level == 0) return price(begin);
    const hw::LoopOrder& order = space_.order(level);
    std::vector<int>& free = free_[level];
    free.clear();
    for (const int d : order.free) {
      if (factor(d, hw::kTemporal, level) > 1) free.push_back(d);
    }
    std::sort(free.begin(), free.end());
    do {
      int at = begin;
      const auto put = [&](int d) {
        const int64_t bound = factor(d, hw::kTemporal, level);
        if (bound == 1) return;
        loops_[--at] = {level, d};
        for (const hw::Tensor t : hw::kAllTensors) {
          steps_of_[t][at] = {bound, move(t, d, before_temporal_[level][d])};
        }
      };
      std::for_each(order.after.rbegin(), order.after.rend(), put);
      std::for_each(free.rbegin(), free.rend(), put);
      std::for_each(order.before.rbegin(), order.before.rend(), put);
      place(level - 1, at);
    } while (std::next_permutation(free.begin(), free.end()));
  }

  int64_t ask(int level, hw::Tensor t, int begin) const {
    const hw::Step* steps = steps_of_[t].data() + begin;
    const int ranks = static_cast<int>(layer_.tensors[t].size());
    const auto run = [&]<hw::Semantics semantics>() {
      return hw::requested<semantics, hw::Reuse::kSampled>(steps, kMost - begin, extent_[level][t], ranks,
                                                           volume_[level][t]);
    };
    return options_.semantics == hw::Semantics::kV3 ? run.template operator()<hw::Semantics::kV3>()
                                                    : run.template operator()<hw::Semantics::kV4>();
  }

  // All loops stand.
  void price(int begin) {
    priced += 1.0;
    Asked& asked = asked_;
    for (int l = 0; l < levels(); ++l) {
      for (const hw::Tensor t : hw::kAllTensors) {
        if (!(*keep_)[l][t]) asked[l][t] = 0;
      }
    }
    if (std::find(seen_.begin(), seen_.end(), asked) != seen_.end()) return;
    distinct += 1.0;
    for (const hw::Tensor t : hw::kAllTensors) {
      if (!seen_.empty()) {
        const Asked& last = seen_.back();
        bool same = true;
        for (int l = 0; l < levels(); ++l) same &= last[l][t] == asked[l][t];
        if (same) continue;
      }
      price(t);
    }
    seen_.push_back(asked);
    price_cycles();
    if (numbers_.score()) take(begin);
    if (static_cast<int64_t>(distinct) % kSample == 0) confirm_sample(begin);
  }

  void take(int begin) {
    const auto here = std::make_shared<const hw::Mapping>(mapping(begin));
    for (size_t c = 0; c < widths_.size(); ++c) {
      for (size_t o = 0; o < kObjectives.size(); ++o) {
        const double first = numbers_.value[o][c], second = numbers_.value[Numbers::second(o)][c];
        double &known = numbers_.best[o][c], &known_second = numbers_.best_second[o][c];
        if (first > known || (first == known && second >= known_second)) continue;
        known = first;
        known_second = second;
        best_[o][c] = {first, second, here};
      }
    }
  }

  // Energy and accesses of one tensor, for all of its widths.
  void price(hw::Tensor t) {
    const size_t classes = per_word_[t].size();
    std::vector<double>&energy = class_energy_, &accesses = class_accesses_;
    energy.assign(classes, 0.0);
    accesses.assign(classes, 0.0);
    int outermost = levels() - 1;
    while (!(*keep_)[outermost][t]) --outermost;
    int64_t requests = steps_, fan_out = 1;
    for (int l = 0; l <= outermost; ++l) {
      fan_out *= distinct_[l][t];
      if (!(*keep_)[l][t]) continue;
      const hw::Level& level = arch_.levels[l];
      const int64_t content = requests * fan_out;
      const bool output = t == hw::kOutputs;
      const int64_t reads = output ? std::max<int64_t>(0, content - partition_[l][t]) : content;
      const int64_t updates = output ? content : 0;
      int64_t fills = l == outermost ? 0 : asked_[l][t];
      if (output && options_.semantics == hw::Semantics::kV4) fills = std::max<int64_t>(0, fills - partition_[l][t]);
      const double paid = hw::paid_instances(level, instances_[l]);
      for (size_t c = 0; c < classes; ++c) {
        const int64_t k = per_word_[t][c][l];
        const int64_t r = words_of(reads, k), u = words_of(updates, k), f = words_of(fills, k);
        const auto blocks = [&](int64_t n) { return static_cast<double>(words_of(n, level.block)); };
        energy[c] += hw::access_energy(level, blocks(r), blocks(u), blocks(f), paid);
        read_words_[l][t][c] = static_cast<double>(r);
        written_words_[l][t][c] = static_cast<double>(u + f);
        if (l + 1 == levels()) accesses[c] = static_cast<double>((r + u + f) * instances_[l]);
      }
      requests = asked_[l][t];
      fan_out = 1;
    }
    expand(t, energy, &numbers_.energy[t]);
    expand(t, accesses, &numbers_.accesses[t]);
  }

  void expand(hw::Tensor t, const std::vector<double>& by_class, std::vector<double>* flat) const {
    const size_t inside = t == hw::kOutputs  ? 1
                          : t == hw::kInputs ? per_word_[hw::kOutputs].size()
                                             : per_word_[hw::kInputs].size() * per_word_[hw::kOutputs].size();
    for (size_t first = 0; first < flat->size();) {
      for (const double each : by_class) {
        std::fill_n(flat->begin() + static_cast<std::ptrdiff_t>(first), inside, each);
        first += inside;
      }
    }
  }

  void price_cycles() {
    std::vector<double>& cycles = numbers_.cycles;
    std::fill(cycles.begin(), cycles.end(), static_cast<double>(steps_));
    for (int l = 0; l < levels(); ++l) {
      const hw::Level& level = arch_.levels[l];
      if (!level.read_bw && !level.write_bw && !level.shared_bw) continue;
      // Classes of tensors that the level does not keep share one number.
      std::array<size_t, hw::kTensors> count;
      for (const hw::Tensor t : hw::kAllTensors) count[t] = (*keep_)[l][t] ? per_word_[t].size() : 1;
      size_t index = 0;
      std::vector<double>& here = scratch_cycles_;
      here.clear();
      for (size_t w = 0; w < count[0]; ++w) {
        for (size_t i = 0; i < count[1]; ++i) {
          for (size_t o = 0; o < count[2]; ++o) {
            const std::array<size_t, hw::kTensors> c = {w, i, o};
            std::array<double, hw::kTensors> reads{}, writes{};
            for (const hw::Tensor t : hw::kAllTensors) {
              if (!(*keep_)[l][t]) continue;
              reads[t] = read_words_[l][t][c[t]];
              writes[t] = written_words_[l][t][c[t]];
            }
            here.push_back(static_cast<double>(hw::throttled_cycles(level, steps_, reads, writes)));
          }
        }
      }
      for (size_t w = 0; w < per_word_[0].size(); ++w) {
        for (size_t i = 0; i < per_word_[1].size(); ++i) {
          for (size_t o = 0; o < per_word_[2].size(); ++o, ++index) {
            const size_t at = ((count[0] > 1 ? w : 0) * count[1] + (count[1] > 1 ? i : 0)) * count[2];
            cycles[index] = std::max(cycles[index], here[at + (count[2] > 1 ? o : 0)]);
          }
        }
      }
    }
  }

  hw::Mapping mapping(int begin) const {
    hw::Mapping result(arch_.levels.size());
    for (int l = 0; l < levels(); ++l) {
      result[l].keep = (*keep_)[l];
      for (int d = 0; d < dims(); ++d) {
        if (factor(d, hw::kSpatialX, l) > 1) result[l].spatial_x.push_back({d, factor(d, hw::kSpatialX, l)});
        if (factor(d, hw::kSpatialY, l) > 1) result[l].spatial_y.push_back({d, factor(d, hw::kSpatialY, l)});
        if (l == 0 && factor(d, hw::kTemporal, 0) > 1) result[0].temporal.push_back({d, factor(d, hw::kTemporal, 0)});
      }
    }
    for (int i = begin; i < kMost; ++i) {
      result[loops_[i].level].temporal.push_back({loops_[i].dim, steps_of_[0][i].bound});
    }
    return result;
  }

  // evaluate() of the mapping at hand gives the same numbers.
  void confirm_sample(int begin) const {
    const size_t c = static_cast<size_t>(distinct) / kSample % widths_.size();
    if (numbers_.misfit[c] != 0.0) return;
    confirm(mapping(begin), c, numbers_.value[0][c], numbers_.value[1][c], numbers_.value[3][c]);
  }

  void confirm(const hw::Mapping& mapping, size_t c, double energy, double cycles, double accesses) const {
    const hw::Evaluation e = hw::evaluate(arch_, layer_, mapping, widths_[c], options_);
    if (std::abs(e.energy_pj - energy) > 1e-12 * energy || static_cast<double>(e.cycles) != cycles ||
        static_cast<double>(e.last_level_accesses) != accesses) {
      throw std::logic_error("enumeration: a mapping is priced at " + std::to_string(energy) + " pJ and " +
                             std::to_string(cycles) + " cycles, but evaluate() says " + std::to_string(e.energy_pj) +
                             " and " + std::to_string(e.cycles));
    }
  }

  void confirm_optima() const {
    for (const hw::Objective objective : kObjectives) {
      for (size_t c = 0; c < widths_.size(); ++c) {
        const Best& best = this->best(objective)[c];
        if (!best.mapping) continue;
        const hw::Evaluation e = hw::evaluate(arch_, layer_, *best.mapping, widths_[c], options_);
        const double scale = objective == hw::Objective::kEdp ? 1e-12 : 1.0;
        if (std::abs(value(e, objective) - best.first * scale) > 1e-12 * value(e, objective)) {
          throw std::logic_error("enumeration: an optimum that evaluate() does not confirm");
        }
      }
    }
  }

  static constexpr int kMost = 128;  // temporal loops above 1
  static constexpr int kMostLevels = 12, kMostDims = 12;
  static constexpr int64_t kSample = 10007;  // every so many distinct mappings, one is compared with evaluate()
  using Asked = std::array<std::array<int64_t, hw::kTensors>, kMostLevels>;  // elements that a tile asks from outside

  struct LoopAt {
    int level, dim;
  };

  hw::MapSpace space_;
  const hw::Arch& arch_;
  const hw::Layer& layer_;
  hw::ModelOptions options_;
  std::array<std::vector<std::vector<int64_t>>, hw::kTensors> per_word_;  // [classes][levels]
  std::vector<hw::Widths> widths_;
  std::vector<double> valid_;
  std::array<std::vector<Best>, 4> best_;
  Numbers numbers_{0};

  // The mapping at hand.
  const hw::KeepChoice* keep_ = nullptr;
  std::vector<std::vector<std::vector<int64_t>>> choices_;  // [dims]: factors by place
  std::array<const int64_t*, kMostDims> chosen_{};
  std::array<int64_t, kMostLevels> children_{}, instances_{};
  std::array<std::array<int64_t, kMostDims>, kMostLevels> before_spatial_{}, before_temporal_{};
  std::vector<std::vector<int64_t>> cumulative_;
  int64_t steps_ = 1;
  std::array<std::array<hw::RankVector, hw::kTensors>, kMostLevels> extent_{};
  Asked volume_{}, distinct_{}, partition_{}, asked_{};
  std::array<LoopAt, kMost> loops_{};
  std::array<std::array<hw::Step, kMost>, hw::kTensors> steps_of_{};
  std::array<std::vector<int>, kMostLevels> free_;
  std::vector<Asked> seen_;
  std::array<std::array<std::array<double, 32>, hw::kTensors>, kMostLevels> read_words_{}, written_words_{};
  std::vector<double> class_energy_, class_accesses_, scratch_cycles_;
  std::array<std::vector<int64_t>, hw::kTensors> scratch_words_;
  std::vector<hw::Step> scratch_steps_;
};

// Whether a sweep of the same widths found the optimum of this combination, and among equals of a whole number the one
// of the least energy.
inline bool agree(const hw::SweepResult& found, const EveryMapping& all, size_t combination, hw::Objective objective) {
  const auto& [first, second, mapping] = all.best(objective)[combination];
  const int64_t at = found.index[all.index_in_sweep(combination)];
  if (at < 0 || !mapping) return at < 0 && !mapping;
  const hw::Evaluation& e = found.found[static_cast<size_t>(at)].evaluation;
  const auto near = [](double a, double b) { return std::abs(a - b) <= 1e-12 * b; };
  switch (objective) {
    case hw::Objective::kEnergy:
      return near(e.energy_pj, first);
    case hw::Objective::kEdp:
      return near(e.edp, first * 1e-12);
    default:
      return value(e, objective) == first && near(e.energy_pj, second);
  }
}

}  // namespace mixbit::test
