#pragma once

// From totals to bytes, for any vector V. Each instruction set includes its own copy (internal linkage).

#include <cstdint>

#include <mixbit/runtime/kernels.h>

namespace mixbit::runtime {
namespace {

// Totals to bytes: clamped above in fp32 (where a conversion would overflow), below by saturation and in bytes.
template <typename V>
struct Finish {
  typename V::Float largest;   // high - zero_point
  typename V::Int zero_point;  // 16 bits
  typename V::Int low;         // 8 bits
  bool is_signed;

  explicit Finish(const CodeGrid& y)
      : largest(V::all_float(static_cast<float>(y.high - y.zero_point))),
        zero_point(V::all16(static_cast<int16_t>(y.zero_point))),
        low(V::all8(byte_of(y.low))),
        is_signed(y.is_signed) {}

  typename V::Int rounded(typename V::Int total, typename V::Float multiplier) const {
    return V::to_int(V::min(V::mul(V::to_float(total), multiplier), largest));
  }
  // Four registers of rounded values; 32-bit group i of the result has group i of a, b, c, d: one of each 128 bits.
  typename V::Int bytes(typename V::Int a, typename V::Int b, typename V::Int c, typename V::Int d) const {
    const typename V::Int ab = V::add_saturated16(V::pack32(a, b), zero_point);
    const typename V::Int cd = V::add_saturated16(V::pack32(c, d), zero_point);
    return is_signed ? V::max_signed8(V::pack_signed16(ab, cd), low)
                     : V::max_unsigned8(V::pack_unsigned16(ab, cd), low);
  }
};

}  // namespace
}  // namespace mixbit::runtime
