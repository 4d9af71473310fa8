// CRC-32: the published check value, bytes in parts, and the definition bit by bit.

#include <gtest/gtest.h>

#include <random>
#include <string_view>
#include <vector>

#include <mixbit/common/crc32.h>

namespace {

using mixbit::crc32;

TEST(Crc32, IsThatOfZlib) {
  constexpr std::string_view kText = "123456789";
  EXPECT_EQ(crc32({reinterpret_cast<const uint8_t*>(kText.data()), kText.size()}), 0xCBF43926u);
  EXPECT_EQ(crc32({}), 0u);
}

TEST(Crc32, OfPartsIsThatOfTheWhole) {
  std::mt19937 random(1);
  for (size_t n = 0; n < 40; ++n) {
    std::vector<uint8_t> bytes(n);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    uint32_t crc = 0xFFFFFFFFu;
    for (const uint8_t byte : bytes) {
      crc ^= byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc & 1u ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    }
    const std::span<const uint8_t> whole = bytes;
    EXPECT_EQ(crc32(whole), ~crc);
    for (size_t cut = 0; cut <= n; ++cut) EXPECT_EQ(crc32(whole.subspan(cut), crc32(whole.first(cut))), ~crc);
  }
}

}  // namespace
