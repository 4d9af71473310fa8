#include "engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "text.h"

namespace mixbit::hw {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TensorShape shape_of(const Layer& layer, Tensor t) {
  TensorShape shape;
  shape.rank_of.fill(-1);
  shape.coefficient.fill(0.0);
  for (const Rank& rank : layer.tensors[t]) {
    TensorShape::RankShape active;
    for (const Term& term : rank) {
      if (layer.bounds[term.dim] > 1) active.terms.push_back(term);
    }
    if (active.terms.empty()) continue;
    active.regular = active.terms.size() == 1 && active.terms[0].coefficient == 1;
    shape.regular &= active.regular;
    for (const Term& term : active.terms) {
      if (shape.rank_of[term.dim] >= 0) {
        fail("problem: ", kTensorNames[t], " depends on ", layer.dims[term.dim], " twice, which no search handles");
      }
      shape.rank_of[term.dim] = static_cast<int>(shape.ranks.size());
      shape.coefficient[term.dim] = static_cast<double>(term.coefficient);
    }
    shape.ranks.push_back(std::move(active));
  }
  return shape;
}

SlotOrder slot_order(const LoopOrder& order) {
  SlotOrder slot;
  for (const auto* part : {&order.before, &order.free, &order.after}) {
    for (const int d : *part) slot.dims[slot.count++] = static_cast<int8_t>(d);
  }
  slot.before = static_cast<int>(order.before.size());
  slot.free = static_cast<int>(order.free.size());
  return slot;
}

}  // namespace

Engine::Engine(const Arch& arch, const Layer& layer, const WidthLists& widths, const SearchOptions& options_given)
    : space(arch, layer), classes(arch, widths, options_given.model), options(options_given) {
  if (dims() > kMaxDims) fail("problem: ", dims(), " dimensions, a search takes at most ", kMaxDims);
  if (levels() > kMaxLevels) fail("architecture: ", levels(), " levels, a search takes at most ", kMaxLevels);
  if (options.model.reuse != Reuse::kSampled) fail("reuse: a search counts sampled reuse only");
  for (const Tensor t : kAllTensors) shapes[t] = shape_of(layer, t);
  if (!shapes[kOutputs].regular) fail("problem: Outputs: a search expects one dimension of step 1 in each rank");
  for (int l = 0; l < levels(); ++l) {
    orders.push_back(slot_order(space.order(l)));
    blocks.emplace_back(arch.levels[l].block);
  }
  macs = static_cast<double>(layer.macs());
  spatials = space.spatial_choices();
  choices_.resize(dims());
  rests_.resize(spatials.size());
  for (size_t s = 0; s < spatials.size(); ++s) {
    for (int d = 0; d < dims(); ++d) {
      int64_t& rest = rests_[s][d];
      rest = layer.bounds[d];
      for (int l = 0; l < levels(); ++l) rest /= spatials[s].x[l][d] * spatials[s].y[l][d];
      if (choices_[d].contains(rest)) continue;
      Choices& choices = choices_[d][rest];
      for (const auto& factors : space.temporal_choices(d, rest)) {
        LevelFactors& as_doubles = choices.emplace_back();
        as_doubles.fill(1.0);
        std::copy(factors.begin(), factors.end(), as_doubles.begin());
      }
    }
    for (size_t k = 0; k < space.keeps().size(); ++k) units.emplace_back(k, s);
  }
}

double Engine::total_in_fanout() const {
  double sum = 0.0;
  for (const auto& rests : rests_) {
    double product = space.orders() * static_cast<double>(space.keeps().size());
    for (int d = 0; d < dims(); ++d) product *= static_cast<double>(choices_[d].at(rests[d]).size());
    sum += product;
  }
  return sum;
}

