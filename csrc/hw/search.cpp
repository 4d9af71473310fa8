#include <mixbit/hw/search.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "engine.h"
#include "nest.h"
#include "text.h"

namespace mixbit::hw {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls f(worker, i) for every i < n; workers are numbered below `threads`.
template <typename F>
void parallel_for(size_t n, int threads, const F& f) {
  std::atomic<size_t> next{0};
  const auto work = [&](int worker) {
    for (size_t i = next++; i < n; i = next++) f(worker, i);
  };
  std::vector<std::jthread> helpers;
  const int useful = static_cast<int>(std::min<size_t>(n, static_cast<size_t>(threads)));
  for (int worker = 1; worker < useful; ++worker) helpers.emplace_back(work, worker);
  work(0);
}

// A mapping by what was decided.
struct Place {
  size_t unit = 0;
  std::array<int32_t, kMaxDims> choice{};
  std::vector<SlotOrder> orders;  // of levels with an order to choose; empty: none
  bool operator==(const Place&) const = default;
};

// What the objectives make of a mapping: lower is better, in this order.
struct Score {
  double first = kInfinity, second = kInfinity;
  bool operator<(const Score& other) const {
    return first < other.first || (first == other.first && second < other.second);
  }
};

template <Objective objective>
inline Score score(double energy, double cycles, double accesses) {
  // Energy is +inf where the mapping does not fit, and so is the score.
  const double fits = energy < kInfinity ? 0.0 : kInfinity;
  switch (objective) {
    case Objective::kEnergy:
      return {energy, cycles};
    case Objective::kDelay:
      return {cycles + fits, energy};
    case Objective::kEdp:
      return {energy * cycles, energy};
    default:
      return {accesses + fits, energy};
  }
}

// Calls f(combination, score) for every combination of width classes.
template <Objective objective, typename F>
void for_scores(const Engine& engine, const Cost& cost, const F& f) {
  const WidthClasses& classes = engine.classes;
  const int weights = classes.tensors[kWeights].count, inputs = classes.tensors[kInputs].count;
  const int outputs = classes.tensors[kOutputs].count;
  const double macs = engine.macs;
  const double* cycles = cost.cycles_by_class.empty() ? nullptr : cost.cycles_by_class.data();
  const uint8_t* overflow = cost.overflow.empty() ? nullptr : cost.overflow.data();
  int index = 0;
  for (int w = 0; w < weights; ++w) {
    for (int i = 0; i < inputs; ++i) {
      const double energy = macs * classes.mac_pj[w * inputs + i] + cost.energy[kWeights][w] + cost.energy[kInputs][i];
      const double accesses = cost.accesses[kWeights][w] + cost.accesses[kInputs][i];
      if (!cycles && !overflow) {
        for (int o = 0; o < outputs; ++o, ++index) {
          f(index,
            score<objective>(energy + cost.energy[kOutputs][o], cost.cycles, accesses + cost.accesses[kOutputs][o]));
        }
        continue;
      }
      for (int o = 0; o < outputs; ++o, ++index) {
        const double fits = overflow && overflow[index] ? kInfinity : 0.0;
        f(index, score<objective>(energy + cost.energy[kOutputs][o] + fits, cycles ? cycles[index] : cost.cycles,
                                  accesses + cost.accesses[kOutputs][o]));
      }
    }
  }
}

template <Objective objective>
Score widest_score(const Engine& engine, const Cost& cost) {
  const WidthClasses& classes = engine.classes;
  double energy = engine.macs * classes.mac_pj.back(), accesses = 0.0;
  for (const Tensor t : kAllTensors) {
    energy += cost.energy[t][classes.tensors[t].widest()];
    accesses += cost.accesses[t][classes.tensors[t].widest()];
  }
  if (!cost.overflow.empty() && cost.overflow.back()) energy = kInfinity;
  return score<objective>(energy, cost.cycles_by_class.empty() ? cost.cycles : cost.cycles_by_class.back(), accesses);
}

template <typename F>
void with_objective(Objective objective, const F& f) {
  switch (objective) {
    case Objective::kEnergy:
      return f.template operator()<Objective::kEnergy>();
    case Objective::kDelay:
      return f.template operator()<Objective::kDelay>();
    case Objective::kEdp:
      return f.template operator()<Objective::kEdp>();
    case Objective::kLastLevelAccesses:
      return f.template operator()<Objective::kLastLevelAccesses>();
  }
}

// The best mapping of every combination of width classes.
class BestOfClasses {
 public:
  struct Entry {
    int combination;
    Score score;
    Place place;
  };

