// Encoder and decoder. A blob, little end first:
//   0 "MXST"  4 version  5 index  6 base_bits  7 rank  8 group_axis  9 rounds (largest extra bits)  10 zero (2 bytes)
//   12 checksum  16 CRC-32 of extra_bits  20 group_size (4 bytes)
//   24 weights with extra bits  32 weights with two  40, 48 bytes of the first and second index (8 bytes each)
//   56 sizes of the dimensions (8 bytes each)
//   then the base codes, packed; the first extra bit of every flagged weight and the second of those with two, packed
//   as one row of bits; the first and the second index.
// The first index says which weights have extra bits, the second which of these have two; it is left out where none or
// all of them have. The decoder trusts nothing: every length follows from the header and is compared with the bytes
// that are there before anything is allocated.

#include <mixbit/storage/storage.h>

#include <mixbit/common/crc32.h>
#include <mixbit/common/packing.h>

#include <algorithm>
#include <stdexcept>

#include "range_coder.h"

namespace mixbit::storage {

namespace {

constexpr std::array<uint8_t, 4> kMagic = {'M', 'X', 'S', 'T'};
constexpr uint8_t kVersion = 1;
constexpr int64_t kFixedHeader = 56;
constexpr int64_t kMaxWeights = int64_t{1} << 48;
constexpr int64_t kMaxGroup = int64_t{1} << 31;
constexpr int kRunBits = 4;
constexpr int kEscape = 15;

using Bytes = std::vector<uint8_t>;
using Flags = std::vector<uint8_t>;  // 0 or 1 each

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }
[[noreturn]] void damaged(const std::string& what) { fail("stored codes are damaged: " + what); }

std::string text(int64_t value) { return std::to_string(value); }

void put(Bytes* bytes, size_t offset, int width, uint64_t value) {
  for (int i = 0; i < width; ++i) {
    (*bytes)[offset + static_cast<size_t>(i)] = static_cast<uint8_t>(value >> (8 * i));
  }
}

uint64_t get(std::span<const uint8_t> bytes, size_t offset, int width) {
  uint64_t value = 0;
  for (int i = 0; i < width; ++i) {
    value |= static_cast<uint64_t>(bytes[offset + static_cast<size_t>(i)]) << (8 * i);
  }
  return value;
}

// The weights as [outer, along, inner] around the group axis; groups run along `along`.
struct Groups {
  int64_t along = 1;
  int64_t inner = 1;
  int64_t size = 1;

