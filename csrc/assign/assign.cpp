#include <mixbit/assign/assign.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mixbit::assign {

namespace {

constexpr double kSlack = 1e-12;
// Scores closer than this are one score: noise ratios come from dB, whose rounding must not decide.
constexpr double kTie = 1e-9;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

size_t at(const Problem& p, int64_t layer, int64_t act, int64_t weight) {
  return static_cast<size_t>((layer * p.acts + act) * p.weights + weight);
}

void check(const Problem& p) {
  const auto size = static_cast<size_t>(p.layers * p.acts * p.weights);
  if (p.layers < 1 || p.acts < 1 || p.weights < 1 || p.nsr.size() != size || p.allowed.size() != size ||
      p.groups.size() != static_cast<size_t>(p.layers)) {
    throw std::invalid_argument("problem: sizes do not fit layers, acts and weights");
  }
}

void check(const Problem& p, const Cost& cost) {
  if (cost.reader.empty()) {
    if (cost.values.size() != p.nsr.size()) {
      throw std::invalid_argument("cost: expected one value per layer, act and weight option");
    }
    return;
  }
  if (cost.maximum) throw std::invalid_argument("cost: a maximum cannot depend on the widths of outputs");
  if (cost.reader.size() != static_cast<size_t>(p.layers) ||
      cost.values.size() != p.nsr.size() * static_cast<size_t>(p.acts)) {
    throw std::invalid_argument(
        "cost: expected a reader per layer and one value per layer, act, weight and output act");
  }
  for (const int64_t reader : cost.reader) {
    if (reader < -1 || reader >= p.layers) throw std::invalid_argument("cost: reader is no layer");
  }
}

// The cost of a layer in a choice.
double cost_of(const Problem& p, const Cost& cost, const Choice& c, int64_t layer) {
  const auto i = static_cast<size_t>(layer);
  const size_t place = at(p, layer, c.act[i], c.weight[i]);
  if (cost.reader.empty()) return cost.values[place];
  const int64_t out = cost.reader[i] < 0 ? 0 : c.act[static_cast<size_t>(cost.reader[i])];
  return cost.values[place * static_cast<size_t>(p.acts) + static_cast<size_t>(out)];
}

// Layers of each group, groups in order of their first layer.
std::vector<std::vector<int64_t>> members(const Problem& p) {
  std::vector<std::vector<int64_t>> result;
  std::vector<int64_t> names;
  for (int64_t l = 0; l < p.layers; ++l) {
    const auto found = std::find(names.begin(), names.end(), p.groups[static_cast<size_t>(l)]);
    if (found == names.end()) {
      names.push_back(p.groups[static_cast<size_t>(l)]);
      result.push_back({l});
    } else {
      result[static_cast<size_t>(found - names.begin())].push_back(l);
    }
  }
  return result;
}

// A move changes the act of a group or the weight of a layer; for an act move every member keeps its weight if that is
// allowed at the new act, else takes the nearest wider, else the nearest narrower allowed one. Empty if there is none.
using Changes = std::vector<std::pair<int64_t, std::pair<int64_t, int64_t>>>;  // layer -> (act, weight)

int64_t fitting_weight(const Problem& p, int64_t layer, int64_t act, int64_t weight) {
  for (int64_t w = weight; w < p.weights; ++w) {
    if (p.allowed[at(p, layer, act, w)]) return w;
  }
  for (int64_t w = weight - 1; w >= 0; --w) {
    if (p.allowed[at(p, layer, act, w)]) return w;
  }
  return -1;
}

struct Move {
  Step step{};
  Changes changes;
};

// All moves of one kind of direction (down: narrower) from a choice, layer order, weights before acts.
std::vector<Move> moves(const Problem& p, const std::vector<std::vector<int64_t>>& groups, const Choice& c, bool down) {
  std::vector<Move> found;
  for (const auto& group : groups) {
    for (const int64_t l : group) {
      const auto i = static_cast<size_t>(l);
      for (int64_t w = 0; w < p.weights; ++w) {
        if ((down ? w < c.weight[i] : w > c.weight[i]) && p.allowed[at(p, l, c.act[i], w)]) {
          found.push_back({{l, false}, {{l, {c.act[i], w}}}});
        }
      }
    }
    const int64_t act_now = c.act[static_cast<size_t>(group[0])];
    for (int64_t a = 0; a < p.acts; ++a) {
      if (down ? a >= act_now : a <= act_now) continue;
      Changes changes;
      for (const int64_t l : group) {
        const int64_t w = fitting_weight(p, l, a, c.weight[static_cast<size_t>(l)]);
        if (w < 0) {
          changes.clear();
          break;
        }
        changes.push_back({l, {a, w}});
      }
      if (!changes.empty()) found.push_back({{group[0], true}, std::move(changes)});
    }
  }
  // Layer order decides ties, whatever the groups.
  std::stable_sort(found.begin(), found.end(),
                   [](const Move& a, const Move& b) { return a.step.layer < b.step.layer; });
  return found;
}

Choice after(const Choice& c, const Changes& changes) {
  Choice result = c;
  for (const auto& [layer, option] : changes) {
    result.act[static_cast<size_t>(layer)] = option.first;
    result.weight[static_cast<size_t>(layer)] = option.second;
  }
  return result;
}

double change_of(const Problem& p, const std::vector<double>& values, const Choice& c, const Changes& changes) {
  double change = 0.0;
  for (const auto& [layer, option] : changes) {
    const auto i = static_cast<size_t>(layer);
    const double before = values[at(p, layer, c.act[i], c.weight[i])];
    const double now = values[at(p, layer, option.first, option.second)];
    if (std::isinf(before) && std::isinf(now)) continue;
    change += now - before;
  }
  return change;
}

double saved(const Problem& p, const Cost& cost, const Choice& c, const Changes& changes) {
  if (cost.maximum) return total_cost(p, cost, c) - total_cost(p, cost, after(c, changes));
  if (cost.reader.empty()) return -change_of(p, cost.values, c, changes);
  // What moves, and what writes for it: a new act is the output width of those layers.
  std::vector<bool> moved(static_cast<size_t>(p.layers), false);
  for (const auto& [layer, option] : changes) moved[static_cast<size_t>(layer)] = true;
  const Choice next = after(c, changes);
  double sum = 0.0;
  for (int64_t l = 0; l < p.layers; ++l) {
    const int64_t reader = cost.reader[static_cast<size_t>(l)];
    if (moved[static_cast<size_t>(l)] || (reader >= 0 && moved[static_cast<size_t>(reader)])) {
      sum += cost_of(p, cost, c, l) - cost_of(p, cost, next, l);
    }
  }
  return sum;
}

// Order of (gain, added noise): gain per noise, free gains first and the larger of them.
bool better(double gain, double noise, double best_gain, double best_noise) {
  if (noise <= 0.0 || best_noise <= 0.0) {
    if (noise <= 0.0 && best_noise <= 0.0) return gain > best_gain;
    return noise <= 0.0;
  }
  return gain / noise > best_gain / best_noise * (1.0 + kTie);
}

bool within(double value, double limit) { return value <= limit + kSlack * std::abs(limit); }

}  // namespace

