#pragma once

// Codes of weights with extra levels as bytes: a plane of base codes, the extra bits, and an index of which weights
// have them. Standard library only; bad arguments and damaged bytes throw std::invalid_argument.
//
// A weight with e extra bits has a code of base_bits + e bits on a grid whose step is 2^e times finer (nested grids:
// code = base * 2^e + extra). The base plane alone is therefore the network without extra levels.

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mixbit::storage {

// How the flags (which weights have extra bits) are kept.
//   kNone      not at all: who decodes has them
//   kBitmap    one bit a weight
//   kEntropy   range coder, close to the entropy H(f) of the flags
//   kRle4      4 bits for the run of plain weights before each flagged one, 15: fifteen of them and no flagged one yet
//   kGroup     one bit for `group_size` weights, which have the same extra bits
//   kOddLevel  as kEntropy; flagged weights sit on odd codes only, so their last bit need not be stored
enum class Index : uint8_t { kNone, kBitmap, kEntropy, kRle4, kGroup, kOddLevel };
inline constexpr std::array<const char*, 6> kIndexNames = {"none", "bitmap", "entropy", "rle4", "group", "oddlevel"};

inline constexpr int kMaxBaseBits = 8;
inline constexpr int kMaxExtraBits = 2;
inline constexpr int kMaxRank = 8;

// Throws where the name is unknown.
Index parse_index(const std::string& name);

struct Options {
  int base_bits = 2;
  Index index = Index::kEntropy;
  // kGroup only: weights of a group follow each other along `group_axis`; the last group of a row may be shorter.
  int64_t group_size = 0;
  int group_axis = 0;
};

// What a blob holds, in bytes. flagged[r]: weights with more than r extra bits.
struct Info {
  Options options;
  std::vector<int64_t> shape;
  int64_t weights = 0;
  std::array<int64_t, kMaxExtraBits> flagged{};
  int64_t base = 0;
  int64_t extra = 0;
  int64_t index = 0;
  int64_t header = 0;
  int max_bits() const { return options.base_bits + (flagged[1] > 0 ? 2 : flagged[0] > 0 ? 1 : 0); }
};

// codes, extra_bits: [product of shape], row-major. extra_bits 0 ... 2; a code fits base_bits + its extra bits, signed.
// Throws where one does not, where flags are not the same within a group (kGroup), where a flagged weight sits on an
// even code (kOddLevel).
std::vector<uint8_t> encode(std::span<const int16_t> codes, std::span<const uint8_t> extra_bits,
                            std::span<const int64_t> shape, const Options& options);

// The header of a blob, its checksum and lengths verified.
Info inspect(std::span<const uint8_t> data);

struct Decoded {
  Info info;
  std::vector<int16_t> codes;
  std::vector<uint8_t> extra_bits;
};

// What encode was given. extra_bits: for kNone, of the blob's shape; otherwise none, or the same as the blob's own.
// Throws where bytes are missing, added or damaged, or extra_bits are not those of the blob.
Decoded decode(std::span<const uint8_t> data, std::optional<std::span<const uint8_t>> extra_bits = std::nullopt);

// CRC-32 (IEEE 802.3) of a blob but for the four bytes that hold it, at kChecksumOffset, little end first.
inline constexpr size_t kChecksumOffset = 12;
uint32_t checksum(std::span<const uint8_t> data);

// Closed forms: stored bits a weight where a share `fraction` of the weights has `extra` more bits each, drawn
// independently (header and padding to bytes left out). H(f) = -f log2 f - (1 - f) log2(1 - f).
//   none n + e f;  bitmap n + e f + 1;  entropy n + e f + H(f);  rle4 n + e f + 4 f / (1 - (1 - f)^15);
//   group n + e f + 1 / group_size;  oddlevel n + (e - 1) f + H(f)
double expected_bits(int base_bits, double fraction, Index index, int64_t group_size = 16, int extra = 1);
// The part of it that says which weights are flagged.
double index_bits(double fraction, Index index, int64_t group_size = 16);

// The share of flagged weights at which expected_bits reaches `bits`: largest up to where it stops rising. Throws
// where bits are out of reach.
double fraction_at(double bits, int base_bits, Index index, int64_t group_size = 16, int extra = 1);

}  // namespace mixbit::storage