  Groups(std::span<const int64_t> shape, const Options& options) {
    if (options.index != Index::kGroup) return;
    size = options.group_size;
    if (shape.empty()) return;
    const auto axis = static_cast<size_t>(options.group_axis);
    along = std::max<int64_t>(1, shape[axis]);
    for (size_t d = axis + 1; d < shape.size(); ++d) inner *= std::max<int64_t>(1, shape[d]);
  }
  int64_t per_row() const { return (along - 1) / size + 1; }
  // Units (weights, or groups of them) of `weights` weights.
  int64_t count(int64_t weights) const { return weights / (along * inner) * per_row() * inner; }
  int64_t of(int64_t weight) const {
    if (size == 1) return weight;
    const int64_t row = weight / (along * inner);
    const int64_t place = weight / inner % along;
    return (row * per_row() + place / size) * inner + weight % inner;
  }
};

void check_options(const Options& options, size_t rank) {
  if (options.base_bits < 1 || options.base_bits > kMaxBaseBits) {
    fail("base_bits=" + text(options.base_bits) + ": expected a whole number from 1 to " + text(kMaxBaseBits));
  }
  if (options.index != Index::kGroup) return;
  if (options.group_size < 1 || options.group_size > kMaxGroup) {
    fail("group_size=" + text(options.group_size) + ": expected a whole number from 1 to " + text(kMaxGroup));
  }
  if (options.group_axis < 0 || options.group_axis >= std::max(1, static_cast<int>(rank))) {
    fail("group_axis=" + text(options.group_axis) + ": expected a dimension of the codes, which have " +
         text(static_cast<int64_t>(rank)));
  }
}

// Product of the dimensions; -1 beyond the limits.
int64_t weights_of(std::span<const int64_t> shape) {
  int64_t product = 1;
  int64_t bounded = 1;  // zeros count as 1, so that the other dimensions stay in bounds, too
  for (const int64_t size : shape) {
    if (size < 0 || size > kMaxWeights / bounded) return -1;
    bounded *= std::max<int64_t>(1, size);
    product *= size;
  }
  return product;
}

Bytes packed_flags(const Flags& flags) {
  const auto n = static_cast<int64_t>(flags.size());
  Bytes out(static_cast<size_t>(packed_bytes(n, 1)));
  pack_row(flags.data(), n, 1, 0, packed_bytes(n, 1), out.data());
  return out;
}

int64_t count_of(const Flags& flags) { return std::count(flags.begin(), flags.end(), uint8_t{1}); }

Bytes encode_runs(const Flags& flags) {
  Flags runs;
  int run = 0;
  for (const uint8_t flag : flags) {
    if (flag != 0) {
      runs.push_back(static_cast<uint8_t>(run));
      run = 0;
    } else if (++run == kEscape) {
      runs.push_back(kEscape);
      run = 0;
    }
  }
  // Nothing follows the last flagged weight.
  while (!runs.empty() && runs.back() == kEscape) runs.pop_back();
  const auto n = static_cast<int64_t>(runs.size());
  Bytes out(static_cast<size_t>(packed_bytes(n, kRunBits)));
  pack_row(runs.data(), n, kRunBits, 0, packed_bytes(n, kRunBits), out.data());
  return out;
}

Flags decode_runs(std::span<const uint8_t> data, int64_t total, int64_t ones) {
  Flags flags(static_cast<size_t>(total));
  const auto pieces = static_cast<int64_t>(data.size()) * 2;
  int64_t position = 0;
  int64_t piece = 0;
  for (int64_t found = 0; found < ones; ++piece) {
    if (piece >= pieces) damaged("runs end before the last flagged weight");
    const int32_t run = unpacked_code(data.data(), kRunBits, piece, false);
    position += run;
    if (run == kEscape) continue;
    if (position >= total) damaged("runs lead beyond the weights");
    flags[static_cast<size_t>(position)] = 1;
    ++position;
    ++found;
  }
  if (packed_bytes(piece, kRunBits) != static_cast<int64_t>(data.size())) damaged("runs go on after the last weight");
  return flags;
}

Bytes encode_flags(const Flags& flags, Index index) {
  switch (index) {
    case Index::kNone:
      return {};
    case Index::kBitmap:
    case Index::kGroup:
      return packed_flags(flags);
    case Index::kRle4:
      return encode_runs(flags);
    case Index::kEntropy:
    case Index::kOddLevel:
      break;
  }
  const auto total = static_cast<int64_t>(flags.size());
  const int64_t ones = count_of(flags);
  if (ones == 0 || ones == total) return {};
  RangeEncoder coder(zero_share(static_cast<uint64_t>(total - ones), static_cast<uint64_t>(total)));
  for (const uint8_t flag : flags) coder.put(flag != 0);
  return coder.finish();
}

// ones: how many are set; unknown to the bitmaps, whose counts are checked by the caller.
Flags decode_flags(std::span<const uint8_t> data, Index index, int64_t total, int64_t ones) {
  switch (index) {
    case Index::kNone:
      damaged("an index where none is kept");
    case Index::kBitmap:
    case Index::kGroup: {
      if (static_cast<int64_t>(data.size()) != packed_bytes(total, 1)) damaged("the bitmap has another length");
      Flags flags(static_cast<size_t>(total));
      unpack_row(data.data(), 1, false, 0, total, flags.data());
      return flags;
    }
    case Index::kRle4:
      return decode_runs(data, total, ones);
    case Index::kEntropy:
    case Index::kOddLevel:
      break;
  }
  Flags flags(static_cast<size_t>(total), static_cast<uint8_t>(ones == total ? 1 : 0));
  if (ones == 0 || ones == total) {
    if (!data.empty()) damaged("an index where nothing has to be said");
    return flags;
  }
  RangeDecoder coder(data, zero_share(static_cast<uint64_t>(total - ones), static_cast<uint64_t>(total)));
  for (uint8_t& flag : flags) flag = coder.get() ? 1 : 0;
  if (!coder.finished()) damaged("the index does not end where it should");
  return flags;
}

// Whether a flagged weight's last bit is stored.
bool last_bit_is_stored(Index index) { return index != Index::kOddLevel; }

int64_t extra_plane_bits(const Info& info) {
  return last_bit_is_stored(info.options.index) ? info.flagged[0] + info.flagged[1] : info.flagged[1];
}

bool second_index_is_kept(const std::array<int64_t, kMaxExtraBits>& flagged) {
  return flagged[1] > 0 && flagged[1] < flagged[0];
}

}  // namespace