Unit Engine::unit(size_t index) const {
  const Layer& layer = space.layer();
  Unit unit;
  unit.keep = &space.keeps()[units[index].first];
  unit.spatial = &spatials[units[index].second];
  int64_t instances = 1;
  for (int l = levels() - 1; l >= 0; --l) {
    unit.used[l] = static_cast<double>(instances);
    unit.instances[l] = paid_instances(space.arch().levels[l], instances);
    for (int d = 0; d < dims(); ++d) {
      const int64_t factor = unit.spatial->x[l][d] * unit.spatial->y[l][d];
      unit.spread[d][l] = static_cast<double>(factor);
      instances *= factor;
    }
  }
  unit.steps = macs / static_cast<double>(instances);

  for (int d = 0; d < dims(); ++d) {
    const int64_t rest = rests_[units[index].second][d];
    unit.rest[d] = static_cast<double>(rest);
    unit.choices[d] = &choices_[d].at(rest);
    (unit.choices[d]->size() == 1 ? unit.forced : unit.open).push_back(d);
  }
  // Dimensions whose tiles overlap come first: the bound of their tensor waits for them.
  const auto overlapping = [&](int d) {
    return std::any_of(shapes.begin(), shapes.end(), [&](const TensorShape& shape) {
      return shape.relevant(d) && !shape.ranks[shape.rank_of[d]].regular;
    });
  };
  std::stable_sort(unit.open.begin(), unit.open.end(), [&](int a, int b) {
    if (overlapping(a) != overlapping(b)) return overlapping(a);
    return unit.choices[a]->size() > unit.choices[b]->size();
  });
  unit.below.assign(unit.open.size() + 1, 1.0);
  for (size_t i = unit.open.size(); i-- > 0;) {
    unit.below[i] = unit.below[i + 1] * static_cast<double>(unit.choices[unit.open[i]]->size());
  }

  for (const Tensor t : kAllTensors) {
    const TensorShape& shape = shapes[t];
    int inner = 0, count = 0;
    for (int l = 0; l < levels(); ++l) {
      if (!(*unit.keep)[l][t]) continue;
      Unit::Site site{l, 1.0, false, 1.0, false};
      for (int i = inner; i <= l; ++i) {
        std::array<int, kMaxRanks> seen{};
        for (int d = 0; d < dims(); ++d) {
          if (!shape.relevant(d)) continue;
          site.children *= unit.spread[d][i];
          if (unit.spread[d][i] > 1.0 && ++seen[shape.rank_of[d]] > 1) site.diagonal = true;
        }
      }
      for (int d = 0; d < dims(); ++d) {
        if (!shape.relevant(d) || !shape.ranks[shape.rank_of[d]].regular) continue;
        site.compulsory *= static_cast<double>(layer.bounds[d]);
        for (int i = l + 1; i < levels(); ++i) {
          if (unit.spread[d][i] > 1.0) site.compulsory /= unit.spread[d][i];
        }
      }
      unit.sites[t][count++] = site;
      inner = l + 1;
    }
    unit.sites[t][count - 1].outermost = true;
    unit.site_count[t] = count;
  }
  return unit;
}

void Nodes::enter(const Unit& unit) {
  unit_ = &unit;
  reset_orders();
  for (int d = 0; d < engine_.dims(); ++d) undecide(d);
  for (const int d : unit.forced) decide(d, (*unit.choices[d])[0]);
}

void Nodes::decide(int dim, const LevelFactors& factors) {
  factors_[dim] = factors;
  decided_[dim] = true;
  double inside = 1.0;
  for (int l = 0; l < engine_.levels(); ++l) {
    inside *= unit_->spread[dim][l];
    stride_[dim][l] = inside;
    inside *= factors[l];
    cumulative_[dim][l] = inside;
  }
}

void Nodes::undecide(int dim) {
  LevelFactors ones;
  ones.fill(1.0);
  decide(dim, ones);
  decided_[dim] = unit_->rest[dim] == 1.0;
}

bool Nodes::all_decided() const {
  return std::all_of(decided_.begin(), decided_.begin() + engine_.dims(), [](bool d) { return d; });
}

double Nodes::volume(int level, Tensor t) const {
  double product = 1.0;
  for (const auto& rank : engine_.shapes[t].ranks) {
    double extent = 1.0;
    for (const Term& term : rank.terms) {
      extent += static_cast<double>(term.coefficient) * (cumulative_[term.dim][level] - 1.0);
    }
    product *= extent;
  }
  return product;
}

