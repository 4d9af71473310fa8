#pragma once

// The counting rules of a loop nest, shared by the model of one mapping and the search.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <set>
#include <vector>

#include <mixbit/hw/model.h>

namespace mixbit::hw {

using RankVector = std::array<int64_t, kMaxRanks>;

// evaluate() for an architecture and a layer that check() has passed.
Evaluation evaluate_checked(const Arch& arch, const Layer& layer, const Mapping& mapping, const Widths& widths,
                            const ModelOptions& options);

// A temporal loop as a tensor sees it: its bound and how far one step moves the tile in each rank.
struct Step {
  int64_t bound;
  RankVector move;
};

// Elements of a tile that moves by `move`, that were not in it before.
inline int64_t new_elements(const RankVector& extent, const RankVector& move, int ranks, int64_t volume) {
  int64_t overlap = 1;
  for (int r = 0; r < ranks; ++r) overlap *= std::max<int64_t>(0, extent[r] - std::abs(move[r]));
  return volume - overlap;
}

// Elements that one instance asks of its parent while `steps` (inner to outer, bounds >= 2) run around its tile.
template <Semantics semantics, Reuse reuse>
int64_t requested(const Step* steps, int count, const RankVector& extent, int ranks, int64_t volume) {
  RankVector before{};  // how far the inner loops have moved when they wrap
  RankVector reference{};
  bool have_reference = false;
  int64_t reference_fetch = 0;
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) {
    const Step& step = steps[i];
    RankVector move{};
    bool moves = false;
    for (int r = 0; r < ranks; ++r) {
      move[r] = step.move[r] - before[r];
      moves |= move[r] != 0;
      before[r] += reuse == Reuse::kSampled ? step.move[r] : (step.bound - 1) * step.move[r];
    }
    int64_t fetch;
    if constexpr (reuse == Reuse::kWindow) {
      fetch = new_elements(extent, move, ranks, volume);
    } else if (semantics == Semantics::kV4 && !moves) {
      fetch = 0;
    } else if (!have_reference) {
      have_reference = true;
      reference = move;
      fetch = reference_fetch = new_elements(extent, move, ranks, volume);
    } else {
      fetch = move == reference ? reference_fetch : volume;
    }
    sum = sum * step.bound + (step.bound - 1) * fetch;
  }
  return volume + sum;
}

// Different tiles among the instances that spatial loops (bounds and moves) address.
inline int64_t distinct_children(const std::vector<Step>& loops) {
  // Loops that move the tile in ranks of their own multiply; only those that share a rank can meet at one place.
  int64_t product = 1;
  RankVector moving{};
  bool meet = false;
  for (const Step& loop : loops) {
    bool moves = false;
    for (int r = 0; r < kMaxRanks; ++r) {
      if (loop.move[r] == 0) continue;
      moves = true;
      meet |= ++moving[r] > 1;
    }
    if (moves) product *= loop.bound;
  }
  if (!meet) return product;
  std::set<RankVector> places = {RankVector{}};
  for (const Step& loop : loops) {
    std::set<RankVector> next;
    for (const RankVector& place : places) {
      RankVector moved = place;
      for (int64_t i = 0; i < loop.bound; ++i) {
        next.insert(moved);
        for (int r = 0; r < kMaxRanks; ++r) moved[r] += loop.move[r];
      }
    }
    places = std::move(next);
  }
  return static_cast<int64_t>(places.size());
}

}  // namespace mixbit::hw
