#pragma once

// Codes of b bits packed into bytes, little end first: code i takes the bits i * b ... i * b + b - 1 of its row, and
// bit k of a row is bit k % 8 of byte k / 8. A row starts at a byte; unused bits at its end are 0. Signed codes are
// two's complement.

#include <cstdint>
#include <type_traits>

#include <mixbit/common/macros.h>

namespace mixbit {

inline constexpr int kMaxPackedBits = 16;

MIXBIT_HD constexpr int64_t packed_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }

// The low `bits` bits of every code count.
template <typename T>
MIXBIT_HD uint8_t packed_byte(const T* codes, int64_t n, int bits, int64_t byte) {
  const int64_t first = byte * 8;
  const uint32_t mask = (1u << bits) - 1u;
  uint32_t packed = 0;
  for (int64_t i = first / bits; i < n && i * bits < first + 8; ++i) {
    const uint32_t code = static_cast<uint32_t>(codes[i]) & mask;
    const auto shift = static_cast<int>(i * bits - first);
    packed |= shift >= 0 ? code << shift : code >> -shift;
  }
  return static_cast<uint8_t>(packed);
}

MIXBIT_HD int32_t unpacked_code(const uint8_t* packed, int bits, int64_t i, bool is_signed) {
  const int64_t first = i * bits;
  const int64_t low_byte = first / 8;
  uint32_t word = 0;
  for (int64_t byte = low_byte; byte * 8 < first + bits; ++byte) {  // at most 3
    word |= static_cast<uint32_t>(packed[byte]) << (8 * (byte - low_byte));
  }
  word = (word >> (first % 8)) & ((1u << bits) - 1u);
  const uint32_t sign = is_signed ? 1u << (bits - 1) : 0u;
  return static_cast<int32_t>(word ^ sign) - static_cast<int32_t>(sign);
}

// f(integral_constant) with a bit-width 1 ... kMaxPackedBits as a constant: divisions by it become shifts.
template <int kBits = 1, typename F>
void with_constant_bits(int bits, const F& f) {
  if constexpr (kBits <= kMaxPackedBits) {
    if (bits == kBits) {
      f(std::integral_constant<int, kBits>{});
    } else {
      with_constant_bits<kBits + 1>(bits, f);
    }
  }
}

// Bytes `begin` ... `end` - 1 of a row of n codes; out is the whole row's.
template <typename T>
void pack_row(const T* codes, int64_t n, int bits, int64_t begin, int64_t end, uint8_t* out) {
  with_constant_bits(bits, [&](auto constant) {
    for (int64_t byte = begin; byte < end; ++byte) {
      out[byte] = packed_byte(codes, n, constant(), byte);
    }
  });
}

// Codes `begin` ... `end` - 1 of a row; out is the whole row's.
template <typename T>
void unpack_row(const uint8_t* packed, int bits, bool is_signed, int64_t begin, int64_t end, T* out) {
  with_constant_bits(bits, [&](auto constant) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<T>(unpacked_code(packed, constant(), i, is_signed));
    }
  });
}

}  // namespace mixbit
