// Packed codes: golden bytes, round trips at every width, any split of a row.

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include <mixbit/common/packing.h>

namespace {

using namespace mixbit;

TEST(Packing, GoldenBytes) {
  const std::vector<int> codes = {1, 2, 3, -1, -4};
  std::vector<uint8_t> packed(static_cast<size_t>(packed_bytes(5, 3)));
  ASSERT_EQ(packed.size(), 2u);
  pack_row(codes.data(), 5, 3, 0, 2, packed.data());
  // 001, 010, 011, 111, 100 from the low end: 100 111 011 010 001.
  EXPECT_EQ(packed[0], 0b11010001);
  EXPECT_EQ(packed[1], 0b01001110);
  const std::vector<int> nibbles = {-8, 7, 3};
  pack_row(nibbles.data(), 3, 4, 0, 2, packed.data());
  EXPECT_EQ(packed[0], 0x78);
  EXPECT_EQ(packed[1], 0x03);  // the unused half is zero
}

TEST(Packing, RoundTripsAtEveryWidthAndLength) {
  std::mt19937 random(1);
  for (int bits = 1; bits <= kMaxPackedBits; ++bits) {
    for (const bool is_signed : {false, true}) {
      const int64_t low = is_signed ? -(int64_t{1} << (bits - 1)) : 0;
      for (int64_t n = 0; n <= 40; ++n) {
        std::vector<int32_t> codes;
        for (int64_t i = 0; i < n; ++i) {
          codes.push_back(static_cast<int32_t>(low + static_cast<int64_t>(random() % (1u << bits))));
        }
        const int64_t size = packed_bytes(n, bits);
        EXPECT_EQ(size, (n * bits + 7) / 8);
        std::vector<uint8_t> packed(static_cast<size_t>(size)), parts(packed.size());
        pack_row(codes.data(), n, bits, 0, size, packed.data());
        const int64_t cut = size / 3;
        pack_row(codes.data(), n, bits, cut, size, parts.data());
        pack_row(codes.data(), n, bits, 0, cut, parts.data());
        EXPECT_EQ(packed, parts);
        // Bit by bit, as the layout is described.
        for (int64_t bit = 0; bit < 8 * size; ++bit) {
          const int expected = bit < n * bits ? codes[static_cast<size_t>(bit / bits)] >> (bit % bits) & 1 : 0;
          ASSERT_EQ(packed[static_cast<size_t>(bit / 8)] >> (bit % 8) & 1, expected) << bits << " " << n << " " << bit;
        }
        std::vector<int32_t> back(codes.size());
        unpack_row(packed.data(), bits, is_signed, 0, n, back.data());
        EXPECT_EQ(back, codes);
      }
    }
  }
}

}  // namespace