double total_nsr(const Problem& p, const Choice& c) {
  double sum = 0.0;
  for (int64_t l = 0; l < p.layers; ++l) {
    sum += p.nsr[at(p, l, c.act[static_cast<size_t>(l)], c.weight[static_cast<size_t>(l)])];
  }
  return sum;
}

double total_cost(const Problem& p, const Cost& cost, const Choice& c) {
  double total = 0.0;
  for (int64_t l = 0; l < p.layers; ++l) {
    const double value = cost_of(p, cost, c, l);
    total = cost.maximum ? std::max(total, value) : total + value;
  }
  return total;
}

Choice widest(const Problem& p) {
  check(p);
  Choice c;
  c.act.assign(static_cast<size_t>(p.layers), -1);
  c.weight.assign(static_cast<size_t>(p.layers), -1);
  for (const auto& group : members(p)) {
    int64_t act = p.acts - 1;
    const auto usable = [&](int64_t a) {
      return std::all_of(group.begin(), group.end(),
                         [&](int64_t l) { return fitting_weight(p, l, a, p.weights - 1) >= 0; });
    };
    while (act >= 0 && !usable(act)) --act;
    if (act < 0) {
      throw std::invalid_argument("no option is allowed for layer " + std::to_string(group[0]) +
                                  " and the layers that read the same tensor");
    }
    for (const int64_t l : group) {
      c.act[static_cast<size_t>(l)] = act;
      c.weight[static_cast<size_t>(l)] = fitting_weight(p, l, act, p.weights - 1);
    }
  }
  return c;
}

