#pragma once

// Bit allocation under a noise target or cost budgets. Standard library only; bad arguments throw
// std::invalid_argument.

#include <cstdint>
#include <vector>

namespace mixbit::assign {

// One cost of every option. A total is the sum over layers or their maximum.
struct Cost {
  std::vector<double> values;  // [layers, acts, weights], or with readers [layers, acts, weights, acts]
  bool maximum = false;
  double budget = 0.0;  // used by budget searches only
  // [layers] or empty: the layer that reads this one's output, whose act option is then the last index of `values`; -1
  // where the output's width is fixed (index 0). Sums only.
  std::vector<int64_t> reader = {};
};

// What can be chosen: for each input group one act option, for each layer one weight option.
struct Problem {
  int64_t layers = 0;
  int64_t acts = 0;
  int64_t weights = 0;
  std::vector<double> nsr;       // [layers, acts, weights]: noise-to-signal ratio, +inf allowed
  std::vector<uint8_t> allowed;  // [layers, acts, weights]
  std::vector<int64_t> groups;   // [layers]: layers of one group share the act option
};

// act and weight option of each layer; a layer's act is its group's.
struct Choice {
  std::vector<int64_t> act;
  std::vector<int64_t> weight;
};

// Totals of a choice, summed in layer order.
double total_nsr(const Problem& problem, const Choice& choice);
double total_cost(const Problem& problem, const Cost& cost, const Choice& choice);

// The widest allowed options (largest act of each group, then largest weight). Throws where a group has none.
Choice widest(const Problem& problem);

// One step of a greedy search: the layer (or the first layer of the group) that moved.
struct Step {
  int64_t layer;
  bool is_act;
};

struct GreedyResult {
  Choice choice;
  bool feasible = false;
  std::vector<Step> steps;
};

// Starts at the widest options and takes, again and again, the step down that saves most cost per added
// noise-to-signal ratio and keeps the sum of ratios within `limit` (relative slack 1e-12). Ties: the earlier layer.
GreedyResult greedy_target(const Problem& problem, const Cost& cost, double limit);

// Starts at the widest options and steps down, most cost (as a share of the violated budgets) per added ratio first,
// until every budget holds; then steps up again where that lowers the noise and no budget breaks.
GreedyResult greedy_budget(const Problem& problem, const std::vector<Cost>& costs);

// gamma: [layers, widths] in dB, non-decreasing along widths; shares: [layers], each >= 0, some > 0. The narrowest
// width with gamma >= target + 10 log10(sum of shares / share), else the widest; groups take their widest member's.
std::vector<int64_t> threshold(const std::vector<double>& gamma, int64_t widths, const std::vector<double>& shares,
                               const std::vector<int64_t>& groups, double target_db);

// All (layer, width index < widths - 1), highest gamma first; ties: wider first, then the earlier layer. Flipping
// layers down in this order is the second phase of the AIMET flow.
std::vector<Step> aimet_order(const std::vector<double>& gamma, int64_t widths, std::vector<int64_t>* width_of_step);

}  // namespace mixbit::assign
