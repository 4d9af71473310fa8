#include <mixbit/hw/pe.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace mixbit::hw {

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string shown(double value) {
  return value == std::floor(value) && std::fabs(value) < 1e15 ? std::to_string(static_cast<int64_t>(value))
                                                               : std::to_string(value);
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int power_of_two(int bits) {
  int rounded = 2;
  while (rounded < bits) rounded *= 2;
  return rounded;
}

constexpr int64_t power(int bits) { return int64_t{1} << bits; }

void check_widths(int weight_bits, int act_bits) {
  for (const auto& [bits, name] : {std::pair{weight_bits, "weight bits"}, std::pair{act_bits, "act bits"}}) {
    if (bits < 1 || bits > kMaxOperandBits) {
      fail(std::string(name) + ": " + std::to_string(bits) + ", expected a whole number from 1 to " +
           std::to_string(kMaxOperandBits));
    }
  }
}

// One multiplier pass takes this many bits of each operand, and an element makes this many passes a cycle.
struct Slice {
  int weight;
  int act;
  int passes_a_cycle;
};

Slice slice_of(Pe pe) {
  switch (pe) {
    case Pe::kSlices:
    case Pe::kBitFusionLike:
      return {2, 2, 4};
    case Pe::kBaseLsb:
      return {3, 4, 1};  // two bits for the multiplier and one for the lane
    case Pe::kBitSerial:
    case Pe::kUnpuLike:
      return {1, kMaxOperandBits, 1};
    case Pe::kStripesLike:
      return {kMaxOperandBits, 1, 1};
  }
  return {1, 1, 1};
}

// Weights of several widths in one layer run at their own, or all at the widest.
bool mixes_widths(Pe pe) { return pe == Pe::kSlices || pe == Pe::kBaseLsb || pe == Pe::kBitSerial; }

// UNPU's multiplication by look-up tables saves this share of a fixed-point one's energy (KAIST record
// 10203/250504: 53.6, 41, 27.2 and 23.1 % at 1, 4, 8 and 16 bits of weights); straight lines between.
double unpu_saving(int weight_bits) {
  constexpr std::array<std::pair<double, double>, 4> kPublished = {
      {{1.0, 0.536}, {4.0, 0.41}, {8.0, 0.272}, {16.0, 0.231}}};
  size_t i = 0;
  while (i + 2 < kPublished.size() && weight_bits > kPublished[i + 1].first) ++i;
  const auto [x0, y0] = kPublished[i];
  const auto [x1, y1] = kPublished[i + 1];
  return y0 + (y1 - y0) * (weight_bits - x0) / (x1 - x0);
}

// The partial product of one pass over `bits` bits of a weight. Up to two of them are the multiplier's alone.
int64_t pass_product(Pe pe, int64_t weight, int bits, int64_t act) {
  if (pe == Pe::kBaseLsb && bits > 2) {
    const int64_t lsb = weight & 1;
    const int64_t base = (weight - lsb) / 2;
    return 2 * (base * act) + (lsb != 0 ? act : 0);
  }
  if (slice_of(pe).weight == 1) return weight == 0 ? 0 : weight < 0 ? -act : act;
  if (slice_of(pe).act == 1) return act == 0 ? 0 : weight;
  return weight * act;
}

void check(const PeOptions& options) {
  if (options.count < 1) fail("count=" + std::to_string(options.count) + ": expected a whole number from 1");
  const std::pair<double, const char*> numbers[] = {{options.mac, "mac"},
                                                    {options.add, "add"},
                                                    {options.accumulator_bits, "accumulator_bits"},
                                                    {options.dram, "dram"},
                                                    {options.buffer, "buffer"},
                                                    {options.weight_dram_reads, "weight_dram_reads"},
                                                    {options.weight_buffer_reads, "weight_buffer_reads"},
                                                    {options.act_buffer_accesses, "act_buffer_accesses"},
                                                    {options.act_buffer_bits, "act_buffer_bits"},
                                                    {options.control, "control"}};
  for (const auto& [value, name] : numbers) {
    if (!(value >= 0.0 && value <= 1e15)) {
      fail(std::string(name) + "=" + shown(value) + ": expected a number from 0 to 1e15");
    }
  }
}

void check(const PeLayer& layer) {
  check_widths(layer.base_bits, layer.act_bits);
  if (!(layer.flagged[0] >= layer.flagged[1] && layer.flagged[1] >= 0.0 && layer.flagged[0] <= 1.0)) {
    fail("extra levels: shares of " + shown(layer.flagged[0]) + " and " + shown(layer.flagged[1]) +
         ", expected shares from 0 to 1, the second within the first");
  }
  const int widest = layer.base_bits + (layer.flagged[1] > 0.0 ? 2 : layer.flagged[0] > 0.0 ? 1 : 0);
  check_widths(widest, layer.act_bits);
  for (const auto& [value, name] :
       {std::pair{layer.macs, "macs"}, std::pair{layer.weights, "weights"}, std::pair{layer.inputs, "inputs"},
        std::pair{layer.outputs, "outputs"}, std::pair{layer.index_bits, "index bits"}}) {
    if (!(value >= 0.0 && value <= 1e18)) fail(std::string(name) + "=" + shown(value) + ": expected a number from 0");
  }
}

}  // namespace

