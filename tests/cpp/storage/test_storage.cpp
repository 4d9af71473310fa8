// Stored codes: round trips of every index, sizes against the closed forms, errors.

#include "random_codes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "../../../csrc/storage/range_coder.h"

namespace {

using namespace mixbit::storage;

constexpr std::array<Index, 6> kAll = {Index::kNone, Index::kBitmap, Index::kEntropy,
                                       Index::kRle4, Index::kGroup,  Index::kOddLevel};

Options with(Index index, int base_bits = 2, int64_t group_size = 16, int axis = 1) {
  Options options{base_bits, index, 0, 0};
  if (index == Index::kGroup) {
    options.group_size = group_size;
    options.group_axis = axis;
  }
  return options;
}

template <typename F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Storage, EveryIndexComesBackExactly) {
  std::mt19937 random(3);
  for (const Index index : kAll) {
    for (int base_bits = 1; base_bits <= kMaxBaseBits; ++base_bits) {
      for (const double flagged : {0.0, 0.01, 0.2, 0.7, 1.0}) {
        for (const bool two : {false, true}) {
          for (const std::vector<int64_t>& shape :
               {std::vector<int64_t>{5, 7, 3, 3}, {4, 33}, {0, 4}, {3, 0, 2}, {1, 1}}) {
            const RandomCodes given(random, shape, with(index, base_bits), flagged, two);
            const std::vector<uint8_t> data = given.encoded();
            const Info info = inspect(data);
            EXPECT_EQ(info.header + info.base + info.extra + info.index, static_cast<int64_t>(data.size()));
            const Decoded found = index == Index::kNone ? decode(data, given.extra_bits) : decode(data);
            ASSERT_EQ(found.codes, given.codes) << kIndexNames[static_cast<size_t>(index)] << " " << base_bits;
            ASSERT_EQ(found.extra_bits, given.extra_bits);
            EXPECT_EQ(found.info.shape, shape);
            EXPECT_EQ(decode(data, given.extra_bits).codes, given.codes);  // also where the index is kept
          }
        }
      }
    }
  }
  const RandomCodes scalar(random, {}, with(Index::kEntropy), 1.0, false);
  EXPECT_EQ(decode(scalar.encoded()).codes, scalar.codes);
  const RandomCodes row(random, {37}, with(Index::kGroup, 2, 5, 0), 0.5, true);
  EXPECT_EQ(decode(row.encoded()).codes, row.codes);
}

TEST(Storage, SizesAreTheClosedForms) {
  std::mt19937 random(5);
  const std::vector<int64_t> shape = {64, 64, 5, 5};
  constexpr double kWeights = 64.0 * 64 * 25;
  for (const Index index : kAll) {
    for (const double flagged : {0.001, 0.05, 0.2, 0.5, 0.9}) {
      const RandomCodes given(random, shape, with(index), flagged, false);
      const Info info = inspect(given.encoded());
      const double share = static_cast<double>(info.flagged[0]) / kWeights;
      const double bits = 8.0 * static_cast<double>(info.base + info.extra + info.index);
      const double expected = expected_bits(2, share, index) * kWeights;
      // Bytes are whole; runs are as long as they are drawn, which spreads with the square root of their number.
      const double slack =
          64.0 + (index == Index::kRle4 ? 6.0 * 4.0 * std::sqrt(static_cast<double>(info.flagged[0])) : 0.0);
      EXPECT_NEAR(bits, expected, slack) << kIndexNames[static_cast<size_t>(index)] << " " << flagged;
    }
  }
}

