// Damaged blobs, with the checksum put right again so that the parser itself is reached: each is refused with
// std::invalid_argument or decoded to codes that fit. Worth most under the sanitizers.

#include "random_codes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace {

using namespace mixbit::storage;

void seal(std::vector<uint8_t>* data) {
  if (data->size() < kChecksumOffset + 4) return;
  const uint32_t sum = checksum(*data);
  for (size_t i = 0; i < 4; ++i) (*data)[kChecksumOffset + i] = static_cast<uint8_t>(sum >> (8 * i));
}

RandomCodes drawn(std::mt19937& random) {
  Options options{1 + static_cast<int>(random() % 8), static_cast<Index>(random() % 6), 0, 0};
  if (options.index == Index::kGroup) {
    options.group_size = 1 + static_cast<int64_t>(random() % 6);
    options.group_axis = static_cast<int>(random() % 2);
  }
  const double flagged = static_cast<double>(random() % 5) / 4.0;
  return {random,
          {1 + static_cast<int64_t>(random() % 6), 1 + static_cast<int64_t>(random() % 9)},
          options,
          flagged,
          random() % 2 == 0};
}

// 1: refused, 0: decoded.
int tried(const std::vector<uint8_t>& data, const std::vector<uint8_t>& flags) {
  try {
    const Info info = inspect(data);
    const Decoded found = info.options.index == Index::kNone ? decode(data, flags) : decode(data);
    EXPECT_EQ(static_cast<int64_t>(found.codes.size()), info.weights);
    EXPECT_EQ(found.codes.size(), found.extra_bits.size());
    for (size_t i = 0; i < found.codes.size(); ++i) {
      const int limit = 1 << (info.options.base_bits + found.extra_bits[i] - 1);
      EXPECT_TRUE(found.extra_bits[i] <= 2 && found.codes[i] >= -limit && found.codes[i] < limit);
    }
    return 0;
  } catch (const std::invalid_argument&) {
    return 1;
  }
}

int rounds() {
  const char* given = std::getenv("MIXBIT_FUZZ_ROUNDS");
  return given != nullptr ? std::atoi(given) : 3000;
}

TEST(StorageFuzz, EveryTruncationAndEveryFlippedByteIsRefused) {
  std::mt19937 random(17);
  for (int i = 0; i < 60; ++i) {
    const RandomCodes given = drawn(random);
    const std::vector<uint8_t> data = given.encoded();
    for (size_t size = 0; size < data.size(); ++size) {
      std::vector<uint8_t> cut(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(size));
      EXPECT_EQ(tried(cut, given.extra_bits), 1);
      seal(&cut);
      EXPECT_EQ(tried(cut, given.extra_bits), 1);
    }
    std::vector<uint8_t> longer = data;
    longer.push_back(0);
    seal(&longer);
    EXPECT_EQ(tried(longer, given.extra_bits), 1);
    for (size_t at = 0; at < data.size(); ++at) {
      std::vector<uint8_t> damaged = data;
      damaged[at] ^= static_cast<uint8_t>(1 + random() % 255);
      EXPECT_EQ(tried(damaged, given.extra_bits), 1) << at;
    }
  }
}

TEST(StorageFuzz, SealedDamageIsRefusedOrDecodedWithinBounds) {
  std::mt19937 random(23);
  int refused = 0;
  const int all = rounds();
  for (int i = 0; i < all; ++i) {
    const RandomCodes given = drawn(random);
    std::vector<uint8_t> data = given.encoded();
    for (int change = 1 + static_cast<int>(random() % 4); change > 0; --change) {
      const size_t at = random() % (random() % 2 == 0 ? std::min<size_t>(data.size(), 72) : data.size());
      switch (random() % 4) {
        case 0:
          data[at] ^= static_cast<uint8_t>(1u << random() % 8);
          break;
        case 1:
          data[at] = static_cast<uint8_t>(random());
          break;
        case 2:
          data[at] = random() % 2 == 0 ? 0xFF : 0x00;
          break;
        default: {  // a whole number of the header
          const size_t field = 24 + 8 * (random() % 6);
          for (size_t b = 0; b < 8 && field + b < data.size(); ++b) {
            data[field + b] = static_cast<uint8_t>(random() % 3 == 0 ? random() : b == 7 ? 0x7F : 0xFF);
          }
        }
      }
      if (random() % 8 == 0) data.resize(random() % (data.size() + 40));
      if (data.empty()) break;
    }
    seal(&data);
    refused += tried(data, given.extra_bits);
  }
  // Most damage shows in the CRC of the flags or in a count; a changed base code cannot show.
  EXPECT_GT(refused, all / 2);
  EXPECT_LT(refused, all);
}

TEST(StorageFuzz, NoiseIsRefused) {
  std::mt19937 random(29);
  for (int i = 0; i < rounds(); ++i) {
    std::vector<uint8_t> data(random() % 200);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    const std::array<uint8_t, 5> head = {'M', 'X', 'S', 'T', 1};
    std::copy_n(head.begin(), std::min(head.size(), data.size()), data.begin());
    seal(&data);
    tried(data, {});
  }
}

}  // namespace