bool Nodes::fits() {
  for (const Tensor t : kAllTensors) {
    for (const Unit::Site& site : unit_->sites_of(t)) volume_[site.level][t] = volume(site.level, t);
  }
  for (int l = 0; l < engine_.levels(); ++l) {
    const auto& size = engine_.space.arch().levels[l].size;
    if (!size) continue;
    double needed = 0.0;
    for (const Tensor t : kAllTensors) {
      if ((*unit_->keep)[l][t]) needed += engine_.classes.tensors[t].words[l][0](volume_[l][t]);
    }
    if (needed <= static_cast<double>(*size)) continue;
    Miss miss{needed / static_cast<double>(*size), l, {}};
    for (const Tensor t : kAllTensors) {
      if ((*unit_->keep)[l][t]) miss.words[t] = engine_.classes.tensors[t].words[l][0](volume_[l][t]);
    }
    miss_.add(miss);
    return false;
  }
  return true;
}

bool Nodes::open_order(int level) const {
  const SlotOrder& order = orders_[level];
  int loops = 0;
  for (int i = order.before; i < order.before + order.free; ++i) loops += factors_[order.dims[i]][level] > 1.0;
  return loops > 1;
}

void Nodes::list_loops() {
  loop_count_ = 0;
  any_open_ = false;
  for (int l = 1; l < engine_.levels(); ++l) {
    first_loop_[l] = loop_count_;
    const SlotOrder& order = orders_[l];
    const bool open = order.free > 1 && open_order(l);
    any_open_ |= open;
    for (int i = 0; i < order.count; ++i) {
      const int d = order.dims[i];
      if (factors_[d][l] == 1.0) continue;
      const bool free = open && i >= order.before && i < order.before + order.free;
      loops_[loop_count_++] = {d, l, free ? l : -1, factors_[d][l]};
    }
  }
  first_loop_[engine_.levels()] = loop_count_;
}

// A tensor of regular ranks is fetched anew by every loop that moves it and by every loop around such a one; only the
// innermost loops that do not move it keep it in place. Where orders are open those count as inside.
double Nodes::regular_requests(const Unit::Site& site, Tensor t) const {
  const TensorShape& shape = engine_.shapes[t];
  double again = 1.0;
  bool moved = false, group_moves = false;
  int group = -1;
  for (int i = first_loop_[site.level + 1]; i < loop_count_; ++i) {
    const LoopAt& loop = loops_[i];
    if (loop.group != group) {
      moved |= group_moves;
      group_moves = false;
      group = loop.group;
    }
    if (!shape.relevant(loop.dim)) {
      if (moved) again *= loop.factor;
    } else if (group < 0) {
      moved = true;
    } else {
      group_moves = true;
    }
  }
  return site.compulsory * again;
}

