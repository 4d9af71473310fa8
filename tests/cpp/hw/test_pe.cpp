// Processing elements: every product of every width, throughputs, dot products of mixed widths, where energy goes.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <mixbit/hw/pe.h>

namespace {

using namespace mixbit::hw;

constexpr std::array<Pe, 6> kAll = {Pe::kSlices,   Pe::kBaseLsb,       Pe::kBitSerial,
                                    Pe::kUnpuLike, Pe::kBitFusionLike, Pe::kStripesLike};

TEST(Pe, EveryProductIsExact) {
  for (const Pe pe : kAll) {
    int products = 0;
    for (int bw = 2; bw <= 4; ++bw) {
      for (int ba = 2; ba <= 4; ++ba) {
        for (int64_t w = -(1 << (bw - 1)); w < 1 << (bw - 1); ++w) {
          for (int64_t a = 0; a < 1 << ba; ++a) {
            ASSERT_EQ(pe_product(pe, w, bw, a, ba), w * a) << w << " " << a;
            ++products;
          }
        }
      }
    }
    EXPECT_EQ(products, 784);
    for (const auto& [bw, ba] : {std::pair{1, 1}, std::pair{5, 7}, std::pair{8, 8}, std::pair{16, 3}}) {
      for (int64_t w = -(1 << (bw - 1)); w < 1 << (bw - 1); w += bw > 8 ? 251 : 1) {
        for (int64_t a = 0; a < 1 << ba; ++a) ASSERT_EQ(pe_product(pe, w, bw, a, ba), w * a);
      }
    }
  }
}

TEST(Pe, TheLaneAddsTheLastBit) {
  for (int64_t c = -4; c <= 3; ++c) {
    for (int64_t lsb = 0; lsb <= 1; ++lsb) {
      for (int64_t a = 0; a <= 15; ++a) {
        EXPECT_EQ(2 * (c * a) + (lsb != 0 ? a : 0), (2 * c + lsb) * a);
        EXPECT_EQ(pe_product(Pe::kBaseLsb, 2 * c + lsb, 4, a, 4), (2 * c + lsb) * a);
      }
    }
  }
}

// Throughput is what the passes take.
TEST(Pe, ThroughputFollowsFromThePasses) {
  for (const Pe pe : kAll) {
    const double passes_a_cycle = pe == Pe::kSlices || pe == Pe::kBitFusionLike ? 4.0 : 1.0;
    for (int bw = 1; bw <= 16; ++bw) {
      for (int ba = 1; ba <= 16; ++ba) {
        int passes = 0;
        pe_product(pe, 0, bw, 0, ba, &passes);
        EXPECT_EQ(pe_throughput(pe, bw, ba), passes_a_cycle / passes);
      }
    }
  }
  // The table of the specification: 4 products at 2 x 2 bits, 2 where one operand has 3 or 4 bits, 1 where both have.
  for (int bw = 2; bw <= 4; ++bw) {
    for (int ba = 2; ba <= 4; ++ba) {
      const double expected = bw == 2 && ba == 2 ? 4.0 : bw == 2 || ba == 2 ? 2.0 : 1.0;
      EXPECT_EQ(pe_throughput(Pe::kSlices, bw, ba), expected);
      EXPECT_EQ(pe_throughput(Pe::kBaseLsb, bw, ba), bw == 4 ? 0.5 : 1.0);
      EXPECT_EQ(pe_throughput(Pe::kBitSerial, bw, ba), 1.0 / bw);
      EXPECT_EQ(pe_throughput(Pe::kStripesLike, bw, ba), 1.0 / ba);
    }
  }
  EXPECT_EQ(pe_throughput(Pe::kSlices, 8, 8), 0.25);
  EXPECT_EQ(pe_throughput(Pe::kBitFusionLike, 5, 3), 0.5);  // as 8 x 4
}

TEST(Pe, DotProductsOfMixedWidthsAreTheReference) {
  std::mt19937 random(7);
  for (const Pe pe : kAll) {
    for (int round = 0; round < 200; ++round) {
      const int base_bits = 2 + static_cast<int>(random() % 2);
      std::vector<int64_t> codes, acts;
      std::vector<uint8_t> extra;
      const unsigned levels = 1 + random() % 3;
      for (int i = 0; i < 64; ++i) {
        extra.push_back(static_cast<uint8_t>(random() % levels));
        const int bits = base_bits + extra.back();
        codes.push_back(static_cast<int64_t>(random() % (1u << bits)) - (1 << (bits - 1)));
        acts.push_back(random() % 16);
      }
      int widest = 0;
      double reference = 0.0;  // in units of the base step: integers and binary fractions, exact in double
      for (size_t i = 0; i < codes.size(); ++i) {
        widest = std::max<int>(widest, extra[i]);
        reference += std::ldexp(static_cast<double>(codes[i]), -extra[i]) * static_cast<double>(acts[i]);
      }
      EXPECT_EQ(static_cast<double>(pe_dot(pe, codes, extra, acts, base_bits, 4)), std::ldexp(reference, widest));
    }
  }
}

TEST(Pe, TheShareOfEnergyBehindAPublishedSaving) {
  const double share = proportional_share(1.29, 1.37);
  EXPECT_NEAR(share, 0.832, 5e-4);
  EXPECT_NEAR(1.0 / (1.0 - share + share / 1.37), 1.29, 1e-12);
  EXPECT_EQ(proportional_share(1.0, 2.0), 0.0);
  EXPECT_THROW(proportional_share(1.29, 1.0), std::invalid_argument);
}

TEST(Pe, EnergiesOfALayer) {
  PeLayer layer;
  layer.macs = 1000;
  layer.weights = 160;
  layer.inputs = 32;
  layer.outputs = 16;
  layer.act_bits = 4;
  layer.base_bits = 2;
  layer.flagged = {0.25, 0.0};
  layer.index_bits = 64;
  PeOptions options;
  const PeCost cost = pe_cost(options, layer);
  EXPECT_DOUBLE_EQ(cost.mac, 1000 * (2.25 * 4) / 256);
  EXPECT_DOUBLE_EQ(cost.weights, 160 * 2.25 / 16 * 206);
  EXPECT_DOUBLE_EQ(cost.acts, 48 * 4 / 16.0 * 6);
  EXPECT_DOUBLE_EQ(cost.index, 64 / 16.0 * 200);
  EXPECT_DOUBLE_EQ(cost.control, 0.1 * (cost.mac + cost.weights + cost.acts + cost.index));
  EXPECT_EQ(cost.cycles, 1000);  // 2 and 3 bits take one pass each
  options.count = 3;
  EXPECT_EQ(pe_cost(options, layer).cycles, 334);

  options.pe = Pe::kSlices;  // 3 bits cost what 4 do
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).mac, 1000 * (0.75 * 2 + 0.25 * 4) * 4 / 256);
  EXPECT_EQ(pe_cost(options, layer).cycles, std::ceil((750 / 2.0 + 250 / 1.0) / 3));
  options.pe = Pe::kBitSerial;
  EXPECT_EQ(pe_cost(options, layer).cycles, 750);
  options.pe = Pe::kUnpuLike;  // all weights at 3 bits, without an index; activations at 16
  EXPECT_EQ(pe_cost(options, layer).cycles, 1000);
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).weights, 160 * 3 / 16.0 * 206);
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).mac, 1000 * 3 * 16 / 256.0 * (1 - (0.536 + (0.41 - 0.536) * 2 / 3)));
  EXPECT_EQ(pe_cost(options, layer).index, 0.0);
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).acts, 48 * 16 / 16.0 * 6);
  options.pe = Pe::kBitFusionLike;  // 3 bits are stored as 4
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).weights, 160 * 4 / 16.0 * 206);

  options = {};
  options.act_buffer_bits = 191;
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).acts, 48 * 4 / 16.0 * 206);
  options.act_buffer_bits = 192;
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).acts, 48 * 4 / 16.0 * 6);
  options.add = 0.5;
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).mac, 1000 * (2.25 * 4) / 256 + 1000 * 0.5 * 2);
  layer.unstored_bits = 40;
  EXPECT_DOUBLE_EQ(pe_cost(options, layer).weights, (160 * 2.25 - 40) / 16 * 206);
}

