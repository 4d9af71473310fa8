#pragma once

// CRC-32 (IEEE 802.3), as zlib and PNG have it.

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace mixbit {

// Tables of slicing by eight (Kounavis and Berry, 2005): eight bytes a step instead of one.
inline constexpr std::array<std::array<uint32_t, 256>, 8> kCrcTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1u ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    tables[0][i] = crc;
  }
  for (size_t i = 0; i < 256; ++i) {
    for (size_t k = 1; k < 8; ++k) tables[k][i] = tables[k - 1][i] >> 8 ^ tables[0][tables[k - 1][i] & 0xFFu];
  }
  return tables;
}();

// Of `bytes` after others whose CRC-32 is `before`.
inline uint32_t crc32(std::span<const uint8_t> bytes, uint32_t before = 0) {
  uint32_t crc = ~before;
  size_t i = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (; i + 8 <= bytes.size(); i += 8) {
      uint32_t low, high;
      std::memcpy(&low, bytes.data() + i, 4);
      std::memcpy(&high, bytes.data() + i + 4, 4);
      low ^= crc;
      crc = 0;
      for (size_t k = 0; k < 4; ++k) {
        crc ^= kCrcTables[7 - k][low >> (8 * k) & 0xFFu] ^ kCrcTables[3 - k][high >> (8 * k) & 0xFFu];
      }
    }
  }
  for (; i < bytes.size(); ++i) crc = crc >> 8 ^ kCrcTables[0][(crc ^ bytes[i]) & 0xFFu];
  return ~crc;
}

}  // namespace mixbit