// As requested() of nest.h, for the loops around the site. Where the order of a level's loops is open, the walk takes
// the order that is best for this tensor: see docs/mapper.md. `first` is the dimension that moves the tile first, if
// that is to be chosen.
double Nodes::walk(const Unit::Site& site, Tensor t, int first) const {
  const TensorShape& shape = engine_.shapes[t];
  const auto ranks = static_cast<int>(shape.ranks.size());
  std::array<double, kMaxRanks> extent{}, before{}, reference{};
  for (int r = 0; r < ranks; ++r) {
    extent[r] = 1.0;
    for (const Term& term : shape.ranks[r].terms) {
      extent[r] += static_cast<double>(term.coefficient) * (cumulative_[term.dim][site.level] - 1.0);
    }
  }
  const bool v4 = engine_.options.model.semantics == Semantics::kV4;
  const double tile = volume_[site.level][t];
  double sum = 0.0, reference_fetch = 0.0;
  bool have_reference = false;
  int moved = -1;  // the one dimension that has moved the tile; -2: several
  const auto step = [&](const LoopAt& loop) {
    const int d = loop.dim, rank = shape.rank_of[d];
    const double factor = loop.factor;
    const double stride = rank < 0 ? 0.0 : shape.coefficient[d] * stride_[d][loop.level];
    std::array<double, kMaxRanks> move{};
    bool moves = false, same = true;
    for (int r = 0; r < ranks; ++r) {
      move[r] = (r == rank ? stride : 0.0) - before[r];
      moves |= move[r] != 0.0;
      same &= move[r] == reference[r];
    }
    double fetch;
    if (v4 && !moves) {
      fetch = 0.0;
    } else if (!have_reference) {
      have_reference = true;
      reference = move;
      double overlap = 1.0;
      for (int r = 0; r < ranks; ++r) overlap *= std::max(0.0, extent[r] - std::abs(move[r]));
      fetch = reference_fetch = tile - overlap;
    } else {
      fetch = same ? reference_fetch : tile;
    }
    sum = sum * factor + (factor - 1.0) * fetch;
    if (rank >= 0) {
      before[rank] += stride;
      moved = moved == -1 || moved == d ? d : -2;
    }
  };
  for (int i = first_loop_[site.level + 1], end; i < loop_count_; i = end) {
    end = i + 1;
    if (loops_[i].group < 0) {
      step(loops_[i]);
      continue;
    }
    while (end < loop_count_ && loops_[end].group == loops_[i].group) ++end;
    const bool inside = moved == -1;  // loops that do not move the tile cost nothing here
    const int leading = inside ? first : moved;
    const auto steps = [&](const auto& wanted) {
      for (int j = i; j < end; ++j) {
        if (wanted(loops_[j].dim)) step(loops_[j]);
      }
    };
    steps([&](int d) { return d == leading; });
    steps([&](int d) { return d != leading && shape.relevant(d); });
    if (!inside) steps([&](int d) { return !shape.relevant(d); });
  }
  return tile + sum;
}

double Nodes::overlapping_requests(const Unit::Site& site, Tensor t) const {
  const TensorShape& shape = engine_.shapes[t];
  bool exact = all_decided();
  int leader = -1;  // the first loop around the site that moves the tile
  for (int i = loop_count_ - 1; i >= first_loop_[site.level + 1]; --i) {
    exact &= loops_[i].group < 0;
    if (shape.relevant(loops_[i].dim)) leader = i;
  }
  if (exact) return walk(site, t, -1);
  double least = site.compulsory;
  bool known = true;
  for (const auto& rank : shape.ranks) {
    if (rank.regular) continue;
    int moving = 0;
    double extent = 1.0;
    for (const Term& term : rank.terms) {
      known &= decided_[term.dim];
      extent += static_cast<double>(term.coefficient) * (cumulative_[term.dim][site.level] - 1.0);
      moving += std::any_of(factors_[term.dim].begin() + site.level + 1, factors_[term.dim].begin() + engine_.levels(),
                            [](double factor) { return factor > 1.0; });
    }
    known &= moving <= 1;
    least *= extent;
  }
  // Every part of the tensor comes in once, a tile at least: all that is certain with two dimensions of one rank.
  if (!known) return least;
  double around = 1.0;
  for (int d = 0; d < engine_.dims(); ++d) {
    if (shape.relevant(d) && !decided_[d]) around *= unit_->rest[d];
  }
  double fewest = kInfinity;
  if (leader >= 0 && loops_[leader].group >= 0) {
    for (int i = leader; i < loop_count_ && loops_[i].group == loops_[leader].group; ++i) {
      const int d = loops_[i].dim;
      if (!shape.relevant(d) || shape.ranks[shape.rank_of[d]].regular) continue;
      fewest = std::min(fewest, walk(site, t, d));
    }
  }
  if (fewest == kInfinity) fewest = walk(site, t, -1);
  return fewest * around;
}

double Nodes::requested_by(const Unit::Site& site, Tensor t) const {
  return engine_.shapes[t].regular ? regular_requests(site, t) : overlapping_requests(site, t);
}