  explicit BestOfClasses(const Engine& engine)
      : engine_(&engine),
        firsts_(engine.classes.combinations(), kInfinity),
        seconds_(engine.classes.combinations(), kInfinity),
        places_(engine.classes.combinations()) {}

  // Whether a node with these bounds can hold something better for any combination.
  bool promising(const Cost& cost) const {
    bool result = false;
    with_objective(engine_->options.objective, [&]<Objective objective>() {
      // The first numbers alone settle most nodes, in a loop without branches.
      bool close = false;
      for_scores<objective>(*engine_, cost, [&](int i, const Score& s) { close |= s.first <= firsts_[i]; });
      if (!close) return;
      for_scores<objective>(*engine_, cost, [&](int i, const Score& s) { result |= s < best(i); });
    });
    return result;
  }

  void offer(const Cost& cost, const Place& place) {
    with_objective(engine_->options.objective, [&]<Objective objective>() {
      for_scores<objective>(*engine_, cost, [&](int i, const Score& s) {
        if (s < best(i)) take({i, s, place});
      });
    });
  }

  // A number to order nodes by: the bound of the widest combination.
  double guide(const Cost& cost) const {
    double result = 0.0;
    with_objective(engine_->options.objective,
                   [&]<Objective objective>() { result = widest_score<objective>(*engine_, cost).first; });
    return result;
  }

  int64_t version() const { return version_; }

  // Starts from the same scores and remembers what it adds.
  BestOfClasses branch() const { return {*engine_, firsts_, seconds_}; }
  void merge(const BestOfClasses& branch) {
    for (const Entry& entry : branch.news_) {
      if (entry.score < best(entry.combination)) take(entry);
    }
  }

  Score best(int combination) const { return {firsts_[combination], seconds_[combination]}; }
  const Place& place(int combination) const { return places_[combination]; }

 private:
  BestOfClasses(const Engine& engine, const std::vector<double>& firsts, const std::vector<double>& seconds)
      : engine_(&engine), firsts_(firsts), seconds_(seconds) {}

  void take(const Entry& entry) {
    ++version_;
    firsts_[entry.combination] = entry.score.first;
    seconds_[entry.combination] = entry.score.second;
    if (places_.empty()) {
      news_.push_back(entry);
    } else {
      places_[entry.combination] = entry.place;
    }
  }

  const Engine* engine_;
  std::vector<double> firsts_, seconds_;  // scores, by combination
  std::vector<Place> places_;             // of a branch: none
  std::vector<Entry> news_;               // of a branch
  int64_t version_ = 0;
};

// The mappings that no other beats in all objectives; one combination of width classes.
class Front {
 public:
  struct Entry {
    std::vector<double> values;
    Place place;
  };

  Front(const Engine& engine, const std::vector<Objective>& objectives) : engine_(&engine), objectives_(objectives) {}

  bool promising(const Cost& cost) const {
    const std::vector<double> values = values_of(cost);
    return std::none_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return covers(e.values, values); });
  }
  void offer(const Cost& cost, const Place& place) { add({values_of(cost), place}); }
  double guide(const Cost& cost) const { return values_of(cost)[0]; }
  int64_t version() const { return version_; }
  Front branch() const { return *this; }
  void merge(const Front& branch) {
    for (const Entry& entry : branch.entries_) add(entry);
  }

  std::vector<Entry> sorted() const {
    std::vector<Entry> result = entries_;
    std::sort(result.begin(), result.end(), [](const Entry& a, const Entry& b) { return a.values < b.values; });
    return result;
  }

 private:
  static bool covers(const std::vector<double>& a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i] > b[i]) return false;
    }
    return true;
  }

  std::vector<double> values_of(const Cost& cost) const {
    std::vector<double> values;
    for (const Objective each : objectives_) {
      with_objective(each, [&]<Objective objective>() {
        for_scores<objective>(*engine_, cost, [&](int, const Score& s) { values.push_back(s.first); });
      });
    }
    return values;
  }

  void add(const Entry& entry) {
    if (entry.values[0] == kInfinity) return;
    for (const Entry& e : entries_) {
      if (covers(e.values, entry.values)) return;
    }
    std::erase_if(entries_, [&](const Entry& e) { return covers(entry.values, e.values); });
    entries_.push_back(entry);
    ++version_;
  }

  const Engine* engine_;
  std::vector<Objective> objectives_;
  std::vector<Entry> entries_;
  int64_t version_ = 0;
};

