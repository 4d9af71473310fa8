// Every instruction set against scalar, bit by bit, and scalar against the formulas.
#include <mixbit/common/half.h>
#include <mixbit/kernels/cpu.h>

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

using namespace mixbit::kernels::cpu;
using mixbit::Rounding;

// Values of all kinds: ordinary, ties, denormal, huge, infinite, NaN, signed zeros.
std::vector<float> samples(int64_t n, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 10.0f * scale);
  const float special[] = {0.0f,
                           -0.0f,
                           0.5f * scale,
                           -1.5f * scale,
                           2.5f * scale,
                           std::numeric_limits<float>::denorm_min(),
                           -1e-40f,
                           1e30f,
                           -3e38f,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()};
  std::vector<float> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = i % 7 == 3 ? special[random() % std::size(special)] : normal(random);
  }
  return values;
}

std::vector<std::byte> stored(const std::vector<float>& values, StorageType storage) {
  const size_t size = storage == StorageType::kFloat32 ? 4 : 2;
  std::vector<std::byte> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    if (storage == StorageType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &values[i], 4);
    } else {
      const uint16_t half =
          storage == StorageType::kFloat16 ? mixbit::float_to_half(values[i]) : mixbit::float_to_bfloat16(values[i]);
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  return bytes;
}

bool same_bits(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

struct Case {
  StorageType storage;
  Isa isa;
  int64_t n;
};

class CpuKernels : public testing::TestWithParam<std::tuple<StorageType, Isa, int64_t>> {
 protected:
  void SetUp() override {
    if (kernels(std::get<1>(GetParam())).isa != std::get<1>(GetParam())) {
      GTEST_SKIP() << "this processor lacks the instruction set";
    }
  }
  StorageType storage() const { return std::get<0>(GetParam()); }
  int64_t n() const { return std::get<2>(GetParam()); }
  const KernelTable& tested() const { return kernels(std::get<1>(GetParam())); }
  const KernelTable& scalar() const { return kernels(Isa::kScalar); }
  size_t bytes() const { return static_cast<size_t>(n()) * (storage() == StorageType::kFloat32 ? 4 : 2); }
};

std::vector<Quantizer> quantizers() {
  std::vector<Quantizer> all;
  for (const int bits : {1, 2, 4, 8, 16}) {
    for (const bool is_signed : {true, false}) {
      for (const bool narrow : {true, false}) {
        if (bits == 1 && is_signed && narrow) continue;
        for (const auto rounding : {Rounding::kHalfEven, Rounding::kHalfUp}) {
          for (const float zero_point : {0.0f, 3.0f}) {
            all.push_back({0.37f, zero_point, mixbit::quant_range(bits, is_signed, narrow), rounding});
          }
        }
      }
    }
  }
  return all;
}

TEST_P(CpuKernels, FakeQuantizeEqualsScalarBitByBit) {
  const auto x = stored(samples(n(), 0.37f, 1), storage());
  for (const Quantizer& q : quantizers()) {
    std::vector<std::byte> expected(bytes()), got(bytes());
    scalar().fake_quantize(storage(), x.data(), expected.data(), n(), q);
    tested().fake_quantize(storage(), x.data(), got.data(), n(), q);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
  }
}

TEST_P(CpuKernels, BackwardEqualsScalarBitByBit) {
  auto values = samples(n(), 0.37f, 2);
  for (float& v : values) {
    if (!std::isfinite(v)) v = 1.0f;  // sums of NaN have no comparable payload
  }
  std::vector<float> grads = samples(n(), 0.1f, 3);
  for (float& v : grads) {
    if (!std::isfinite(v) || std::abs(v) > 1e10f) v = -0.25f;
  }
  const auto x = stored(values, storage());
  const auto g = stored(grads, storage());
  for (const Quantizer& q : quantizers()) {
    std::vector<std::byte> expected(bytes()), got(bytes());
    double expected_sums[2], sums[2];
    scalar().fake_quantize_backward(storage(), g.data(), x.data(), expected.data(), n(), q, &expected_sums[0],
                                    &expected_sums[1]);
    tested().fake_quantize_backward(storage(), g.data(), x.data(), got.data(), n(), q, &sums[0], &sums[1]);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
    ASSERT_TRUE(same_bits(expected_sums[0], sums[0]));
    ASSERT_TRUE(same_bits(expected_sums[1], sums[1]));
  }
}

TEST_P(CpuKernels, StatisticsEqualScalarBitByBit) {
  for (const bool finite : {true, false}) {
    auto values = samples(n(), 0.37f, 4);
    for (float& v : values) {
      if (finite && !(std::abs(v) < 1e10f)) v = 2.0f;
    }
    const auto x = stored(values, storage());
    const auto reference = stored(samples(n(), 0.37f, finite ? 5 : 6), storage());
    std::vector<Quantizer> candidates;
    for (int bits = 2; bits < 13; ++bits) {
      candidates.push_back(
          {0.05f * static_cast<float>(bits), 0.0f, mixbit::quant_range(bits, true, true), Rounding::kHalfEven});
    }
    const auto count = static_cast<int64_t>(candidates.size());
    double expected_signal, signal;
    std::vector<double> expected_noise(candidates.size()), noise(candidates.size());
    scalar().quantization_noise(storage(), x.data(), n(), candidates.data(), count, &expected_signal,
                                expected_noise.data());
    tested().quantization_noise(storage(), x.data(), n(), candidates.data(), count, &signal, noise.data());
    EXPECT_TRUE(same_bits(expected_signal, signal));
    for (size_t k = 0; k < noise.size(); ++k) EXPECT_TRUE(same_bits(expected_noise[k], noise[k]));

    scalar().noise_power(storage(), x.data(), reference.data(), n(), &expected_signal, &expected_noise[0]);
    tested().noise_power(storage(), x.data(), reference.data(), n(), &signal, &noise[0]);
    EXPECT_TRUE(same_bits(expected_signal, signal));
    EXPECT_TRUE(same_bits(expected_noise[0], noise[0]));

    Moments expected{}, got{};
    scalar().observe(storage(), x.data(), n(), &expected);
    tested().observe(storage(), x.data(), n(), &got);
    EXPECT_TRUE(same_bits(expected.min, got.min));
    EXPECT_TRUE(same_bits(expected.max, got.max));
    EXPECT_TRUE(same_bits(expected.sum, got.sum));
    EXPECT_TRUE(same_bits(expected.sum_squares, got.sum_squares));
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, CpuKernels,
    testing::Combine(testing::Values(StorageType::kFloat32, StorageType::kFloat16, StorageType::kBFloat16),
                     testing::Values(Isa::kAvx2, Isa::kAvx512), testing::Values(1, 15, 16, 17, 100, 4097, 16384)));

TEST(ScalarKernels, FakeQuantizeIsTheFormula) {
  const auto values = samples(1000, 0.37f, 7);
  for (const Quantizer& q : quantizers()) {
    std::vector<float> got(values.size());
    kernels(Isa::kScalar).fake_quantize(StorageType::kFloat32, values.data(), got.data(), 1000, q);
    for (size_t i = 0; i < values.size(); ++i) {
      const float expected = mixbit::fake_quantize(values[i], q.scale, q.zero_point, q.range, q.rounding);
      ASSERT_TRUE(same_bits(expected, got[i])) << values[i];
    }
  }
}

TEST(Half, ConversionsRoundTripAndRoundToEven) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float wide = mixbit::half_to_float(static_cast<uint16_t>(bits));
    if (!std::isnan(wide)) {
      ASSERT_EQ(mixbit::float_to_half(wide), bits);
    }
    const float bf = mixbit::bfloat16_to_float(static_cast<uint16_t>(bits));
    if (!std::isnan(bf)) {
      ASSERT_EQ(mixbit::float_to_bfloat16(bf), bits);
    }
  }
  EXPECT_EQ(mixbit::float_to_half(2049.0f), mixbit::float_to_half(2048.0f));  // tie to even
  EXPECT_EQ(mixbit::float_to_half(2051.0f), mixbit::float_to_half(2052.0f));
  EXPECT_EQ(mixbit::float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(mixbit::float_to_half(65519.0f), 0x7bff);
  EXPECT_TRUE(std::isnan(mixbit::half_to_float(mixbit::float_to_half(std::nanf("")))));
}

TEST(Isa, NamesAreParsedAndOthersRefused) {
  Isa isa;
  EXPECT_TRUE(parse_isa("avx2", &isa));
  EXPECT_EQ(isa, Isa::kAvx2);
  EXPECT_FALSE(parse_isa("sse", &isa));
}

}  // namespace