Index parse_index(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < kIndexNames.size(); ++i) {
    if (name == kIndexNames[i]) return static_cast<Index>(i);
    known.append(i == 0 ? "" : ", ").append(kIndexNames[i]);
  }
  fail("index='" + name + "' is not known: expected one of " + known);
}

uint32_t checksum(std::span<const uint8_t> data) {
  const size_t head = std::min(kChecksumOffset, data.size());
  const size_t tail = std::min(kChecksumOffset + 4, data.size());
  return crc32(data.subspan(tail), crc32(data.first(head)));
}

std::vector<uint8_t> encode(std::span<const int16_t> codes, std::span<const uint8_t> extra_bits,
                            std::span<const int64_t> shape, const Options& options) {
  check_options(options, shape.size());
  if (shape.size() > kMaxRank) {
    fail("codes have " + text(static_cast<int64_t>(shape.size())) + " dimensions: expected at most " + text(kMaxRank));
  }
  const auto weights = static_cast<int64_t>(codes.size());
  if (weights_of(shape) != weights || extra_bits.size() != codes.size()) {
    fail("codes, extra_bits and shape: expected one number of weights, got " + text(weights) + ", " +
         text(static_cast<int64_t>(extra_bits.size())) + " and " + text(weights_of(shape)));
  }

  // Base codes and extra bits, and what the index has to tell of each unit.
  const Groups groups(shape, options);
  const int64_t units = weights == 0 ? 0 : groups.count(weights);
  Flags extra_of_unit(static_cast<size_t>(units), 0xFF);
  std::vector<int16_t> base(codes.size());
  std::array<Flags, kMaxExtraBits> planes;
  std::array<int64_t, kMaxExtraBits> flagged{};
  for (int64_t i = 0; i < weights; ++i) {
    const auto at = static_cast<size_t>(i);
    const int extra = extra_bits[at];
    const int code = codes[at];
    if (extra > kMaxExtraBits) {
      fail("extra_bits of weight " + text(i) + " is " + text(extra) + ": expected 0 to " + text(kMaxExtraBits));
    }
    const int limit = 1 << (options.base_bits + extra - 1);
    if (code < -limit || code >= limit) {
      fail("code of weight " + text(i) + " is " + text(code) + ": expected " + text(-limit) + " to " + text(limit - 1) +
           " (base_bits=" + text(options.base_bits) + ", " + text(extra) + " extra)");
    }
    if (extra > 0 && !last_bit_is_stored(options.index) && code % 2 == 0) {
      fail("code of weight " + text(i) + " is " + text(code) + ", an even level, with " + text(extra) +
           " extra bits: index 'oddlevel' expects flagged weights on odd levels");
    }
    base[at] = static_cast<int16_t>(code >> extra);
    for (int round = 0; round < extra; ++round) {
      ++flagged[static_cast<size_t>(round)];
      if (round + 1 < extra || last_bit_is_stored(options.index)) {
        planes[static_cast<size_t>(round)].push_back(static_cast<uint8_t>(code >> (extra - 1 - round) & 1));
      }
    }
    uint8_t& unit = extra_of_unit[static_cast<size_t>(groups.of(i))];
    if (unit != 0xFF && unit != extra) {
      fail("extra_bits of weight " + text(i) + " is " + text(extra) + " and " + text(unit) +
           " before it in its group of " + text(options.group_size) + ": index 'group' expects one number a group");
    }
    unit = static_cast<uint8_t>(extra);
  }

  Flags first, second;
  for (const uint8_t extra : extra_of_unit) {
    first.push_back(extra > 0 ? 1 : 0);
    if (extra > 0) second.push_back(extra > 1 ? 1 : 0);
  }
  const Bytes first_index = encode_flags(first, options.index);
  const Bytes second_index = second_index_is_kept(flagged) ? encode_flags(second, options.index) : Bytes();

  Flags extra_plane = std::move(planes[0]);
  extra_plane.insert(extra_plane.end(), planes[1].begin(), planes[1].end());
  const auto extras = static_cast<int64_t>(extra_plane.size());
  const int64_t header = kFixedHeader + 8 * static_cast<int64_t>(shape.size());
  const int64_t base_size = packed_bytes(weights, options.base_bits);
  Bytes out(static_cast<size_t>(header + base_size + packed_bytes(extras, 1)));
  std::copy(kMagic.begin(), kMagic.end(), out.begin());
  out[4] = kVersion;
  out[5] = static_cast<uint8_t>(options.index);
  out[6] = static_cast<uint8_t>(options.base_bits);
  out[7] = static_cast<uint8_t>(shape.size());
  out[8] = static_cast<uint8_t>(options.index == Index::kGroup ? options.group_axis : 0);
  out[9] = static_cast<uint8_t>(flagged[1] > 0 ? 2 : flagged[0] > 0 ? 1 : 0);
  put(&out, 16, 4, crc32(extra_bits));
  put(&out, 20, 4, options.index == Index::kGroup ? static_cast<uint64_t>(options.group_size) : 0);
  put(&out, 24, 8, static_cast<uint64_t>(flagged[0]));
  put(&out, 32, 8, static_cast<uint64_t>(flagged[1]));
  put(&out, 40, 8, first_index.size());
  put(&out, 48, 8, second_index.size());
  for (size_t d = 0; d < shape.size(); ++d) put(&out, kFixedHeader + 8 * d, 8, static_cast<uint64_t>(shape[d]));
  pack_row(base.data(), weights, options.base_bits, 0, base_size, out.data() + header);
  pack_row(extra_plane.data(), extras, 1, 0, packed_bytes(extras, 1), out.data() + header + base_size);
  out.insert(out.end(), first_index.begin(), first_index.end());
  out.insert(out.end(), second_index.begin(), second_index.end());
  put(&out, kChecksumOffset, 4, checksum(out));
  return out;
}