void add(Certificate* to, const Certificate& from) {
  to->capacity_invalid += from.capacity_invalid;
  to->bound_pruned += from.bound_pruned;
  to->dominance_pruned += from.dominance_pruned;
  to->evaluated += from.evaluated;
  to->nodes += from.nodes;
  to->least_open_bound = std::min(to->least_open_bound, from.least_open_bound);
}

// Depth-first through the choices of one unit, the most promising first.
template <typename Keeper>
class Descent {
 public:
  explicit Descent(const Engine& engine)
      : engine_(engine), nodes_(engine), bounded_(engine.options.method == Method::kBounded) {}

  struct Task {
    size_t unit;
    int choice;    // of the first open dimension; -1: all of them
    double guide;  // its bound, to order tasks by
  };

  struct Outcome {
    Certificate certificate{.least_open_bound = kInfinity};
    Miss miss;
  };

  // Bounds of a unit, or of each choice of its first open dimension. What does not fit is left out and counted.
  std::vector<Task> tasks(size_t index, bool split, const Keeper& keeper, Outcome* outcome) {
    begin(index, outcome);
    std::vector<Task> result;
    if (!split || unit_.open.empty()) {
      if (look(0)) result.push_back({index, -1, keeper.guide(cost_)});
      return result;
    }
    const int d = unit_.open[0];
    for (size_t c = 0; c < unit_.choices[d]->size(); ++c) {
      nodes_.decide(d, (*unit_.choices[d])[c]);
      if (look(1)) result.push_back({index, static_cast<int>(c), keeper.guide(cost_)});
    }
    return result;
  }

  const Miss& miss() const { return nodes_.miss(); }

  void run(const Task& task, Keeper* keeper, Outcome* outcome) {
    begin(task.unit, outcome);
    keeper_ = keeper;
    place_ = {};
    place_.unit = task.unit;
    size_t depth = 0;
    if (task.choice >= 0) {
      const int d = unit_.open[0];
      nodes_.decide(d, (*unit_.choices[d])[task.choice]);
      place_.choice[d] = task.choice;
      depth = 1;
    }
    if (look(depth) && worth(depth)) descend(depth);
    outcome->miss.add(nodes_.miss());
  }

 private:
  struct Child {
    int choice;
    int64_t version;
    double guide;
  };

  void begin(size_t index, Outcome* outcome) {
    unit_ = engine_.unit(index);
    nodes_.enter(unit_);
    outcome_ = outcome;
    children_.resize(unit_.open.size());
  }

  double mappings(size_t depth) const { return unit_.below[depth] * engine_.space.orders(); }

  // Prices the node, or counts what lies below it as too large.
  bool look(size_t depth) {
    ++outcome_->certificate.nodes;
    if (!nodes_.fits()) {
      outcome_->certificate.capacity_invalid += mappings(depth);
      return false;
    }
    nodes_.price(&cost_);
    return true;
  }

  bool worth(size_t depth) {
    if (!bounded_ || keeper_->promising(cost_)) return true;
    outcome_->certificate.bound_pruned += mappings(depth);
    outcome_->certificate.least_open_bound = std::min(outcome_->certificate.least_open_bound, keeper_->guide(cost_));
    return false;
  }

  void descend(size_t depth) {
    if (depth == unit_.open.size()) return finish();
    const int d = unit_.open[depth];
    const Choices& choices = *unit_.choices[d];
    std::vector<Child>& children = children_[depth];
    children.clear();
    const bool last = depth + 1 == unit_.open.size();
    for (size_t c = 0; c < choices.size(); ++c) {
      nodes_.decide(d, choices[c]);
      if (!look(depth + 1) || !worth(depth + 1)) continue;
      if (last) {
        place_.choice[d] = static_cast<int32_t>(c);
        finish();
      } else {
        children.push_back({static_cast<int>(c), keeper_->version(), keeper_->guide(cost_)});
      }
    }
    if (bounded_) {
      std::stable_sort(children.begin(), children.end(),
                       [](const Child& a, const Child& b) { return a.guide < b.guide; });
    }
    for (size_t i = 0; i < children_[depth].size(); ++i) {
      const Child child = children_[depth][i];
      nodes_.decide(d, choices[child.choice]);
      place_.choice[d] = child.choice;
      if (bounded_ && child.version != keeper_->version()) {
        nodes_.fits();
        nodes_.price(&cost_);
        ++outcome_->certificate.nodes;
        if (!worth(depth + 1)) continue;
      }
      descend(depth + 1);
    }
    nodes_.undecide(d);
  }