// The coder's own loss, over shares of flagged weights from one in 10^5 to all but one.
TEST(Storage, TheRangeCoderStaysAtTheEntropy) {
  std::mt19937 random(11);
  constexpr int64_t kFlags = 200000;
  for (const int64_t ones : {int64_t{1}, int64_t{20}, int64_t{2000}, int64_t{40000}, int64_t{100000}, kFlags - 1}) {
    std::vector<uint8_t> flags(kFlags);
    for (int64_t i = 0; i < ones; ++i) flags[static_cast<size_t>(i)] = 1;
    std::shuffle(flags.begin(), flags.end(), random);
    const uint64_t share = zero_share(static_cast<uint64_t>(kFlags - ones), kFlags);
    RangeEncoder encoder(share);
    for (const uint8_t flag : flags) encoder.put(flag != 0);
    const std::vector<uint8_t> data = encoder.finish();
    const double f = static_cast<double>(ones) / kFlags;
    EXPECT_LE(8.0 * static_cast<double>(data.size()), kFlags * index_bits(f, Index::kEntropy) * 1.001 + 40.0) << ones;
    RangeDecoder decoder(data, share);
    for (const uint8_t flag : flags) ASSERT_EQ(decoder.get(), flag != 0);
    EXPECT_TRUE(decoder.finished());
  }
}

// A carry that runs through bytes of 255 into an earlier one.
TEST(Storage, CarriesGoThroughTheBytesWritten) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const uint64_t share = zero_share(1 + random() % 7, 8);
    std::vector<bool> flags;
    // Mostly ones keep the low end high, so that carries are frequent.
    for (int i = 0; i < 400; ++i) flags.push_back(random() % 16 != 0);
    RangeEncoder encoder(share);
    for (const bool flag : flags) encoder.put(flag);
    const std::vector<uint8_t> data = encoder.finish();
    RangeDecoder decoder(data, share);
    for (size_t i = 0; i < flags.size(); ++i) ASSERT_EQ(decoder.get(), flags[i]) << seed << " " << i;
    EXPECT_TRUE(decoder.finished());
  }
}

TEST(Storage, SharesBeyond32BitsAreScaled) {
  EXPECT_EQ(zero_share(1, 2), uint64_t{1} << 31);
  EXPECT_EQ(zero_share(uint64_t{1} << 46, uint64_t{1} << 48), uint64_t{1} << 30);
  EXPECT_EQ(zero_part(0xFFFFFFFFu, 0), 1u);
  EXPECT_EQ(zero_part(kLeastRange, (uint64_t{1} << 32) - 1), kLeastRange - 1);
}

TEST(Storage, TheTableOfClosedForms) {
  const std::array<double, 4> shares = {0.1, 0.2, 0.3, 0.5};
  const std::array<std::array<double, 4>, 6> table = {{{2.1, 2.2, 2.3, 2.5},
                                                       {3.1, 3.2, 3.3, 3.5},
                                                       {2.569, 2.922, 3.181, 3.5},
                                                       {2.604, 3.029, 3.506, 4.5},
                                                       {2.1625, 2.2625, 2.3625, 2.5625},
                                                       {2.469, 2.722, 2.881, 3.0}}};
  for (size_t i = 0; i < kAll.size(); ++i) {
    for (size_t j = 0; j < shares.size(); ++j) {
      EXPECT_NEAR(expected_bits(2, shares[j], kAll[i]), table[i][j], 5e-4) << i << " " << j;
    }
  }
  EXPECT_EQ(expected_bits(3, 0.0, Index::kRle4), 3.0);
  EXPECT_EQ(expected_bits(3, 1.0, Index::kRle4), 8.0);
  EXPECT_EQ(expected_bits(3, 1.0, Index::kEntropy, 16, 2), 5.0);
}