Info inspect(std::span<const uint8_t> data) {
  const auto size = static_cast<int64_t>(data.size());
  if (size < kFixedHeader || !std::equal(kMagic.begin(), kMagic.end(), data.begin())) {
    fail("no stored codes: expected bytes that encode has written");
  }
  if (data[4] != kVersion) {
    fail("stored codes have version " + text(data[4]) + ": this library reads version " + text(kVersion));
  }
  if (get(data, kChecksumOffset, 4) != checksum(data)) damaged("the checksum is wrong");
  Info info;
  if (data[5] >= kIndexNames.size()) damaged("index number " + text(data[5]));
  info.options.index = static_cast<Index>(data[5]);
  info.options.base_bits = data[6];
  info.options.group_axis = data[8];
  info.options.group_size = static_cast<int64_t>(get(data, 20, 4));
  const int rank = data[7];
  if (rank > kMaxRank) damaged(text(rank) + " dimensions");
  info.header = kFixedHeader + 8 * rank;
  if (size < info.header) damaged("bytes are missing");
  for (int d = 0; d < rank; ++d) {
    const uint64_t dimension = get(data, static_cast<size_t>(kFixedHeader + 8 * d), 8);
    info.shape.push_back(dimension > static_cast<uint64_t>(kMaxWeights) ? -1 : static_cast<int64_t>(dimension));
  }
  info.weights = weights_of(info.shape);
  if (info.weights < 0) damaged("a shape beyond 2^48 weights");
  try {
    check_options(info.options, info.shape.size());
  } catch (const std::invalid_argument& error) {
    damaged(error.what());
  }
  for (size_t round = 0; round < kMaxExtraBits; ++round) {
    const uint64_t count = get(data, 24 + 8 * round, 8);
    const int64_t most = round == 0 ? info.weights : info.flagged[round - 1];
    if (count > static_cast<uint64_t>(most)) damaged("more flagged weights than weights");
    info.flagged[round] = static_cast<int64_t>(count);
  }
  if (data[9] != (info.flagged[1] > 0 ? 2 : info.flagged[0] > 0 ? 1 : 0)) damaged("the number of rounds is wrong");
  info.base = packed_bytes(info.weights, info.options.base_bits);
  info.extra = packed_bytes(extra_plane_bits(info), 1);
  const uint64_t first = get(data, 40, 8);
  const uint64_t second = get(data, 48, 8);
  if (first > static_cast<uint64_t>(size) || second > static_cast<uint64_t>(size)) damaged("bytes are missing");
  info.index = static_cast<int64_t>(first + second);
  if (info.header + info.base + info.extra + info.index != size) {
    damaged(text(size) + " bytes where the header speaks of " +
            text(info.header + info.base + info.extra + info.index));
  }
  if (second > 0 && !second_index_is_kept(info.flagged)) damaged("a second index where nothing has to be said");
  return info;
}