// Distinct children where loops of one rank meet at a level, so that the strides decide; the fewest where those are
// open.
double Nodes::children(Tensor t, int from, int to) const {
  const TensorShape& shape = engine_.shapes[t];
  double product = 1.0;
  for (int l = from; l <= to; ++l) {
    for (const auto& rank : shape.ranks) {
      std::set<double> places = {0.0};
      double most = 1.0;
      bool known = true;
      for (const Term& term : rank.terms) {
        const double factor = unit_->spread[term.dim][l];
        if (factor == 1.0) continue;
        known &= decided_[term.dim];
        most = std::max(most, factor);
        const double stride = static_cast<double>(term.coefficient) * (l == 0 ? 1.0 : cumulative_[term.dim][l - 1]);
        std::set<double> next;
        for (const double place : places) {
          for (double i = 0.0; i < factor; i += 1.0) next.insert(place + i * stride);
        }
        places = std::move(next);
      }
      product *= known ? static_cast<double>(places.size()) : most;
    }
  }
  return product;
}

void Nodes::price_tensor(Tensor t, Cost* cost) {
  const auto& arch = engine_.space.arch();
  const TensorClasses& classes = engine_.classes.tensors[t];
  auto& energy = cost->energy[t];
  auto& accesses = cost->accesses[t];
  for (int c = 0; c < classes.count; ++c) energy[c] = accesses[c] = 0.0;
  const bool written = t == kOutputs;
  const bool elide_fills = written && engine_.options.model.semantics == Semantics::kV4;
  double requests = unit_->steps;
  int inner = 0;
  for (const Unit::Site& site : unit_->sites_of(t)) {
    const Level& level = arch.levels[site.level];
    const double content = requests * (site.diagonal ? children(t, inner, site.level) : site.children);
    if (!site.outermost) requests = requested_by(site, t);
    const double reads = written ? std::max(0.0, content - site.compulsory) : content;
    const double updates = written ? content : 0.0;
    const double fills = site.outermost ? 0.0 : elide_fills ? std::max(0.0, requests - site.compulsory) : requests;
    const CeilDivide block = engine_.blocks[site.level];
    const double instances = unit_->instances[site.level];
    double* read_words = read_words_[site.level][t].data();
    double* written_words = written_words_[site.level][t].data();
    for (int c = 0; c < classes.count; ++c) {
      const CeilDivide words = classes.words[site.level][c];
      const double r = words(reads), u = words(updates), f = words(fills);
      read_words[c] = r;
      written_words[c] = u + f;
      energy[c] += access_energy(level, block(r), block(u), block(f), instances);
    }
    if (site.level + 1 == engine_.levels()) {
      for (int c = 0; c < classes.count; ++c) {
        accesses[c] = (read_words[c] + written_words[c]) * unit_->used[site.level];
      }
    }
    inner = site.level + 1;
  }
}

void Nodes::price_sharing(Cost* cost) {
  const WidthClasses& classes = engine_.classes;
  cost->overflow.clear();
  for (int l = 0; l < engine_.levels(); ++l) {
    const auto& size = engine_.space.arch().levels[l].size;
    if (!size) continue;
    const auto limit = static_cast<double>(*size);
    const auto words = [&](Tensor t, int c) {
      return (*unit_->keep)[l][t] ? classes.tensors[t].words[l][c](volume_[l][t]) : 0.0;
    };
    double widest = 0.0;
    int tensors = 0;
    for (const Tensor t : kAllTensors) {
      widest += words(t, classes.tensors[t].widest());
      tensors += (*unit_->keep)[l][t];
    }
    if (widest <= limit) continue;
    if (tensors == 1) {
      for (const Tensor t : kAllTensors) {
        for (int c = 0; (*unit_->keep)[l][t] && c < classes.tensors[t].count; ++c) {
          if (words(t, c) > limit) cost->energy[t][c] = cost->accesses[t][c] = kInfinity;
        }
      }
      continue;
    }
    cost->overflow.resize(classes.combinations(), 0);
    for (int w = 0; w < classes.tensors[kWeights].count; ++w) {
      for (int i = 0; i < classes.tensors[kInputs].count; ++i) {
        const double both = words(kWeights, w) + words(kInputs, i);
        for (int o = 0; o < classes.tensors[kOutputs].count; ++o) {
          cost->overflow[classes.index(w, i, o)] |= both + words(kOutputs, o) > limit;
        }
      }
    }
  }
}