TEST(Storage, SharesThatReachACompression) {
  const double bits = 4.0 / 1.37;
  EXPECT_NEAR(fraction_at(bits, 2, Index::kEntropy), 0.19926, 5e-6);
  EXPECT_NEAR(fraction_at(bits, 2, Index::kNone), 0.91971, 5e-6);
  EXPECT_NEAR(fraction_at(bits, 2, Index::kNone, 16, 2), 0.45985, 5e-6);
  EXPECT_NEAR(expected_bits(2, fraction_at(bits, 2, Index::kRle4), Index::kRle4), bits, 1e-9);
  // Each closed form rises up to where it is searched, so that the share is the largest one there.
  for (const Index index : kAll) {
    for (const int extra : {1, 2}) {
      const double low = expected_bits(2, 0.0, index, 16, extra);
      double before = low;
      for (const double part : {0.2, 0.4, 0.6, 0.8}) {
        const double goal = low + part * (expected_bits(2, 0.5, index, 16, extra) - low);
        const double f = fraction_at(goal, 2, index, 16, extra);
        EXPECT_NEAR(expected_bits(2, f, index, 16, extra), goal, 1e-9);
        EXPECT_GT(goal, before);
        before = goal;
      }
    }
  }
  EXPECT_NE(message_of([&] { fraction_at(bits, 2, Index::kBitmap); }).find("out of reach with index bitmap"),
            std::string::npos);
  EXPECT_NE(message_of([&] { fraction_at(bits, 3, Index::kEntropy); }).find("base_bits=3: expected 3.0"),
            std::string::npos);
}

TEST(Storage, WhatCannotBeStoredIsNamed) {
  const std::vector<int64_t> shape = {2, 2};
  const std::vector<uint8_t> flags = {0, 1, 0, 2};
  const auto encoded = [&](std::vector<int16_t> codes, Options options, std::vector<uint8_t> extra) {
    return message_of([&] { encode(codes, extra, shape, options); });
  };
  EXPECT_EQ(encoded({0, 0, 2, 0}, with(Index::kEntropy), flags),
            "code of weight 2 is 2: expected -2 to 1 (base_bits=2, 0 extra)");
  EXPECT_EQ(encoded({0, 4, 0, 0}, with(Index::kEntropy), flags),
            "code of weight 1 is 4: expected -4 to 3 (base_bits=2, 1 extra)");
  EXPECT_EQ(encoded({0, 0, 0, 0}, with(Index::kEntropy), {0, 3, 0, 0}), "extra_bits of weight 1 is 3: expected 0 to 2");
  EXPECT_EQ(encoded({0, -2, 0, 1}, with(Index::kOddLevel), flags),
            "code of weight 1 is -2, an even level, with 1 extra bits: index 'oddlevel' expects flagged weights on odd "
            "levels");
  EXPECT_EQ(encoded({0, 0, 0, 0}, with(Index::kGroup, 2, 2), flags),
            "extra_bits of weight 1 is 1 and 0 before it in its group of 2: index 'group' expects one number a group");
  EXPECT_EQ(encoded({0, 0, 0, 0}, with(Index::kGroup, 2, 0), flags),
            "group_size=0: expected a whole number from 1 to 2147483648");
  EXPECT_EQ(encoded({0, 0, 0, 0}, with(Index::kEntropy, 9), flags), "base_bits=9: expected a whole number from 1 to 8");
  EXPECT_NE(message_of([&] { parse_index("entropie"); }).find("expected one of none, bitmap, entropy"),
            std::string::npos);
  const std::vector<int16_t> three(3);
  EXPECT_NE(message_of([&] { encode(three, flags, shape, with(Index::kNone)); }).find("expected one number of weights"),
            std::string::npos);
}

TEST(Storage, FlagsThatAreHandedInMustBeTheRightOnes) {
  std::mt19937 random(2);
  const RandomCodes given(random, {3, 40}, with(Index::kNone), 0.4, true);
  const std::vector<uint8_t> data = given.encoded();
  EXPECT_NE(message_of([&] { decode(data); }).find("extra_bits is missing"), std::string::npos);
  std::vector<uint8_t> wrong = given.extra_bits;
  std::reverse(wrong.begin(), wrong.end());
  EXPECT_NE(message_of([&] { decode(data, wrong); }).find("not those that the codes were stored with"),
            std::string::npos);
  wrong.assign(wrong.size(), 7);
  EXPECT_NE(message_of([&] { decode(data, wrong); }).find("expected 0 to 2"), std::string::npos);
  wrong.pop_back();
  EXPECT_NE(message_of([&] { decode(data, wrong); }).find("119 elements"), std::string::npos);
}

}  // namespace