TEST(Pe, BadNumbersAreNamed) {
  const auto message = [](const auto& f) {
    try {
      f();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message([] { parse_pe("p4"); }).find("pe='p4' is not known: expected one of slices, base_lsb"), 0u);
  EXPECT_EQ(message([] { pe_throughput(Pe::kSlices, 0, 4); }), "weight bits: 0, expected a whole number from 1 to 16");
  EXPECT_EQ(message([] { pe_product(Pe::kSlices, 2, 2, 0, 4); }), "weight 2 does not fit 2 bits, signed");
  EXPECT_EQ(message([] { pe_product(Pe::kSlices, 0, 2, 16, 4); }), "act 16 does not fit 4 bits, unsigned");
  PeOptions options;
  options.dram = -1.0;
  EXPECT_EQ(message([&] { pe_cost(options, {}); }), "dram=-1: expected a number from 0 to 1e15");
  options = {};
  options.control = std::nan("");
  EXPECT_NE(message([&] { pe_cost(options, {}); }).find("control="), std::string::npos);
  PeLayer layer;
  layer.flagged = {0.1, 0.2};
  EXPECT_EQ(message([&] { pe_cost({}, layer); }).find("extra levels: shares of 0.1"), 0u);
  layer.flagged = {0.1, 0.0};
  layer.base_bits = 16;
  EXPECT_EQ(message([&] { pe_cost({}, layer); }), "weight bits: 17, expected a whole number from 1 to 16");
}

}  // namespace