void Nodes::price_cycles(Cost* cost) {
  const WidthClasses& classes = engine_.classes;
  const auto steps = static_cast<int64_t>(unit_->steps);
  cost->cycles = unit_->steps;
  cost->cycles_by_class.clear();
  for (int l = 0; l < engine_.levels(); ++l) {
    const Level& level = engine_.space.arch().levels[l];
    if (!level.read_bw && !level.write_bw && !level.shared_bw) continue;
    const auto& keep = (*unit_->keep)[l];
    const auto cycles = [&](const std::array<int, kTensors>& c) {
      std::array<double, kTensors> reads{}, writes{};
      for (const Tensor t : kAllTensors) {
        if (!keep[t]) continue;
        reads[t] = read_words_[l][t][c[t]];
        writes[t] = written_words_[l][t][c[t]];
      }
      return static_cast<double>(throttled_cycles(level, steps, reads, writes));
    };
    std::array<int, kTensors> widest;
    double reads = 0.0, writes = 0.0;
    for (const Tensor t : kAllTensors) {
      widest[t] = classes.tensors[t].widest();
      if (!keep[t]) continue;
      reads += read_words_[l][t][widest[t]];
      writes += written_words_[l][t][widest[t]];
    }
    // Far enough from every limit for rounding not to matter, level and classes cost no cycle.
    const auto far = [&](const std::optional<double>& limit, double demand) {
      return !limit || demand < *limit * unit_->steps * (1.0 - 1e-9);
    };
    if (far(level.read_bw, reads) && far(level.write_bw, writes) && far(level.shared_bw, reads + writes)) continue;
    const double most = cycles(widest);
    if (most <= cost->cycles && cost->cycles_by_class.empty()) continue;
    if (classes.combinations() == 1) {
      cost->cycles = std::max(cost->cycles, most);
      continue;
    }
    cost->cycles_by_class.resize(classes.combinations(), unit_->steps);
    // Classes of tensors that are not here change nothing: asked once for all of them.
    std::array<int, kTensors> c;
    const auto count = [&](Tensor t) { return keep[t] ? classes.tensors[t].count : 1; };
    for (c[kWeights] = 0; c[kWeights] < count(kWeights); ++c[kWeights]) {
      for (c[kInputs] = 0; c[kInputs] < count(kInputs); ++c[kInputs]) {
        for (c[kOutputs] = 0; c[kOutputs] < count(kOutputs); ++c[kOutputs]) {
          const double here = cycles(c);
          if (here <= unit_->steps) continue;
          const auto last = [&](Tensor t) { return keep[t] ? c[t] : classes.tensors[t].widest(); };
          for (int w = c[kWeights]; w <= last(kWeights); ++w) {
            for (int i = c[kInputs]; i <= last(kInputs); ++i) {
              for (int o = c[kOutputs]; o <= last(kOutputs); ++o) {
                double& worst = cost->cycles_by_class[classes.index(w, i, o)];
                worst = std::max(worst, here);
              }
            }
          }
        }
      }
    }
  }
}

void Nodes::price(Cost* cost) {
  list_loops();
  for (const Tensor t : kAllTensors) price_tensor(t, cost);
  price_sharing(cost);
  price_cycles(cost);
}

namespace {

// Builds the orders of one level's free loops from inside out and leaves out what cannot matter.
class OrderBuilder {
 public:
  struct View {
    const TensorShape* shape;
    bool single;  // no rank has two dimensions with loops: a tile that has moved in two ranks shares nothing any more
  };

  OrderBuilder(std::vector<View> views, std::vector<int8_t> before, std::vector<int8_t> loops)
      : views_(std::move(views)), placed_(std::move(before)), loops_(std::move(loops)), skip_(placed_.size()) {}

  std::vector<std::vector<int8_t>> build() {
    extend();
    return std::move(result_);
  }

 private:
  // Whether the order of what follows can still change the tensor's counts.
  bool open(const View& view) const {
    int ranks = 0, last = -1;
    for (const int8_t d : placed_) {
      const int rank = view.shape->rank_of[d];
      if (rank < 0) continue;
      if (view.shape->ranks[rank].regular) return false;
      if (rank != last) ++ranks;
      last = rank;
    }
    return ranks < 2 || !view.single;
  }