  // All factors are decided and cost_ holds the price: exact where no order is open.
  void finish() {
    std::vector<int> open;
    for (int l = 1; l < engine_.levels(); ++l) {
      if (nodes_.open_order(l)) open.push_back(l);
    }
    double tried = 0.0;
    if (open.empty()) {
      place_.orders.clear();
      keeper_->offer(cost_, place_);
      tried = 1.0;
    } else {
      order(open, 0, &tried);
      nodes_.reset_orders();
    }
    outcome_->certificate.evaluated += tried;
    outcome_->certificate.dominance_pruned += engine_.space.orders() - tried;
  }

  void order(const std::vector<int>& open, size_t next, double* tried) {
    if (next == open.size()) {
      nodes_.price(&cost_);
      ++outcome_->certificate.nodes;
      place_.orders.clear();
      for (int l = 0; l < engine_.levels(); ++l) place_.orders.push_back(nodes_.order(l));
      keeper_->offer(cost_, place_);
      *tried += 1.0;
      return;
    }
    const int level = open[next];
    const SlotOrder before = nodes_.order(level);
    for (const SlotOrder& each : nodes_.orders_to_try(level)) {
      nodes_.set_order(level, each);
      order(open, next + 1, tried);
      nodes_.set_order(level, before);
    }
  }

  const Engine& engine_;
  Nodes nodes_;
  bool bounded_;
  Unit unit_;
  Keeper* keeper_ = nullptr;
  Outcome* outcome_ = nullptr;
  Place place_;
  Cost cost_;
  std::vector<std::vector<Child>> children_;
};

[[noreturn]] void fail_without_mapping(const Engine& engine, const Miss& miss) {
  const Level& level = engine.space.arch().levels[miss.level];
  std::string parts;
  double needed = 0.0;
  for (const Tensor t : kAllTensors) {
    if (miss.words[t] == 0.0) continue;
    needed += miss.words[t];
    parts += text(parts.empty() ? "" : " and ", miss.words[t], " for ", kTensorNames[t]);
  }
  fail("constraints: no mapping fits; the closest needs ", needed, " words at level ", level.name, " (", parts,
       "), which has ", *level.size);
}

// Runs the whole search. Tasks go in rounds: those of one round see what the rounds before have found and nothing of
// each other, so that neither result nor certificate depend on the number of threads.
template <typename Keeper>
Certificate run(const Engine& engine, Keeper* keeper) {
  constexpr size_t kFewUnits = 64, kLargestRound = 32;
  using Worker = Descent<Keeper>;
  using Task = typename Worker::Task;
  using Outcome = typename Worker::Outcome;
  const int threads = std::max(1, engine.options.threads);
  std::vector<Worker> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(engine);

  Certificate certificate;
  certificate.least_open_bound = kInfinity;
  Miss miss;
  certificate.total = engine.space.total();
  certificate.fanout_invalid = certificate.total - engine.total_in_fanout();
  const auto collect = [&](const std::vector<Outcome>& outcomes) {
    for (const Outcome& outcome : outcomes) {
      add(&certificate, outcome.certificate);
      miss.add(outcome.miss);
    }
  };

  const bool split = engine.units.size() < kFewUnits;
  std::vector<std::vector<Task>> by_unit(engine.units.size());
  std::vector<Outcome> outcomes(engine.units.size());
  parallel_for(engine.units.size(), threads, [&](int worker, size_t i) {
    by_unit[i] = workers[worker].tasks(i, split, *keeper, &outcomes[i]);
    outcomes[i].miss.add(workers[worker].miss());
  });
  collect(outcomes);
  std::vector<Task> tasks;
  for (const auto& of_unit : by_unit) tasks.insert(tasks.end(), of_unit.begin(), of_unit.end());
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.guide < b.guide; });

  size_t size = engine.options.method == Method::kBounded ? 1 : kLargestRound;
  for (size_t first = 0; first < tasks.size(); first += size, size = std::min(2 * size, kLargestRound)) {
    const size_t count = std::min(size, tasks.size() - first);
    std::vector<Keeper> branches(count, keeper->branch());
    outcomes.assign(count, {});
    parallel_for(count, threads,
                 [&](int worker, size_t i) { workers[worker].run(tasks[first + i], &branches[i], &outcomes[i]); });
    for (const Keeper& branch : branches) keeper->merge(branch);
    collect(outcomes);
  }
  if (certificate.evaluated == 0.0) fail_without_mapping(engine, miss);
  return certificate;
}