GreedyResult greedy_target(const Problem& p, const Cost& cost, double limit) {
  check(p, cost);
  GreedyResult result;
  result.choice = widest(p);
  const auto groups = members(p);
  while (true) {
    const double noise_now = total_nsr(p, result.choice);
    const Move* best = nullptr;
    double best_gain = 0.0;
    double best_noise = 0.0;
    const auto candidates = moves(p, groups, result.choice, /*down=*/true);
    for (const Move& move : candidates) {
      const double gain = saved(p, cost, result.choice, move.changes);
      const double noise = change_of(p, p.nsr, result.choice, move.changes);
      // A step that was out of reach before the search (widest already over the limit) may still lower the noise.
      if (!(gain > 0.0) || (noise > 0.0 && !within(noise_now + noise, limit))) continue;
      if (best == nullptr || better(gain, noise, best_gain, best_noise)) {
        best = &move;
        best_gain = gain;
        best_noise = noise;
      }
    }
    if (best == nullptr) break;
    result.choice = after(result.choice, best->changes);
    result.steps.push_back(best->step);
  }
  result.feasible = within(total_nsr(p, result.choice), limit);
  return result;
}

GreedyResult greedy_budget(const Problem& p, const std::vector<Cost>& costs) {
  GreedyResult result;
  result.choice = widest(p);
  for (const Cost& cost : costs) check(p, cost);
  const auto groups = members(p);
  const auto fits = [&](const Choice& c) {
    return std::all_of(costs.begin(), costs.end(),
                       [&](const Cost& cost) { return within(total_cost(p, cost, c), cost.budget); });
  };
  const auto pressure = [&](const Cost& cost, double amount) {
    return amount / (cost.budget > 0.0 ? cost.budget : 1.0);
  };
  while (!fits(result.choice)) {
    const Move* best = nullptr;
    double best_gain = 0.0;
    double best_noise = 0.0;
    const auto candidates = moves(p, groups, result.choice, /*down=*/true);
    for (const Move& move : candidates) {
      double gain = 0.0;
      for (const Cost& cost : costs) {
        if (cost.maximum) {
          // Several layers can hold the maximum: what counts is by how much the entries above the budget shrink.
          for (const auto& [layer, option] : move.changes) {
            const auto i = static_cast<size_t>(layer);
            const double before = cost.values[at(p, layer, result.choice.act[i], result.choice.weight[i])];
            const double now = cost.values[at(p, layer, option.first, option.second)];
            gain += pressure(cost, std::max(before - cost.budget, 0.0) - std::max(now - cost.budget, 0.0));
          }
        } else if (!within(total_cost(p, cost, result.choice), cost.budget)) {
          gain += pressure(cost, saved(p, cost, result.choice, move.changes));
        }
      }
      const double noise = change_of(p, p.nsr, result.choice, move.changes);
      if (gain > 0.0 && (best == nullptr || better(gain, noise, best_gain, best_noise))) {
        best = &move;
        best_gain = gain;
        best_noise = noise;
      }
    }
    if (best == nullptr) break;
    result.choice = after(result.choice, best->changes);
    result.steps.push_back(best->step);
  }
  result.feasible = fits(result.choice);
  while (result.feasible) {
    // What the last step overshot is given back where it lowers the noise most per cost.
    const Move* best = nullptr;
    double best_gain = 0.0;
    double best_price = 0.0;
    const auto candidates = moves(p, groups, result.choice, /*down=*/false);
    for (const Move& move : candidates) {
      const double gain = -change_of(p, p.nsr, result.choice, move.changes);
      if (!(gain > 0.0) || !fits(after(result.choice, move.changes))) continue;
      double price = 0.0;
      for (const Cost& cost : costs) price += pressure(cost, -saved(p, cost, result.choice, move.changes));
      if (best == nullptr || better(gain, price, best_gain, best_price)) {
        best = &move;
        best_gain = gain;
        best_price = price;
      }
    }
    if (best == nullptr) break;
    result.choice = after(result.choice, best->changes);
    result.steps.push_back(best->step);
  }
  return result;
}

