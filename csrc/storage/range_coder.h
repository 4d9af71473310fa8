#pragma once

// Binary range coder with one fixed probability (Martin 1979; carries are propagated into the bytes already written):
// integers only, so every machine writes the same bytes. n flags of which k are set take close to n H(k / n) bits.

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace mixbit::storage {

// The share of zeros in units of 2^-32.
inline uint64_t zero_share(uint64_t zeros, uint64_t total) {
  while (total >> 32 != 0) {
    zeros >>= 1;
    total >>= 1;
  }
  return (zeros << 32) / total;
}

inline constexpr uint32_t kLeastRange = 1u << 24;

// The part of a range that stands for zero: at least 1, at most range - 1.
inline uint32_t zero_part(uint32_t range, uint64_t share) {
  return std::clamp(static_cast<uint32_t>((range * share) >> 32), 1u, range - 1u);
}

class RangeEncoder {
 public:
  explicit RangeEncoder(uint64_t share) : share_(share) {}

  void put(bool flag) {
    const uint32_t part = zero_part(range_, share_);
    if (flag) {
      add(part);
      range_ -= part;
    } else {
      range_ = part;
    }
    while (range_ < kLeastRange) {
      shift();
      range_ <<= 8;
    }
  }

  // The shortest end: any number of the final range will do, and zeros at the end need not be written.
  std::vector<uint8_t> finish() {
    add(kLeastRange - 1);
    shift();
    while (!bytes_.empty() && bytes_.back() == 0) {
      bytes_.pop_back();
    }
    return std::move(bytes_);
  }

 private:
  void add(uint32_t value) {
    const uint32_t before = low_;
    low_ += value;
    if (low_ < before) {
      // low stays below 1 as a fraction, so that a carry ends inside what was written.
      for (size_t i = bytes_.size(); i > 0 && ++bytes_[i - 1] == 0; --i) {
      }
    }
  }
  void shift() {
    bytes_.push_back(static_cast<uint8_t>(low_ >> 24));
    low_ <<= 8;
  }

  uint64_t share_;
  uint32_t low_ = 0;
  uint32_t range_ = 0xFFFFFFFFu;
  std::vector<uint8_t> bytes_;
};

class RangeDecoder {
 public:
  RangeDecoder(std::span<const uint8_t> data, uint64_t share) : data_(data), share_(share) {
    for (int i = 0; i < 4; ++i) {
      shift();
    }
  }

  bool get() {
    const uint32_t part = zero_part(range_, share_);
    const bool flag = code_ >= part;
    if (flag) {
      code_ -= part;
      range_ -= part;
    } else {
      range_ = part;
    }
    while (range_ < kLeastRange) {
      shift();
      range_ <<= 8;
    }
    return flag;
  }

  // Whether all bytes were needed and form a number that an encoder can write.
  bool finished() const { return next_ >= data_.size() && code_ < range_; }

 private:
  void shift() {
    code_ = code_ << 8 | (next_ < data_.size() ? data_[next_] : 0u);
    ++next_;
  }

  std::span<const uint8_t> data_;
  uint64_t share_;
  uint32_t code_ = 0;
  uint32_t range_ = 0xFFFFFFFFu;
  size_t next_ = 0;
};

}  // namespace mixbit::storage