Mapping mapping_at(const Engine& engine, const Place& place) {
  const Unit unit = engine.unit(place.unit);
  Nodes nodes(engine);
  nodes.enter(unit);
  for (const int d : unit.open) nodes.decide(d, (*unit.choices[d])[place.choice[d]]);
  for (size_t l = 0; l < place.orders.size(); ++l) nodes.set_order(static_cast<int>(l), place.orders[l]);
  return nodes.mapping();
}

Found found(const Engine& engine, const Mapping& mapping, const Widths& widths) {
  return {mapping, evaluate_checked(engine.space.arch(), engine.space.layer(), mapping, widths, engine.options.model)};
}

WidthLists lists_of(const Widths& widths) {
  WidthLists lists;
  for (const Tensor t : kAllTensors) lists.bits[t] = {widths.bits[t]};
  lists.partial_bits = widths.partial_bits;
  return lists;
}

}  // namespace

SearchResult search(const Arch& arch, const Layer& layer, const Widths& widths, const SearchOptions& options) {
  const Engine engine(arch, layer, lists_of(widths), options);
  BestOfClasses best(engine);
  const Certificate certificate = run(engine, &best);
  return {found(engine, mapping_at(engine, best.place(0)), widths), certificate, engine.space.relaxed()};
}

SweepResult sweep(const Arch& arch, const Layer& layer, const WidthLists& widths, const SearchOptions& options) {
  const Engine engine(arch, layer, widths, options);
  BestOfClasses best(engine);
  SweepResult result;
  result.certificate = run(engine, &best);
  result.relaxed = engine.space.relaxed();
  result.classes = engine.classes.combinations();
  const auto& tensors = engine.classes.tensors;
  std::vector<int64_t> index_of(engine.classes.combinations(), -1);
  std::vector<std::pair<const Place*, Mapping>> mappings;  // many classes share one
  const auto mapping_of = [&](const Place& place) -> const Mapping& {
    const auto known = std::find_if(mappings.begin(), mappings.end(), [&](const auto& m) { return *m.first == place; });
    if (known != mappings.end()) return known->second;
    return mappings.emplace_back(&place, mapping_at(engine, place)).second;
  };
  for (int w = 0; w < tensors[kWeights].count; ++w) {
    for (int i = 0; i < tensors[kInputs].count; ++i) {
      for (int o = 0; o < tensors[kOutputs].count; ++o) {
        const int combination = engine.classes.index(w, i, o);
        if (best.best(combination).first == kInfinity) continue;
        index_of[combination] = static_cast<int64_t>(result.found.size());
        result.found.push_back(found(engine, mapping_of(best.place(combination)), engine.classes.widths(w, i, o)));
      }
    }
  }
  for (const int i : tensors[kInputs].class_of) {
    for (const int w : tensors[kWeights].class_of) {
      for (const int o : tensors[kOutputs].class_of) {
        result.index.push_back(index_of[engine.classes.index(w, i, o)]);
      }
    }
  }
  return result;
}

ParetoResult pareto(const Arch& arch, const Layer& layer, const Widths& widths,
                    const std::vector<Objective>& objectives, const SearchOptions& options) {
  if (objectives.empty()) fail("objectives: none, expected at least one");
  const Engine engine(arch, layer, lists_of(widths), options);
  Front front(engine, objectives);
  ParetoResult result;
  result.certificate = run(engine, &front);
  result.relaxed = engine.space.relaxed();
  for (const auto& entry : front.sorted()) {
    result.points.push_back(found(engine, mapping_at(engine, entry.place), widths));
  }
  return result;
}