Pe parse_pe(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < kPeNames.size(); ++i) {
    if (name == kPeNames[i]) return static_cast<Pe>(i);
    known.append(i == 0 ? "" : ", ").append(kPeNames[i]);
  }
  fail("pe='" + name + "' is not known: expected one of " + known);
}

PeWidths pe_widths(Pe pe, int weight_bits, int act_bits) {
  check_widths(weight_bits, act_bits);
  switch (pe) {
    case Pe::kSlices:
      return {2 * ceil_div(weight_bits, 2), 2 * ceil_div(act_bits, 2)};
    case Pe::kBaseLsb:
    case Pe::kBitSerial:
      return {weight_bits, act_bits};
    case Pe::kUnpuLike:
      return {weight_bits, kMaxOperandBits};
    case Pe::kBitFusionLike:
      return {power_of_two(weight_bits), power_of_two(act_bits)};
    case Pe::kStripesLike:
      return {kMaxOperandBits, act_bits};
  }
  return {};
}

double pe_throughput(Pe pe, int weight_bits, int act_bits) {
  const PeWidths widths = pe_widths(pe, weight_bits, act_bits);
  const Slice slice = slice_of(pe);
  return static_cast<double>(slice.passes_a_cycle) /
         (ceil_div(widths.weight, slice.weight) * ceil_div(widths.act, slice.act));
}

int64_t pe_product(Pe pe, int64_t weight, int weight_bits, int64_t act, int act_bits, int* passes) {
  const PeWidths widths = pe_widths(pe, weight_bits, act_bits);
  if (weight < -power(weight_bits - 1) || weight >= power(weight_bits - 1)) {
    fail("weight " + std::to_string(weight) + " does not fit " + std::to_string(weight_bits) + " bits, signed");
  }
  if (act < 0 || act >= power(act_bits)) {
    fail("act " + std::to_string(act) + " does not fit " + std::to_string(act_bits) + " bits, unsigned");
  }
  const Slice slice = slice_of(pe);
  int64_t sum = 0;
  int count = 0;
  for (int w = 0; w < widths.weight; w += slice.weight) {
    // The rest of a two's complement number above its low bits: the top slice keeps the sign, the others are unsigned.
    const bool top = w + slice.weight >= widths.weight;
    const int64_t rest = weight >> w;
    const int64_t part = top ? rest : rest & (power(slice.weight) - 1);
    for (int a = 0; a < widths.act; a += slice.act) {
      const int64_t piece = (act >> a) & (power(slice.act) - 1);
      sum += pass_product(pe, part, std::min(slice.weight, widths.weight - w), piece) * power(w + a);
      ++count;
    }
  }
  if (passes != nullptr) *passes = count;
  return sum;
}

