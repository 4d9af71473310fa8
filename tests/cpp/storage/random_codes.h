#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include <mixbit/storage/storage.h>

// Weights with extra levels, drawn so that every index can keep them.
struct RandomCodes {
  std::vector<int64_t> shape;
  std::vector<int16_t> codes;
  std::vector<uint8_t> extra_bits;
  mixbit::storage::Options options;

  // flagged: share of weights with extra bits, a quarter of them with two where `two` is set.
  RandomCodes(std::mt19937& random, std::vector<int64_t> dims, mixbit::storage::Options chosen, double flagged,
              bool two)
      : shape(std::move(dims)), options(chosen) {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    std::uniform_real_distribution<double> uniform;
    const auto drawn = [&] {
      return static_cast<uint8_t>(uniform(random) >= flagged ? 0 : two && random() % 4 == 0 ? 2 : 1);
    };
    const auto axis = static_cast<size_t>(options.group_axis);
    const bool grouped = options.index == mixbit::storage::Index::kGroup && !shape.empty();
    int64_t inner = 1;
    for (size_t d = axis + 1; grouped && d < shape.size(); ++d) inner *= shape[d];
    std::vector<uint8_t> of_place;
    for (int64_t i = 0; i < n; ++i) {
      uint8_t extra = drawn();
      if (grouped && (i / inner % shape[axis]) % options.group_size != 0) {
        extra = extra_bits[static_cast<size_t>(i - inner)];
      }
      extra_bits.push_back(extra);
      const int bits = options.base_bits + extra;
      int code = static_cast<int>(random() % (1u << bits)) - (1 << (bits - 1));
      if (options.index == mixbit::storage::Index::kOddLevel && extra > 0) code |= 1;
      codes.push_back(static_cast<int16_t>(code));
    }
  }

  std::vector<uint8_t> encoded() const { return mixbit::storage::encode(codes, extra_bits, shape, options); }
};