MappingCounts count_mappings(const Arch& arch, const Layer& layer, const Widths& widths, int threads) {
  const Engine engine(arch, layer, lists_of(widths), {});
  MappingCounts counts;
  counts.total = engine.space.total();
  counts.fanout_invalid = counts.total - engine.total_in_fanout();
  std::vector<double> invalid(engine.units.size(), 0.0);
  parallel_for(engine.units.size(), threads, [&](int, size_t u) {
    const Unit unit = engine.unit(u);
    Nodes nodes(engine);
    nodes.enter(unit);
    const auto visit = [&](const auto& self, size_t depth) -> void {
      if (!nodes.fits()) {
        invalid[u] += unit.below[depth] * engine.space.orders();
      } else if (depth < unit.open.size()) {
        const int d = unit.open[depth];
        for (const LevelFactors& factors : *unit.choices[d]) {
          nodes.decide(d, factors);
          self(self, depth + 1);
        }
        nodes.undecide(d);
      }
    };
    visit(visit, 0);
  });
  counts.capacity_invalid = std::accumulate(invalid.begin(), invalid.end(), 0.0);
  counts.valid = counts.total - counts.fanout_invalid - counts.capacity_invalid;
  return counts;
}

RandomResult random_search(const Arch& arch, const Layer& layer, const Widths& widths, const SearchOptions& options,
                           const RandomOptions& random) {
  if (random.victory < 1 || random.timeout < 1 || random.orders < 1) {
    fail("victory, timeout and orders: ", random.victory, ", ", random.timeout, ", ", random.orders,
         "; expected at least 1 each");
  }
  MapSpace space(arch, layer);
  std::mt19937_64 engine(random.seed);
  // The standard fixes the engine's numbers but not those of its distributions.
  const auto uniform = [&] { return static_cast<double>(engine() >> 11) * 0x1.0p-53; };
  const auto below = [&](size_t n) { return static_cast<size_t>(uniform() * static_cast<double>(n)); };

  RandomResult result;
  result.relaxed = space.relaxed();
  Score best;
  int64_t without_better = 0, invalid = 0;
  while (without_better < random.victory && invalid < random.timeout) {
    Mapping mapping(space.levels());
    const KeepChoice& keep = space.keeps()[below(space.keeps().size())];
    std::vector<std::vector<int64_t>> temporal(space.levels(), std::vector<int64_t>(space.dims()));
    for (int d = 0; d < space.dims(); ++d) {
      const std::vector<int64_t> factors = space.factorizations(d).pick(layer.bounds[d], uniform());
      for (int l = 0; l < space.levels(); ++l) {
        const int64_t x = factors[l], y = factors[space.levels() + l];
        if (x > 1) mapping[l].spatial_x.push_back({d, x});
        if (y > 1) mapping[l].spatial_y.push_back({d, y});
        temporal[l][d] = factors[2 * space.levels() + l];
      }
    }
    double orders = 1.0;  // of loops above 1, at most what is tried
    for (int l = 0; l < space.levels(); ++l) {
      mapping[l].keep = keep[l];
      int loops = 0;
      for (const int d : space.order(l).free) loops += temporal[l][d] > 1;
      for (int n = 2; n <= loops; ++n) orders = std::min(orders * n, static_cast<double>(random.orders));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(orders) && without_better < random.victory; ++i) {
      for (int l = 0; l < space.levels(); ++l) {
        LoopOrder order = space.order(l);
        for (size_t n = order.free.size(); n > 1; --n) std::swap(order.free[n - 1], order.free[below(n)]);
        mapping[l].temporal.clear();
        for (const auto* part : {&order.before, &order.free, &order.after}) {
          for (const int d : *part) {
            if (temporal[l][d] > 1) mapping[l].temporal.push_back({d, temporal[l][d]});
          }
        }
      }
      result.counts.total += 1.0;
      Evaluation e;
      try {
        e = evaluate_checked(space.arch(), layer, mapping, widths, options.model);
      } catch (const DoesNotFit& misfit) {
        (misfit.limit == DoesNotFit::Limit::kFanout ? result.counts.fanout_invalid : result.counts.capacity_invalid) +=
            1.0;
        ++invalid;
        break;  // no order changes it
      }
      result.counts.valid += 1.0;
      invalid = 0;
      ++without_better;
      Score now;
      with_objective(options.objective, [&]<Objective objective>() {
        now = score<objective>(e.energy_pj, static_cast<double>(e.cycles), static_cast<double>(e.last_level_accesses));
      });
      if (now < best) {
        best = now;
        result.best = {mapping, e};
        without_better = 0;
      }
    }
  }
  if (result.counts.valid == 0.0) {
    fail("random search: none of ", result.counts.total, " mappings fits; search() says why if there is none");
  }
  return result;
}

}  // namespace mixbit::hw