  void extend() {
    std::vector<int8_t> rest;
    for (const int8_t d : loops_) {
      if (std::find(placed_.begin() + static_cast<std::ptrdiff_t>(skip_), placed_.end(), d) == placed_.end()) {
        rest.push_back(d);
      }
    }
    std::vector<const View*> waiting;
    for (const View& view : views_) {
      if (open(view)) waiting.push_back(&view);
    }
    const auto moves = [&](int8_t d) { return waiting[0]->shape->relevant(d); };
    if (waiting.size() == 1 && waiting[0]->shape->regular) {
      // Nobody else minds: first what keeps this tensor in place.
      std::stable_partition(rest.begin(), rest.end(), [&](int8_t d) { return !moves(d); });
      waiting.clear();
    }
    if (waiting.empty() || rest.size() <= 1) {
      std::vector<int8_t> order(placed_.begin() + static_cast<std::ptrdiff_t>(skip_), placed_.end());
      order.insert(order.end(), rest.begin(), rest.end());
      result_.push_back(std::move(order));
      return;
    }
    for (const int8_t d : rest) {
      // Neighbours that both leave the one waiting tensor in place can change places: ascending is enough.
      if (waiting.size() == 1 && placed_.size() > skip_ && !moves(d) && !moves(placed_.back()) && d < placed_.back()) {
        continue;
      }
      placed_.push_back(d);
      extend();
      placed_.pop_back();
    }
  }

  std::vector<View> views_;
  std::vector<int8_t> placed_, loops_;
  size_t skip_;
  std::vector<std::vector<int8_t>> result_;
};

}  // namespace

std::vector<SlotOrder> Nodes::orders_to_try(int level) const {
  const SlotOrder& order = orders_[level];
  std::vector<int8_t> before, loops, after;
  for (int i = 0; i < order.count; ++i) {
    const int8_t d = order.dims[i];
    if (factors_[d][level] == 1.0) continue;
    (i < order.before ? before : i < order.before + order.free ? loops : after).push_back(d);
  }
  std::vector<OrderBuilder::View> views;
  for (const Tensor t : kAllTensors) {
    // Only what an inner level asks for depends on this one's order.
    const auto sites = unit_->sites_of(t);
    if (!std::any_of(sites.begin(), sites.end(),
                     [&](const Unit::Site& site) { return site.level < level && !site.outermost; })) {
      continue;
    }
    const TensorShape& shape = engine_.shapes[t];
    bool single = true;
    for (const auto& rank : shape.ranks) {
      int moving = 0;
      for (const Term& term : rank.terms) {
        moving += std::any_of(factors_[term.dim].begin(), factors_[term.dim].begin() + engine_.levels(),
                              [](double factor) { return factor > 1.0; });
      }
      single &= moving <= 1;
    }
    views.push_back({&shape, single});
  }
  std::vector<SlotOrder> result;
  for (const auto& free : OrderBuilder(std::move(views), before, loops).build()) {
    SlotOrder fixed;
    for (const auto* part :
         {static_cast<const std::vector<int8_t>*>(&before), &free, static_cast<const std::vector<int8_t>*>(&after)}) {
      for (const int8_t d : *part) fixed.dims[fixed.count++] = d;
    }
    fixed.before = fixed.count;
    result.push_back(fixed);
  }
  return result;
}

Mapping Nodes::mapping() const {
  Mapping result(engine_.levels());
  for (int l = 0; l < engine_.levels(); ++l) {
    result[l].keep = (*unit_->keep)[l];
    for (int i = 0; i < orders_[l].count; ++i) {
      const int d = orders_[l].dims[i];
      if (factors_[d][l] > 1.0) result[l].temporal.push_back({d, static_cast<int64_t>(factors_[d][l])});
    }
    for (int d = 0; d < engine_.dims(); ++d) {
      if (unit_->spatial->x[l][d] > 1) result[l].spatial_x.push_back({d, unit_->spatial->x[l][d]});
      if (unit_->spatial->y[l][d] > 1) result[l].spatial_y.push_back({d, unit_->spatial->y[l][d]});
    }
  }
  return result;
}

}  // namespace mixbit::hw
