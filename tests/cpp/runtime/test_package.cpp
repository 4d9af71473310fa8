// Packages from bytes: what was written is read, what was damaged is refused, and nothing is read beyond the end. Worth
// most under the sanitizers.

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <mixbit/runtime/c.h>
#include <mixbit/runtime/network.h>
#include <mixbit/runtime/package.h>

#include "sample_package.h"

namespace {

using namespace mixbit::runtime;

TEST(Package, HoldsWhatWasWritten) {
  const std::vector<uint8_t> bytes = sample_package();
  const Package package = Package::parse(bytes);
  ASSERT_EQ(package.nodes().size(), 7u);
  const Node& conv = package.nodes()[1];
  EXPECT_EQ(conv.op, Op::kConv2d);
  EXPECT_EQ(conv.shape, (Shape{4, 5, 5}));
  EXPECT_EQ(conv.act_bits, 8);
  EXPECT_EQ(package.codes(conv.weight), sample_codes(4 * 2 * 9, 3));
  EXPECT_EQ(package.int32s(conv.bias), (std::vector<int32_t>{-7, 0, 7, 100}));
  for (size_t i = 0; i < package.tensors().size(); ++i) {
    const auto data = package.data(static_cast<int>(i));
    EXPECT_EQ((data.data() - bytes.data()) % (package.tensors()[i].type == TensorType::kPacked ? kFileAlignment : 4),
              0);
  }
  EXPECT_EQ(package.input_shape(), (Shape{2, 5, 5}));
}

TEST(Package, RunsAsItSays) {
  const std::vector<uint8_t> bytes = sample_package();
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  const int64_t batch = 9;
  std::vector<float> x(batch * 50);
  for (float& value : x) value = normal(random);
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 5}) {
    for (const bool keep : {false, true}) {
      Options options;
      options.threads = threads;
      options.keep_values = keep;
      Network network(Package::parse(bytes), options);
      std::vector<float> y(batch * 3);
      float* const rooms[] = {y.data()};
      network.run(x.data(), batch, rooms);
      results.push_back(y);
      // A batch is the images one after the other.
      std::vector<float> one(3);
      float* const room[] = {one.data()};
      network.run(x.data() + 4 * 50, 1, room);
      EXPECT_TRUE(std::equal(one.begin(), one.end(), y.begin() + 4 * 3));
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

TEST(Package, WritersAreToldWhatIsWrong) {
  const auto message = [](const std::string& manifest, const std::vector<Array>& arrays) -> std::string {
    try {
      make_package(manifest, arrays);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message("{", {}).find("the manifest is no valid JSON"), std::string::npos);
  EXPECT_NE(message("{}", {}).find("no nodes"), std::string::npos);
  const std::vector<int8_t> codes = {0, 4, -5, 1};
  const Array wide{"w", TensorType::kPacked, 3, {4}, codes.data()};
  const std::string one =
      R"({"nodes":[{"name":"x","op":"input","shape":[4],"grid":)" + sample_grid(1.0, -8, 7) + R"(}],"outputs":["x"]})";
  EXPECT_NE(message(one, {{wide}}).find("tensor 'w' holds the code 4, expected -4 to 3"), std::string::npos);
  EXPECT_EQ(message(one, {}), "");
}

TEST(Package, NothingButFilesIsOpened) {
  EXPECT_THROW(Package::open(testing::TempDir()), Error);
  const std::string pipe = testing::TempDir() + "package_pipe";
  ::unlink(pipe.c_str());
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(Package::open(pipe), Error);  // and not waited for
  ::unlink(pipe.c_str());
}

TEST(CInterface, RunsAndReportsErrors) {
  char error[32] = "";
  EXPECT_EQ(mixbit_open("/nowhere/m.mixbit", 1, error, sizeof(error)), nullptr);
  EXPECT_EQ(std::string(error), "cannot open '/nowhere/m.mixbit'");  // cut to the room it has
  EXPECT_EQ(mixbit_open("/nowhere/m.mixbit", 1, nullptr, 0), nullptr);
  const std::string path = testing::TempDir() + "c_interface.mixbit";
  const std::vector<uint8_t> bytes = sample_package();
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  mixbit_network* network = mixbit_open(path.c_str(), 2, error, sizeof(error));
  ASSERT_NE(network, nullptr) << error;
  EXPECT_EQ(mixbit_outputs(network), 1);
  EXPECT_EQ(mixbit_rank(network, -1), 3);
  EXPECT_EQ(mixbit_size(network, -1, 0), 2);
  EXPECT_EQ(mixbit_rank(network, 0), 1);
  EXPECT_EQ(mixbit_size(network, 0, 0), 3);
  EXPECT_EQ(mixbit_size(network, 0, 1), -1);
  EXPECT_EQ(mixbit_rank(network, 1), -1);
  EXPECT_STREQ(mixbit_output_name(network, 0), "logits");
  EXPECT_EQ(mixbit_output_name(network, 1), nullptr);
  EXPECT_NE(mixbit_isa(network), nullptr);
  const std::vector<float> x(50, 0.25f);
  std::vector<float> y(3), expected(3);
  float* rooms[] = {y.data()};
  EXPECT_EQ(mixbit_run(network, x.data(), 1, rooms, error, sizeof(error)), 0);
  Network direct(Package::parse(bytes));
  float* const other[] = {expected.data()};
  direct.run(x.data(), 1, other);
  EXPECT_EQ(y, expected);
  EXPECT_EQ(mixbit_run(network, x.data(), -1, rooms, error, sizeof(error)), -1);
  EXPECT_EQ(std::string(error), "batch is -1, expected at least ");
  mixbit_close(network);
}

TEST(Fuzz, DamagedPackagesAreRefusedOrRun) {
  const std::vector<uint8_t> samples[] = {sample_package(), sample_moves_package(), sample_functions_package()};
  int accepted = 0;
  const char* given = std::getenv("MIXBIT_FUZZ_ROUNDS");
  const int rounds = given != nullptr ? std::atoi(given) : 4000;
  for (int seed = 0; seed < rounds; ++seed) {
    accepted += open_and_run(mutated(samples[seed % 3], static_cast<unsigned>(seed))) ? 1 : 0;
  }
  // Both happen: mutations reach behind the checksums.
  EXPECT_GT(accepted, rounds / 100);
  EXPECT_LT(accepted, rounds);
}

TEST(Fuzz, SamplesRun) {
  EXPECT_TRUE(open_and_run(sample_package()));
  EXPECT_TRUE(open_and_run(sample_moves_package()));
  EXPECT_TRUE(open_and_run(sample_functions_package()));
}

TEST(Fuzz, EveryCutIsRefused) {
  const std::vector<uint8_t> bytes = sample_package();
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_FALSE(open_and_run({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)})) << n;
  }
}

TEST(Fuzz, EveryFlippedBitIsRefused) {
  std::vector<uint8_t> bytes = sample_package();
  for (size_t bit = 0; bit < bytes.size() * 8; bit += 3) {
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_THROW(Package::parse(bytes), Error) << bit;
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  }
}

}  // namespace
