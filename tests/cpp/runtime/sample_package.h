#pragma once

// Small packages that have all operations between them, and mutations of it that keep lengths and checksums true,
// so that they reach what lies behind them. Shared by the tests and the fuzzer.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <mixbit/common/crc32.h>
#include <mixbit/runtime/network.h>
#include <mixbit/runtime/package.h>

namespace mixbit::runtime {

inline std::string sample_grid(double scale, int low, int high) {
  return R"({"scale":)" + std::to_string(scale) + R"(,"zero_point":0,"low":)" + std::to_string(low) + R"(,"high":)" +
         std::to_string(high) + "}";
}

// Codes of `bits` bits.
inline std::vector<int8_t> sample_codes(int n, int bits) {
  std::vector<int8_t> codes;
  for (int i = 0; i < n; ++i) codes.push_back(static_cast<int8_t>((i * 7 + i / 5) % (1 << bits) - (1 << (bits - 1))));
  return codes;
}

inline std::vector<uint8_t> sample_package() {
  const std::string wide = sample_grid(0.05, -128, 127), positive = sample_grid(0.1, 0, 255);
  const std::string four = sample_grid(0.3, 0, 15);
  const std::string manifest =
      R"({"made_by":{"test":"\u00e4"},"nodes":[{"name":"x","op":"input","shape":[2,5,5],"grid":)" + wide +
      R"(},{"name":"conv","op":"conv2d","module":"stem","inputs":["x"],"grid":)" + positive + R"(,"act":)" + wide +
      R"(,"weight":"w","bias":"b","multiplier":"m","stride":[1,1],"padding":[1,1],"dilation":[1,1],"groups":1},)" +
      R"({"name":"relu","op":"relu","inputs":["conv"],"grid":)" + positive + "}," +
      R"({"name":"pool","op":"max_pool2d","inputs":["relu"],"grid":)" + four +
      R"(,"kernel":[2,2],"stride":[2,2],"padding":[0,0],"dilation":[1,1],"ceil_mode":true},)" +
      R"({"name":"sum","op":"add","inputs":["pool","pool"],"grid":)" + wide + "}," +
      R"({"name":"flat","op":"reshape","inputs":["sum"],"grid":)" + wide + R"(,"to":[-1]},)" +
      R"({"name":"logits","op":"linear","inputs":["flat"],"grid":)" + wide + R"(,"act":)" + wide +
      R"(,"weight":"w2","bias":"b2","multiplier":"m2"}],"outputs":["logits"]})";
  const std::vector<int8_t> w = sample_codes(4 * 2 * 9, 3), w2 = sample_codes(3 * 36, 8);
  const std::vector<int32_t> b = {-7, 0, 7, 100}, b2 = {1, 2, 3};
  const std::vector<float> m = {0.01f, 0.02f, -0.01f, 0.03f}, m2 = {0.002f, 0.001f, 0.003f};
  const std::vector<Array> arrays = {
      {"w", TensorType::kPacked, 3, {4, 2, 3, 3}, w.data()}, {"b", TensorType::kInt32, 0, {4}, b.data()},
      {"m", TensorType::kFloat32, 0, {4}, m.data()},         {"w2", TensorType::kPacked, 8, {3, 36}, w2.data()},
      {"b2", TensorType::kInt32, 0, {3}, b2.data()},         {"m2", TensorType::kFloat32, 0, {3}, m2.data()},
  };
  return make_package(manifest, arrays);
}

// The operations that the other sample lacks; it holds no tensors.
inline std::vector<uint8_t> sample_moves_package() {
  const std::string wide = sample_grid(0.05, -128, 127), positive = sample_grid(0.1, 0, 255);
  const std::string manifest =
      R"({"nodes":[{"name":"x","op":"input","shape":[3,5,4],"grid":)" + wide +
      R"(},{"name":"pad","op":"pad","inputs":["x"],"grid":)" + wide + R"(,"amounts":[1,2,0,1]},)" +
      R"({"name":"mean","op":"avg_pool2d","inputs":["pad"],"grid":)" + positive +
      R"(,"kernel":[3,2],"stride":[2,1],"padding":[1,1],"count_include_pad":false},)" +
      R"({"name":"six","op":"relu6","inputs":["mean"],"grid":)" + positive + "}," +
      R"({"name":"part","op":"slice","inputs":["six"],"grid":)" + positive +
      R"(,"dim":-1,"start":-7,"end":null,"step":2},)" + R"({"name":"twice","op":"repeat","inputs":["part"],"grid":)" +
      positive + R"(,"counts":[2,3]},)" + R"({"name":"same","op":"identity","inputs":["twice"],"grid":)" + wide + "}," +
      R"({"name":"all","op":"cat","inputs":["twice","same","same"],"grid":)" + wide + "}," +
      R"({"name":"whole","op":"avg_pool2d","inputs":["all"],"grid":)" + wide + R"(,"keepdim":false}],)" +
      R"("outputs":["whole","six","x"]})";
  return make_package(manifest, {});
}

// Functions, products and other orders.
inline std::vector<uint8_t> sample_functions_package() {
  const std::string wide = sample_grid(0.05, -8, 7), positive = sample_grid(0.1, 0, 255);
  const std::string manifest =
      R"({"nodes":[{"name":"x","op":"input","shape":[3,4,2],"grid":)" + wide +
      R"(},{"name":"f","op":"lookup","inputs":["x"],"grid":)" + positive + R"(,"table":"t"},)" +
      R"({"name":"mean","op":"avg_pool2d","inputs":["f"],"grid":)" + wide + R"(,"keepdim":true},)" +
      R"({"name":"product","op":"mul","inputs":["mean","f"],"grid":)" + wide + "}," +
      R"({"name":"sum","op":"add","inputs":["product","mean"],"grid":)" + wide + "}," +
      R"({"name":"turned","op":"permute","inputs":["sum"],"grid":)" + wide + R"(,"dims":[0,3,1,2]},)" +
      R"({"name":"blocks","op":"pixel_unshuffle","inputs":["sum"],"grid":)" + positive + R"(,"factor":2},)" +
      R"({"name":"shares","op":"softmax","inputs":["turned"],"grid":)" + positive + R"(,"table":"p","dim":-2}],)" +
      R"("outputs":["shares","blocks"]})";
  std::vector<uint8_t> codes;
  std::vector<int32_t> powers;
  for (int i = 0; i < 16; ++i) {
    codes.push_back(static_cast<uint8_t>(i * 17));
    powers.push_back(65536 >> i);
  }
  const std::vector<Array> arrays = {{"t", TensorType::kUint8, 0, {16}, codes.data()},
                                     {"p", TensorType::kInt32, 0, {16}, powers.data()}};
  return make_package(manifest, arrays);
}

template <typename T>
T number_at(const std::vector<uint8_t>& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}
template <typename T>
void set_number(std::vector<uint8_t>* bytes, size_t at, T value) {
  std::memcpy(bytes->data() + at, &value, sizeof(value));
}

// Makes the header fit: manifest of `manifest_bytes`, and the checksum of it.
inline void seal(std::vector<uint8_t>* bytes, uint64_t manifest_bytes) {
  set_number<uint64_t>(bytes, 16, manifest_bytes);
  set_number<uint64_t>(bytes, 24, bytes->size());
  set_number<uint32_t>(bytes, 12, crc32({bytes->data() + 32, manifest_bytes}));
}

// A package with the header of another, a manifest and data, sealed.
template <typename Text>
std::vector<uint8_t> assembled(const std::vector<uint8_t>& header, const Text& manifest,
                               const std::vector<uint8_t>& data) {
  const size_t end = 32 + manifest.size(), start = data.empty() ? end : (end + 63) / 64 * 64;
  std::vector<uint8_t> bytes(start + data.size());
  std::copy_n(header.begin(), 32, bytes.begin());
  std::copy(manifest.begin(), manifest.end(), bytes.begin() + 32);
  std::copy(data.begin(), data.end(), bytes.begin() + static_cast<std::ptrdiff_t>(start));
  seal(&bytes, manifest.size());
  return bytes;
}

// A few changes of the manifest (numbers, characters, pieces twice or gone) or of the data with its checksum in the
// manifest ignored.
inline std::vector<uint8_t> mutated(const std::vector<uint8_t>& original, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % std::max<size_t>(n, 1)); };
  const auto length = number_at<uint64_t>(original, 16);
  std::string text(original.begin() + 32, original.begin() + 32 + static_cast<std::ptrdiff_t>(length));
  const size_t old_start = (32 + length + 63) / 64 * 64;
  const size_t data_start = std::min(old_start, original.size());  // a package without tensors ends with its manifest
  std::vector<uint8_t> data(original.begin() + static_cast<std::ptrdiff_t>(data_start), original.end());
  const std::string kNumbers[] = {"0",
                                  "-1",
                                  "1",
                                  "2",
                                  "3",
                                  "7",
                                  "255",
                                  "64",
                                  "1024",
                                  "65536",
                                  "1073741824",
                                  "4294967296",
                                  "1e30",
                                  "9223372036854775807",
                                  "16",
                                  "0.5",
                                  "1e-40",
                                  "-128",
                                  "18446744073709551616"};
  for (size_t changes = 1 + below(3); changes > 0; --changes) {
    const size_t at = below(text.size());
    switch (below(6)) {
      case 0:
      case 1: {  // another number
        const size_t first = text.find_first_of("0123456789", at);
        if (first == std::string::npos) break;
        const size_t last = std::min(text.find_first_not_of("0123456789.e-", first), text.size());
        text.replace(first, last - first, kNumbers[below(std::size(kNumbers))]);
        break;
      }
      case 2:  // a piece twice
        text.insert(at, text.substr(below(text.size()), below(40)));
        break;
      case 3:  // a piece gone
        text.erase(at, 1 + below(20));
        break;
      case 4:
        text[at] = static_cast<char>(random());
        break;
      default:
        if (!data.empty()) data[below(data.size())] ^= static_cast<uint8_t>(1u << below(8));
    }
    if (text.empty()) text = "{}";
  }
  return assembled(original, text, data);
}

// Whether a package is accepted; if it is small it is also run.
inline bool open_and_run(const std::vector<uint8_t>& bytes) {
  // A copy of exactly this size: a sanitizer sees every step beyond it.
  const std::vector<uint8_t> exact(bytes);
  try {
    Options options;
    options.keep_values = exact.size() % 2 == 1;
    Network network(Package::parse(exact), options);
    int64_t work = network.arena_bytes();
    for (const StepInfo& step : network.steps())
      work = std::min(int64_t{1} << 40, work) + std::min(int64_t{1} << 40, step.macs);
    int64_t elements = 1;
    for (const int64_t size : network.package().input_shape()) elements *= size;
    if (work > 1 << 22 || elements > 1 << 20) return true;
    const std::vector<float> x(static_cast<size_t>(elements), 0.7f);
    std::vector<std::vector<float>> rooms;
    for (const int output : network.package().outputs()) {
      int64_t size = 1;
      for (const int64_t n : network.package().nodes()[static_cast<size_t>(output)].shape) size *= n;
      rooms.emplace_back(static_cast<size_t>(size));
    }
    std::vector<float*> outputs;
    for (auto& room : rooms) outputs.push_back(room.data());
    network.run(x.data(), 1, outputs);
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace mixbit::runtime
