// libFuzzer target over the package reader: bytes are taken as they are, and as a manifest with header and checksum
// that fit (the fuzzer would hardly find a checksum by itself).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sample_package.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mixbit::runtime;
  std::vector<uint8_t> bytes(data, data + size);
  open_and_run(bytes);
  if (size == 0) return 0;
  static const std::vector<uint8_t> sample = sample_package();
  static const std::vector<uint8_t> tail = [] {
    const size_t start = (32 + number_at<uint64_t>(sample, 16) + 63) / 64 * 64;
    return std::vector<uint8_t>(sample.begin() + static_cast<std::ptrdiff_t>(start), sample.end());
  }();
  open_and_run(assembled(sample, bytes, tail));
  open_and_run(assembled(sample, bytes, {}));
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Starts from a sound manifest instead of nothing.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  using namespace mixbit::runtime;
  const auto manifest_of = [](const std::vector<uint8_t>& sample) {
    const auto end = static_cast<std::ptrdiff_t>(32 + number_at<uint64_t>(sample, 16));
    return std::vector<uint8_t>(sample.begin() + 32, sample.begin() + end);
  };
  static const std::vector<uint8_t> manifests[] = {manifest_of(sample_package()), manifest_of(sample_moves_package()),
                                                   manifest_of(sample_functions_package())};
  const std::vector<uint8_t>& manifest = manifests[seed % 3];
  if (size < 64 && manifest.size() <= max_size) {
    std::copy(manifest.begin(), manifest.end(), data);
    size = manifest.size();
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