std::vector<int64_t> threshold(const std::vector<double>& gamma, int64_t widths, const std::vector<double>& shares,
                               const std::vector<int64_t>& groups, double target_db) {
  const auto layers = static_cast<int64_t>(shares.size());
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  if (widths < 1 || gamma.size() != shares.size() * static_cast<size_t>(widths) || groups.size() != shares.size()) {
    throw std::invalid_argument("threshold: sizes do not fit");
  }
  if (!(total > 0.0) || std::any_of(shares.begin(), shares.end(), [](double s) { return s < 0.0; })) {
    throw std::invalid_argument("threshold: shares must be >= 0 and not all zero");
  }
  std::vector<int64_t> chosen(static_cast<size_t>(layers), widths - 1);
  for (int64_t l = 0; l < layers; ++l) {
    const double share = shares[static_cast<size_t>(l)];
    const double needed = share > 0.0 ? target_db + 10.0 * std::log10(total / share) : kInfinity;
    for (int64_t b = 0; b < widths; ++b) {
      if (gamma[static_cast<size_t>(l * widths + b)] >= needed) {
        chosen[static_cast<size_t>(l)] = b;
        break;
      }
    }
  }
  // Layers that read one tensor take the widest of them.
  std::vector<int64_t> result = chosen;
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t m = 0; m < layers; ++m) {
      if (groups[static_cast<size_t>(l)] == groups[static_cast<size_t>(m)]) {
        result[static_cast<size_t>(l)] = std::max(result[static_cast<size_t>(l)], chosen[static_cast<size_t>(m)]);
      }
    }
  }
  return result;
}

std::vector<Step> aimet_order(const std::vector<double>& gamma, int64_t widths, std::vector<int64_t>* width_of_step) {
  if (widths < 1 || gamma.size() % static_cast<size_t>(widths) != 0) {
    throw std::invalid_argument("aimet_order: sizes do not fit");
  }
  const auto layers = static_cast<int64_t>(gamma.size()) / widths;
  std::vector<std::pair<int64_t, int64_t>> entries;
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t b = 0; b + 1 < widths; ++b) entries.push_back({l, b});
  }
  std::stable_sort(entries.begin(), entries.end(), [&](const auto& x, const auto& y) {
    const double gx = gamma[static_cast<size_t>(x.first * widths + x.second)];
    const double gy = gamma[static_cast<size_t>(y.first * widths + y.second)];
    if (gx != gy) return gx > gy;
    if (x.second != y.second) return x.second > y.second;
    return x.first < y.first;
  });
  std::vector<Step> steps;
  width_of_step->clear();
  for (const auto& [layer, width] : entries) {
    steps.push_back({layer, true});
    width_of_step->push_back(width);
  }
  return steps;
}

}  // namespace mixbit::assign
