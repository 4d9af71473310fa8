#include <mixbit/hw/mapspace.h>

#include <algorithm>
#include <functional>

#include "text.h"

namespace mixbit::hw {

namespace {

// Calls f(factor) for the divisors of n, ascending.
template <typename F>
void for_divisors(int64_t n, const F& f) {
  std::vector<int64_t> large;
  for (int64_t d = 1; d * d <= n; ++d) {
    if (n % d != 0) continue;
    f(d);
    if (d * d != n) large.push_back(n / d);
  }
  for (auto d = large.rbegin(); d != large.rend(); ++d) f(*d);
}

}  // namespace

double Factorizations::count(int64_t n, size_t place) {
  if (place == rules_.size()) return n == 1 ? 1.0 : 0.0;
  const auto key = std::make_pair(place, n);
  if (const auto found = counts_.find(key); found != counts_.end()) return found->second;
  double sum = 0.0;
  for_divisors(n, [&](int64_t factor) {
    if (rules_[place].admits(factor)) sum += count(n / factor, place + 1);
  });
  return counts_[key] = sum;
}

std::vector<std::vector<int64_t>> Factorizations::all(int64_t n) const {
  std::vector<std::vector<int64_t>> result;
  std::vector<int64_t> factors(rules_.size(), 1);
  const std::function<void(size_t, int64_t)> visit = [&](size_t place, int64_t rest) {
    if (place == rules_.size()) {
      if (rest == 1) result.push_back(factors);
      return;
    }
    for_divisors(rest, [&](int64_t factor) {
      if (!rules_[place].admits(factor)) return;
      factors[place] = factor;
      visit(place + 1, rest / factor);
    });
  };
  visit(0, n);
  return result;
}

std::vector<int64_t> Factorizations::pick(int64_t n, double u) {
  std::vector<int64_t> factors;
  double index = u * count(n);
  for (size_t place = 0; place < rules_.size(); ++place) {
    int64_t chosen = 0;
    bool done = false;
    for_divisors(n, [&](int64_t factor) {
      if (done || !rules_[place].admits(factor)) return;
      const double below = count(n / factor, place + 1);
      if (below == 0.0) return;
      chosen = factor;  // the last possible one where rounding leaves the index at the end
      if (index < below) {
        done = true;
      } else {
        index -= below;
      }
    });
    factors.push_back(chosen);
    n /= chosen;
  }
  return factors;
}

MapSpace::MapSpace(const Arch& arch, const Layer& layer) : arch_(arch), layer_(layer) {
  check(arch_);
  check(layer_);
  for (int l = 0; l < levels(); ++l) {
    rules_.emplace_back();
    for (const LoopKind kind : {kSpatialX, kSpatialY, kTemporal}) {
      for (int d = 0; d < dims(); ++d) rules_[l][kind].push_back(rule(l, kind, d));
    }
    read_order(l);
  }
  read_keeps();
  for (int d = 0; d < dims(); ++d) {
    std::vector<FactorRule> places;
    for (const LoopKind kind : {kSpatialX, kSpatialY, kTemporal}) {
      for (int l = 0; l < levels(); ++l) places.push_back(rules_[l][kind][d]);
    }
    factorizations_.emplace_back(std::move(places));
    if (factorizations_.back().count(layer_.bounds[d]) == 0.0) {
      fail("constraints: no mapping, since no factors of ", layer_.dims[d], " that the levels allow multiply to ",
           layer_.bounds[d]);
    }
  }
}

FactorRule MapSpace::rule(int level, LoopKind kind, int dim) {
  const LoopConstraint& given = arch_.levels[level].constraints.loops[kind];
  const std::string& name = layer_.dims[dim];
  const int64_t bound = layer_.bounds[dim];
  const int64_t fanout = kind == kSpatialX ? arch_.fanout_x(level) : kind == kSpatialY ? arch_.fanout_y(level) : 0;
  FactorRule result;
  if (fanout == 1 || bound == 1 ||
      (given.dims && std::find(given.dims->begin(), given.dims->end(), name) == given.dims->end())) {
    result.fixed = 1;
    return result;
  }
  if (const auto max = given.max_factors.find(name); max != given.max_factors.end()) result.max = max->second;
  const auto fixed = given.factors.find(name);
  if (fixed == given.factors.end()) return result;
  const int64_t factor = fixed->second == kWholeDim ? bound : fixed->second;
  if (bound % factor == 0) {
    result.fixed = factor;
  } else {
    relaxed_.push_back(text(arch_.levels[level].name, ".", kLoopKindNames[kind], ".", name, "=", factor));
  }
  return result;
}

void MapSpace::read_order(int level) {
  const auto& given = arch_.levels[level].constraints.loops[kTemporal].order;
  const std::vector<FactorRule>& rules = rules_[level][kTemporal];
  LoopOrder order;
  std::vector<bool> named(layer_.dims.size(), false);
  std::vector<int>* into = &order.before;
  for (const std::string& name : given.value_or(std::vector<std::string>{})) {
    const auto found = std::find(layer_.dims.begin(), layer_.dims.end(), name);
    if (name == kAnyOrder) into = &order.after;
    if (found == layer_.dims.end()) continue;
    const auto d = static_cast<int>(found - layer_.dims.begin());
    named[d] = true;
    if (rules[d].fixed != 1) into->push_back(d);
  }
  for (int d = 0; d < dims(); ++d) {
    if (!named[d] && rules[d].fixed != 1) order.free.push_back(d);
  }
  if (level == 0) {
    order.before.insert(order.before.end(), order.free.begin(), order.free.end());
    order.free.clear();
  }
  for (size_t n = 2; n <= order.free.size(); ++n) order_count_ *= static_cast<double>(n);
  orders_.push_back(std::move(order));
}

void MapSpace::read_keeps() {
  keeps_ = {KeepChoice(arch_.levels.size())};
  for (int l = 0; l < levels(); ++l) {
    for (const Tensor t : kAllTensors) {
      const auto& given = arch_.levels[l].constraints.keep[t];
      const bool open = !given && l + 1 < levels();
      const size_t known = keeps_.size();
      for (size_t i = 0; i < known; ++i) {
        keeps_[i][l][t] = given.value_or(true);
        if (!open) continue;
        keeps_.push_back(keeps_[i]);
        keeps_.back()[l][t] = false;
      }
    }
  }
  for (const Tensor t : kAllTensors) {
    std::erase_if(keeps_, [&](const KeepChoice& keep) {
      return std::none_of(keep.begin(), keep.end(), [&](const auto& at) { return at[t]; });
    });
    if (keeps_.empty()) fail("constraints: no mapping, since every level bypasses ", kTensorNames[t]);
  }
}

double MapSpace::total() const {
  double product = orders() * static_cast<double>(keeps_.size());
  for (int d = 0; d < dims(); ++d) product *= Factorizations(factorizations_[d]).count(layer_.bounds[d]);
  return product;
}

std::vector<SpatialChoice> MapSpace::spatial_choices() const {
  struct Place {
    int level;
    LoopKind kind;
    int64_t fanout;
  };
  std::vector<Place> places;
  for (int l = 0; l < levels(); ++l) {
    if (arch_.fanout_x(l) > 1) places.push_back({l, kSpatialX, arch_.fanout_x(l)});
    if (arch_.fanout_y(l) > 1) places.push_back({l, kSpatialY, arch_.fanout_y(l)});
  }
  // Which factors the temporal loops can take up, asked once for each dimension and rest.
  std::vector<Factorizations> temporal;
  for (int d = 0; d < dims(); ++d) {
    std::vector<FactorRule> rules;
    for (int l = 0; l < levels(); ++l) rules.push_back(rules_[l][kTemporal][d]);
    temporal.emplace_back(std::move(rules));
  }
  std::vector<SpatialChoice> result;
  const std::vector<std::vector<int64_t>> ones(arch_.levels.size(), std::vector<int64_t>(layer_.dims.size(), 1));
  SpatialChoice choice{ones, ones};
  std::vector<int64_t> rest = layer_.bounds;
  size_t deepest = 0;
  const std::function<void(size_t, int, int64_t)> visit = [&](size_t p, int d, int64_t used) {
    if (p == places.size()) {
      for (int e = 0; e < dims(); ++e) {
        if (temporal[e].count(rest[e]) == 0.0) return;
      }
      result.push_back(choice);
      return;
    }
    deepest = std::max(deepest, p);
    if (d == dims()) return visit(p + 1, 0, 1);
    const Place& place = places[p];
    const FactorRule& rule = rules_[place.level][place.kind][d];
    int64_t& factor = (place.kind == kSpatialX ? choice.x : choice.y)[place.level][d];
    for_divisors(rest[d], [&](int64_t f) {
      if (!rule.admits(f) || used * f > place.fanout) return;
      factor = f;
      rest[d] /= f;
      visit(p, d + 1, used * f);
      rest[d] *= f;
    });
    factor = 1;
  };
  visit(0, 0, 1);
  if (result.empty()) {
    const Place& place = places[deepest];
    fail("constraints: no mapping, since no factors that level ", arch_.levels[place.level].name, " allows in ",
         place.kind == kSpatialX ? "X" : "Y", " fit its fan-out of ", place.fanout);
  }
  return result;
}

std::vector<std::vector<int64_t>> MapSpace::temporal_choices(int dim, int64_t rest) const {
  std::vector<FactorRule> rules;
  for (int l = 0; l < levels(); ++l) rules.push_back(rules_[l][kTemporal][dim]);
  return Factorizations(std::move(rules)).all(rest);
}

}  // namespace mixbit::hw