int64_t pe_dot(Pe pe, std::span<const int64_t> codes, std::span<const uint8_t> extra_bits,
               std::span<const int64_t> acts, int base_bits, int act_bits) {
  if (codes.size() != extra_bits.size() || codes.size() != acts.size()) {
    fail("codes, extra_bits and acts: expected one length");
  }
  const int widest = extra_bits.empty() ? 0 : *std::max_element(extra_bits.begin(), extra_bits.end());
  if (widest > 2) fail("extra_bits: " + std::to_string(widest) + ", expected 0 to 2");
  int64_t sum = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    const int extra = extra_bits[i];
    sum += pe_product(pe, codes[i], base_bits + extra, acts[i], act_bits) * power(widest - extra);
  }
  return sum;
}

PeCost pe_cost(const PeOptions& options, const PeLayer& layer) {
  check(options);
  check(layer);
  // Shares of the weights by extra bits, and what is stored of each weight.
  std::array<double, 3> shares = {1.0 - layer.flagged[0], layer.flagged[0] - layer.flagged[1], layer.flagged[1]};
  double stored = layer.weights * (layer.base_bits + layer.flagged[0] + layer.flagged[1]) - layer.unstored_bits;
  double index = layer.index_bits;
  if (!mixes_widths(options.pe)) {
    const int widest = layer.flagged[1] > 0.0 ? 2 : layer.flagged[0] > 0.0 ? 1 : 0;
    shares = {0.0, 0.0, 0.0};
    shares[static_cast<size_t>(widest)] = 1.0;
    stored = layer.weights * pe_widths(options.pe, layer.base_bits + widest, layer.act_bits).weight;
    index = 0.0;
  }

  PeCost cost;
  double cycles = 0.0;
  for (int extra = 0; extra < 3; ++extra) {
    const double share = shares[static_cast<size_t>(extra)];
    if (share == 0.0) continue;
    const int bits = layer.base_bits + extra;
    const PeWidths widths = pe_widths(options.pe, bits, layer.act_bits);
    cycles += share * layer.macs / pe_throughput(options.pe, bits, layer.act_bits);
    const double saving = options.pe == Pe::kUnpuLike ? unpu_saving(bits) : 0.0;
    cost.mac += share * layer.macs * widths.weight * widths.act / 256.0 * options.mac * (1.0 - saving);
  }
  cost.cycles = std::ceil(cycles / static_cast<double>(options.count));
  cost.mac += layer.macs * options.add * options.accumulator_bits / 16.0;
  cost.weights =
      stored / 16.0 * (options.dram * options.weight_dram_reads + options.buffer * options.weight_buffer_reads);
  const int act_bits = pe_widths(options.pe, layer.base_bits, layer.act_bits).act;
  const double acts = (layer.inputs + layer.outputs) * (options.pe == Pe::kSlices ? layer.act_bits : act_bits);
  const bool spilled = options.act_buffer_bits > 0.0 && acts > options.act_buffer_bits;
  cost.acts = acts / 16.0 * ((spilled ? options.dram : 0.0) + options.buffer * options.act_buffer_accesses);
  cost.index = index / 16.0 * options.dram;
  cost.control = options.control * (cost.mac + cost.weights + cost.acts + cost.index);
  return cost;
}

double proportional_share(double saving, double compression) {
  if (!(saving >= 1.0 && compression > 1.0 && saving <= 1e6 && compression <= 1e6)) {
    fail("saving=" + shown(saving) + ", compression=" + shown(compression) +
         ": expected a saving from 1 and a compression above 1");
  }
  return (1.0 - 1.0 / saving) / (1.0 - 1.0 / compression);
}

}  // namespace mixbit::hw