Decoded decode(std::span<const uint8_t> data, std::optional<std::span<const uint8_t>> extra_bits) {
  Decoded result;
  result.info = inspect(data);
  const Info& info = result.info;
  const Options& options = info.options;
  const auto weights = static_cast<size_t>(info.weights);
  const auto part = [&](int64_t begin, int64_t size) {
    return data.subspan(static_cast<size_t>(begin), static_cast<size_t>(size));
  };
  const auto extra_part = part(info.header + info.base, info.extra);
  const auto first_size = static_cast<int64_t>(get(data, 40, 8));
  const int64_t index_begin = info.header + info.base + info.extra;

  if (extra_bits.has_value() && extra_bits->size() != weights) {
    fail("extra_bits has " + text(static_cast<int64_t>(extra_bits->size())) + " elements: expected one for each of " +
         text(info.weights) + " weights");
  }
  if (options.index == Index::kNone) {
    if (info.index != 0) damaged("an index where none is kept");
    if (!extra_bits.has_value()) fail("extra_bits is missing: these codes were stored with index='none'");
    for (const uint8_t extra : *extra_bits) {
      if (extra > kMaxExtraBits) fail("extra_bits holds " + text(extra) + ": expected 0 to " + text(kMaxExtraBits));
    }
    result.extra_bits.assign(extra_bits->begin(), extra_bits->end());
  } else {
    const Groups groups(info.shape, options);
    const int64_t units = info.weights == 0 ? 0 : groups.count(info.weights);
    Flags of_unit = decode_flags(part(index_begin, first_size), options.index, units, info.flagged[0]);
    if (info.flagged[1] > 0) {
      const int64_t chosen = count_of(of_unit);
      if (options.index != Index::kGroup && chosen != info.flagged[0]) damaged("the index names other weights");
      const Flags second = second_index_is_kept(info.flagged)
                               ? decode_flags(part(index_begin + first_size, info.index - first_size), options.index,
                                              chosen, info.flagged[1])
                               : Flags(static_cast<size_t>(chosen), 1);
      size_t next = 0;
      for (uint8_t& unit : of_unit) {
        if (unit != 0) unit = static_cast<uint8_t>(1 + second[next++]);
      }
    }
    result.extra_bits.resize(weights);
    for (size_t i = 0; i < weights; ++i) {
      result.extra_bits[i] = of_unit[static_cast<size_t>(groups.of(static_cast<int64_t>(i)))];
    }
  }
  std::array<int64_t, kMaxExtraBits> found{};
  for (const uint8_t extra : result.extra_bits) {
    if (extra > 0) ++found[0];
    if (extra > 1) ++found[1];
  }
  const bool same = found == info.flagged && crc32(result.extra_bits) == get(data, 16, 4);
  if (!same && options.index == Index::kNone) fail("extra_bits are not those that the codes were stored with");
  if (!same) damaged("the index names other weights");
  if (extra_bits.has_value() && !std::equal(extra_bits->begin(), extra_bits->end(), result.extra_bits.begin())) {
    fail("extra_bits are not those that the codes were stored with");
  }

  // Found counts equal the header's, from which the lengths of the planes were made: every read below is inside.
  result.codes.resize(weights);
  unpack_row(data.data() + info.header, options.base_bits, true, 0, info.weights, result.codes.data());
  const bool stored = last_bit_is_stored(options.index);
  int64_t first_bit = 0;
  int64_t second_bit = stored ? info.flagged[0] : info.flagged[1];
  for (size_t i = 0; i < weights; ++i) {
    const int extra = result.extra_bits[i];
    int code = result.codes[i];
    for (int round = 0; round < extra; ++round) {
      const bool last = round + 1 == extra;
      int64_t& next = round == 0 ? first_bit : second_bit;
      code = code * 2 + (last && !stored ? 1 : unpacked_code(extra_part.data(), 1, next, false));
      if (!last || stored) ++next;
    }
    result.codes[i] = static_cast<int16_t>(code);
  }
  return result;
}

}  // namespace mixbit::storage
