#include "width_classes.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "text.h"

namespace mixbit::hw {

WidthClasses::WidthClasses(const Arch& arch, const WidthLists& lists, const ModelOptions& options)
    : partial_bits(lists.partial_bits) {
  const size_t levels = arch.levels.size();
  for (const Tensor t : kAllTensors) {
    const std::vector<int>& asked = lists.bits[t];
    if (asked.empty()) fail("widths: none for ", kTensorNames[t], ", expected at least one");
    // Native words hold one element, as the widest widths do.
    const auto effective = [](int bits) { return bits == 0 ? std::numeric_limits<int>::max() : bits; };
    std::vector<size_t> order(asked.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return effective(asked[a]) < effective(asked[b]); });
    TensorClasses& classes = tensors[t];
    classes.words.resize(levels);
    classes.class_of.resize(asked.size());
    std::vector<int64_t> previous;
    for (const size_t i : order) {
      Widths widths{{}, t == kOutputs ? partial_bits : 0};
      widths.bits[t] = asked[i];
      std::vector<int64_t> key;
      for (const auto& level : packing(arch, widths)) key.push_back(level[t]);
      const std::vector<int64_t> operands = key;
      if (options.scale_mac && t != kOutputs) key.push_back(asked[i]);
      if (classes.count == 0 || key != previous) {
        if (classes.count == kMaxClasses) {
          fail("widths: more than ", kMaxClasses, " classes of ", kTensorNames[t], "; sweep fewer widths at once");
        }
        ++classes.count;
        classes.bits.push_back(asked[i]);
        for (size_t l = 0; l < levels; ++l) classes.words[l].emplace_back(operands[l]);
        previous = key;
      }
      classes.class_of[i] = classes.count - 1;
    }
  }
  for (int w = 0; w < tensors[kWeights].count; ++w) {
    for (int i = 0; i < tensors[kInputs].count; ++i) mac_pj.push_back(mac_energy(arch, widths(w, i, 0), options));
  }
}

Widths WidthClasses::widths(int weights, int inputs, int outputs) const {
  return {{tensors[kWeights].bits[weights], tensors[kInputs].bits[inputs], tensors[kOutputs].bits[outputs]},
          partial_bits};
}

}  // namespace mixbit::hw
