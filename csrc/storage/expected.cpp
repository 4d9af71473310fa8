// The closed forms of what an index costs.

#include <mixbit/storage/storage.h>

#include <cmath>
#include <stdexcept>

namespace mixbit::storage {

namespace {

double entropy(double f) {
  const auto part = [](double p) { return p > 0.0 ? -p * std::log2(p) : 0.0; };
  return part(f) + part(1.0 - f);
}

void check(int base_bits, double fraction, int64_t group_size, int extra) {
  const auto fail = [](const char* what, const std::string& value, const char* expected) {
    throw std::invalid_argument(std::string(what) + "=" + value + ": expected " + expected);
  };
  if (base_bits < 1 || base_bits > kMaxBaseBits) {
    fail("base_bits", std::to_string(base_bits), "a whole number from 1 to 8");
  }
  if (!(fraction >= 0.0 && fraction <= 1.0)) fail("fraction", std::to_string(fraction), "a share from 0 to 1");
  if (group_size < 1) fail("group_size", std::to_string(group_size), "a whole number from 1");
  if (extra < 1 || extra > kMaxExtraBits) fail("extra", std::to_string(extra), "1 or 2");
}

}  // namespace

double index_bits(double fraction, Index index, int64_t group_size) {
  check(1, fraction, group_size, 1);
  switch (index) {
    case Index::kNone:
      return 0.0;
    case Index::kBitmap:
      return 1.0;
    case Index::kEntropy:
    case Index::kOddLevel:
      return entropy(fraction);
    case Index::kRle4:
      // A run of 15 plain weights is an escape: 1 / (1 - (1 - f)^15) pieces of 4 bits for each flagged weight.
      return fraction > 0.0 ? 4.0 * fraction / -std::expm1(15.0 * std::log1p(-fraction)) : 0.0;
    case Index::kGroup:
      return 1.0 / static_cast<double>(group_size);
  }
  return 0.0;
}

double expected_bits(int base_bits, double fraction, Index index, int64_t group_size, int extra) {
  check(base_bits, fraction, group_size, extra);
  const int stored = index == Index::kOddLevel ? extra - 1 : extra;
  return base_bits + stored * fraction + index_bits(fraction, index, group_size);
}

double fraction_at(double bits, int base_bits, Index index, int64_t group_size, int extra) {
  check(base_bits, 0.0, group_size, extra);
  const auto value = [&](double f) { return expected_bits(base_bits, f, index, group_size, extra); };
  // d H / d f = log2((1 - f) / f) is -1 at 2/3 and -2 at 4/5: there a bit more of each flag outweighs no more.
  double high = 1.0;
  if (index == Index::kEntropy) high = extra == 1 ? 2.0 / 3.0 : 4.0 / 5.0;
  if (index == Index::kOddLevel) high = extra == 1 ? 1.0 / 2.0 : 2.0 / 3.0;
  double low = 0.0;
  if (!(bits >= value(low) && bits <= value(high))) {
    throw std::invalid_argument(std::to_string(bits) + " bits a weight are out of reach with index " +
                                kIndexNames[static_cast<size_t>(index)] + " at base_bits=" + std::to_string(base_bits) +
                                ": expected " + std::to_string(value(low)) + " to " + std::to_string(value(high)));
  }
  for (int step = 0; step < 200 && low < high; ++step) {
    const double middle = low + (high - low) / 2.0;
    if (middle <= low || middle >= high) break;
    (value(middle) <= bits ? low : high) = middle;
  }
  return low;
}

}  // namespace mixbit::storage
