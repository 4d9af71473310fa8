#pragma once

// Precision-scalable processing elements: how they multiply (exactly, pass by pass), how long a network takes on them,
// and where the energy goes. A model after a published accelerator of which only the abstract is known (Kim et al.,
// IEEE TNNLS 32(7), 2021, doi 10.1109/TNNLS.2020.3008996: 65 nm, 2 to 4 bits of weights and activations); everything
// else is a reconstruction. Standard library only; bad arguments throw std::invalid_argument.

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace mixbit::hw {

// kSlices     four multipliers of 2 x 2 bits: operands in 2-bit slices, the top slice of a weight signed
// kBaseLsb    one multiplier of 2 (weight) x 4 (activation) bits and a lane of AND gates for one more weight bit:
//             (2 c + lsb) a = 2 (c a) + (lsb ? a : 0); a weight without that bit leaves the lane idle
// kBitSerial  one weight bit a cycle
// The others follow published designs, not their figures of energy; a layer's weights all run at its widest there:
// kUnpuLike   one weight bit a cycle, activations of 16 bits, a multiplication cheaper by UNPU's published savings
// kBitFusionLike  2 x 2-bit multipliers as in kSlices, widths rounded up to 2, 4, 8, 16
// kStripesLike  one activation bit a cycle, weights of 16 bits
enum class Pe : uint8_t { kSlices, kBaseLsb, kBitSerial, kUnpuLike, kBitFusionLike, kStripesLike };
inline constexpr std::array<const char*, 6> kPeNames = {"slices",    "base_lsb",        "bit_serial",
                                                        "unpu_like", "bit_fusion_like", "stripes_like"};
Pe parse_pe(const std::string& name);

inline constexpr int kMaxOperandBits = 16;

// Widths at which a processing element runs a signed weight and an unsigned activation (they may be rounded up).
struct PeWidths {
  int weight = 0;
  int act = 0;
};
PeWidths pe_widths(Pe pe, int weight_bits, int act_bits);

// Products a cycle of one processing element.
double pe_throughput(Pe pe, int weight_bits, int act_bits);

// A product the way the hardware makes it: partial products of at most one multiplier pass, shifted and added. `passes`
// (may be null) counts them. weight: signed, act: unsigned, both in range.
int64_t pe_product(Pe pe, int64_t weight, int weight_bits, int64_t act, int act_bits, int* passes = nullptr);

// sum of code * 2^(widest - extra) * act over a dot product of weights with 0 ... 2 extra bits, in units of the finest
// step (widest: the largest extra bits): one accumulator serves plain and flagged weights. base_bits + extra bits each.
int64_t pe_dot(Pe pe, std::span<const int64_t> codes, std::span<const uint8_t> extra_bits,
               std::span<const int64_t> acts, int base_bits, int act_bits);

// Energies are in units of one 16-bit multiply-accumulate; the defaults are those of Eyeriss' 65-nm table (register 1,
// buffer 6, DRAM 200 a 16-bit word).
struct PeOptions {
  Pe pe = Pe::kBaseLsb;
  int64_t count = 1;  // processing elements
  double mac = 1.0;   // a 16 x 16 bit product; others in proportion to the product of the widths
  double add = 0.0;   // an accumulation of 16 bits
  double accumulator_bits = 32.0;
  double dram = 200.0;             // 16 bits of DRAM
  double buffer = 6.0;             // 16 bits of the buffer
  double weight_dram_reads = 1.0;  // of each weight an image
  double weight_buffer_reads = 1.0;
  double act_buffer_accesses = 1.0;  // of each element of a layer's input and output
  double act_buffer_bits = 0.0;      // inputs and outputs of a layer above this go through DRAM; 0: none does
  double control = 0.1;              // share of everything else
};

// What one layer asks for, for one image.
struct PeLayer {
  double macs = 0;
  double weights = 0;
  double inputs = 0;   // elements
  double outputs = 0;  // elements
  int act_bits = 8;
  int base_bits = 8;
  std::array<double, 2> flagged{};  // shares of the weights with more than 0, more than 1 extra bits
  double index_bits = 0;            // of all weights
  double unstored_bits = 0;         // extra bits of all weights that the index makes superfluous
};

// Energies by where they go.
struct PeCost {
  double cycles = 0;
  double mac = 0;
  double weights = 0;
  double acts = 0;
  double index = 0;
  double control = 0;
  double total() const { return mac + weights + acts + index + control; }
};

PeCost pe_cost(const PeOptions& options, const PeLayer& layer);

// The share x of the energy that would have to be proportional to weight bits for a compression of the weights by
// `compression` to save a factor `saving` of all: 1 / (1 - x + x / compression) = saving.
double proportional_share(double saving, double compression);

}  // namespace mixbit::hw
