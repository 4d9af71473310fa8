// Every instruction set against scalar, bit by bit, and scalar against the formulas.
#include <mixbit/common/gates.h>
#include <mixbit/common/half.h>
#include <mixbit/common/levels.h>
#include <mixbit/kernels/cpu.h>

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace mixbit::kernels::cpu;
using mixbit::Gradient;
using mixbit::MixtureForm;
using mixbit::Rounding;

// Values of all kinds: ordinary, ties, ends of grids, denormal, huge, infinite, NaN, signed zeros.
std::vector<float> samples(int64_t n, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 10.0f * scale);
  const float special[] = {0.0f,
                           -0.0f,
                           0.5f * scale,
                           -1.5f * scale,
                           2.5f * scale,
                           4.0f * scale,
                           7.0f * scale,
                           15.0f * scale,
                           -8.0f * scale,
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

// Bytes at a 64-byte boundary.
class Aligned {
 public:
  explicit Aligned(size_t size) : bytes_(size + 64) {}
  std::byte* data() {
    void* p = bytes_.data();
    size_t space = bytes_.size();
    return static_cast<std::byte*>(std::align(64, bytes_.size() - 64, p, space));
  }

 private:
  std::vector<std::byte> bytes_;
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

// Each with every gradient.
std::vector<Quantizer> quantizers_of_all_gradients() {
  std::vector<Quantizer> all = quantizers();
  const size_t count = all.size();
  for (size_t i = 0; i < count; ++i) {
    all.push_back(all[i]);
    all.back().gradient = Gradient::kClip;
  }
  return all;
}

TEST_P(CpuKernels, FakeQuantizeEqualsScalarBitByBit) {
  const auto x = stored(samples(n(), 0.37f, 1), storage());
  for (const Quantizer& q : quantizers()) {
    std::vector<std::byte> expected(bytes()), got(bytes());
    scalar().fake_quantize(storage(), x.data(), expected.data(), n(), q, false);
    tested().fake_quantize(storage(), x.data(), got.data(), n(), q, false);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
    // Past the cache: an aligned output, and one that cannot be.
    for (const size_t shift : {size_t{0}, size_t{4}}) {
      Aligned past_cache(bytes() + 64);
      tested().fake_quantize(storage(), x.data(), past_cache.data() + shift, n(), q, true);
      ASSERT_EQ(std::memcmp(expected.data(), past_cache.data() + shift, bytes()), 0);
    }
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
  for (const Quantizer& q : quantizers_of_all_gradients()) {
    std::vector<std::byte> expected(bytes()), got(bytes());
    double expected_sums[2], sums[2];
    scalar().fake_quantize_backward(storage(), g.data(), x.data(), expected.data(), n(), q, &expected_sums[0],
                                    &expected_sums[1], false);
    tested().fake_quantize_backward(storage(), g.data(), x.data(), got.data(), n(), q, &sums[0], &sums[1], false);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
    ASSERT_TRUE(same_bits(expected_sums[0], sums[0]));
    ASSERT_TRUE(same_bits(expected_sums[1], sums[1]));
    // Every part alone is what it is together with the others.
    sums[0] = -1.0;
    tested().fake_quantize_backward(storage(), g.data(), x.data(), nullptr, n(), q, &sums[0], nullptr, false);
    ASSERT_TRUE(same_bits(expected_sums[0], sums[0]));
    Aligned past_cache(bytes());
    tested().fake_quantize_backward(storage(), g.data(), x.data(), past_cache.data(), n(), q, nullptr, nullptr, true);
    ASSERT_EQ(std::memcmp(expected.data(), past_cache.data(), bytes()), 0);
    auto in_place = g;
    tested().fake_quantize_backward(storage(), in_place.data(), x.data(), in_place.data(), n(), q, nullptr, nullptr,
                                    false);
    ASSERT_EQ(std::memcmp(expected.data(), in_place.data(), bytes()), 0);
  }
}

// What is no number counts as outside and shows in the sums; infinities are at the ends.
TEST_P(CpuKernels, GradientsOfNanAndInfinity) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto g = stored(std::vector<float>(static_cast<size_t>(n()), 1.0f), storage());
  for (const Quantizer& q : quantizers_of_all_gradients()) {
    for (const float value : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      const auto x = stored(std::vector<float>(static_cast<size_t>(n()), value), storage());
      std::vector<std::byte> dx(bytes(), std::byte{1});
      double sum;
      tested().fake_quantize_backward(storage(), g.data(), x.data(), dx.data(), n(), q, &sum, nullptr, false);
      ASSERT_EQ(dx, std::vector<std::byte>(bytes()));
      const float end = value > 0.0f ? q.range.quant_max : q.range.quant_min;
      const double expected = static_cast<double>(end - q.zero_point) * static_cast<double>(n());
      if (std::isnan(value)) {
        ASSERT_EQ(std::isnan(sum), n() > 0);
      } else {
        ASSERT_NEAR(sum, expected, 1e-4 * std::abs(expected));  // lanes add in float32
      }
    }
  }
}

TEST_P(CpuKernels, ExtraLevelsEqualScalarBitByBit) {
  std::mt19937 random(11);
  std::vector<uint8_t> extra(static_cast<size_t>(n())), none(extra.size());
  for (uint8_t& e : extra) e = static_cast<uint8_t>(random() % 3);
  auto finite = samples(n(), 0.37f, 12);
  for (float& v : finite) {
    if (!std::isfinite(v)) v = 1.0f;  // sums of NaN have no comparable payload
  }
  std::vector<float> grads = samples(n(), 0.1f, 13);
  for (float& v : grads) {
    if (!std::isfinite(v) || std::abs(v) > 1e10f) v = -0.25f;
  }
  const auto any = stored(samples(n(), 0.37f, 14), storage());
  const auto x = stored(finite, storage());
  const auto g = stored(grads, storage());
  // Scales whose fractions lose bits next to underflow, too.
  for (const float scale : {0.37f, 0x1.8p-126f, 1e-44f}) {
    for (const int bits : {1, 2, 8, 14}) {
      for (const bool narrow : {true, false}) {
        if (bits == 1 && narrow) continue;
        for (const auto rounding : {Rounding::kHalfEven, Rounding::kHalfUp}) {
          const Quantizer q{scale, 0.0f, mixbit::quant_range(bits, true, narrow), rounding};
          std::vector<std::byte> expected(bytes()), got(bytes());
          scalar().extra_levels(storage(), any.data(), extra.data(), expected.data(), n(), q, false);
          tested().extra_levels(storage(), any.data(), extra.data(), got.data(), n(), q, false);
          ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
          Aligned past_cache(bytes());
          tested().extra_levels(storage(), any.data(), extra.data(), past_cache.data(), n(), q, true);
          ASSERT_EQ(std::memcmp(expected.data(), past_cache.data(), bytes()), 0);
          double expected_sum, sum;
          scalar().extra_levels_backward(storage(), g.data(), x.data(), extra.data(), expected.data(), n(), q,
                                         &expected_sum, false);
          tested().extra_levels_backward(storage(), g.data(), x.data(), extra.data(), got.data(), n(), q, &sum, false);
          ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
          ASSERT_TRUE(same_bits(expected_sum, sum));
          tested().extra_levels_backward(storage(), g.data(), x.data(), extra.data(), nullptr, n(), q, &sum, false);
          ASSERT_TRUE(same_bits(expected_sum, sum));
          tested().extra_levels_backward(storage(), g.data(), x.data(), extra.data(), past_cache.data(), n(), q,
                                         nullptr, true);
          ASSERT_EQ(std::memcmp(expected.data(), past_cache.data(), bytes()), 0);
          // Without extra bits: fake_quantize.
          tested().extra_levels(storage(), any.data(), none.data(), got.data(), n(), q, false);
          tested().fake_quantize(storage(), any.data(), expected.data(), n(), q, false);
          ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
          tested().extra_levels_backward(storage(), g.data(), x.data(), none.data(), got.data(), n(), q, &sum, false);
          tested().fake_quantize_backward(storage(), g.data(), x.data(), expected.data(), n(), q, &expected_sum,
                                          nullptr, false);
          ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
          ASSERT_TRUE(same_bits(expected_sum, sum));
        }
      }
    }
  }
}

TEST_P(CpuKernels, MaskEqualsScalarAndIsTheBackward) {
  const auto x = stored(samples(n(), 0.37f, 8), storage());
  std::vector<float> grads = samples(n(), 0.1f, 9);
  for (float& v : grads) {
    if (!std::isfinite(v)) v = 1.5f;
  }
  const auto g = stored(grads, storage());
  for (const Quantizer& q : quantizers_of_all_gradients()) {
    const size_t mask_bytes = static_cast<size_t>((n() + 7) / 8);
    std::vector<std::byte> y(bytes()), expected_y(bytes()), dx(bytes()), expected_dx(bytes());
    std::vector<uint8_t> mask(mask_bytes + 2, 0xa5), expected_mask(mask_bytes + 2, 0xa5);
    scalar().fake_quantize_mask(storage(), x.data(), expected_y.data(), expected_mask.data(), n(), q);
    tested().fake_quantize_mask(storage(), x.data(), y.data(), mask.data(), n(), q);
    ASSERT_EQ(mask, expected_mask);
    ASSERT_EQ(mask[mask_bytes], 0xa5) << "written past the end";
    ASSERT_EQ(y, expected_y);
    tested().fake_quantize(storage(), x.data(), expected_y.data(), n(), q, false);
    ASSERT_EQ(y, expected_y);
    scalar().fake_quantize_backward(storage(), g.data(), x.data(), expected_dx.data(), n(), q, nullptr, nullptr, false);
    tested().apply_mask(storage(), g.data(), mask.data(), dx.data(), n());
    ASSERT_EQ(dx, expected_dx);
    scalar().apply_mask(storage(), g.data(), mask.data(), dx.data(), n());
    ASSERT_EQ(dx, expected_dx);
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
    double expected_signal, signal;
    // Symmetric, unsigned and other grids; scales whose inverse is not normal; any number of candidates.
    for (const auto& [is_signed, narrow, unit] : {std::tuple{true, true, 0.05f}, std::tuple{false, false, 0.05f},
                                                  std::tuple{true, false, 0.05f}, std::tuple{true, true, 1e-39f}}) {
      for (const int64_t count : {0, 1, 7, 8, 11, 16}) {
        std::vector<Quantizer> candidates;
        for (int64_t k = 0; k < count; ++k) {
          const auto bits = static_cast<int>(2 + k % 11);
          candidates.push_back({unit * static_cast<float>(bits), 0.0f, mixbit::quant_range(bits, is_signed, narrow),
                                Rounding::kHalfEven});
        }
        std::vector<double> expected_noise(candidates.size()), noise(candidates.size());
        scalar().quantization_noise(storage(), x.data(), n(), candidates.data(), count, &expected_signal,
                                    expected_noise.data());
        tested().quantization_noise(storage(), x.data(), n(), candidates.data(), count, &signal, noise.data());
        EXPECT_TRUE(same_bits(expected_signal, signal));
        for (size_t k = 0; k < noise.size(); ++k) EXPECT_TRUE(same_bits(expected_noise[k], noise[k]));
      }
    }

    std::vector<double> expected_noise(1), noise(1);
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

// Mixtures of every form: grids that nest or not, gates shut, open and between, scales of all kinds.
struct MixtureCase {
  std::vector<Quantizer> quantizers;
  std::vector<float> weights;
  MixtureForm form;
  Mixture mixture() const { return {quantizers.data(), weights.data(), static_cast<int64_t>(weights.size()), form}; }
};

std::vector<MixtureCase> mixtures() {
  std::vector<MixtureCase> all;
  for (const auto& precisions : {std::vector<int>{2, 4, 8}, {4, 8}, {1, 2, 4, 8, 16}}) {
    for (const bool is_signed : {true, false}) {
      for (const float range : {2.9f, 3.1f, 1e-40f, 0.7e30f}) {
        for (const auto& first : {0.0f, 0.3f, 1.0f}) {
          for (const auto form : {MixtureForm::kMixture, MixtureForm::kGated, MixtureForm::kGatedResidual}) {
            MixtureCase c{{}, std::vector<float>(precisions.size()), form};
            for (const int bits : precisions) {
              const float scale = form == MixtureForm::kMixture ? range / static_cast<float>(3 * bits)
                                                                : mixbit::gated_step(range, bits, is_signed);
              c.quantizers.push_back({scale, 0.0f, mixbit::quant_range(bits, is_signed, false), Rounding::kHalfEven});
            }
            std::vector<float> gates(precisions.size() - 1, first);
            if (first == 0.3f && range == 2.9f) gates.back() = 0.0f;
            mixbit::gate_shares(gates.data(), 1, static_cast<int64_t>(precisions.size()), c.weights.data());
            all.push_back(c);
          }
        }
      }
    }
  }
  all.push_back({{{0.1f, 0.0f, {-2.0f, 1.0f}, Rounding::kHalfEven}}, {0.0f}, MixtureForm::kMixture});
  return all;
}

TEST_P(CpuKernels, MixturesEqualScalarBitByBit) {
  const auto x = stored(samples(n(), 0.37f, 11), storage());
  auto values = samples(n(), 0.37f, 12);
  auto grads = samples(n(), 0.1f, 13);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(std::abs(values[i]) < 1e4f)) values[i] = 1.0f;  // sums of NaN have no comparable payload
    if (!(std::abs(grads[i]) < 1e4f)) grads[i] = -0.25f;
  }
  const auto finite = stored(values, storage());
  const auto g = stored(grads, storage());
  for (const MixtureCase& c : mixtures()) {
    const Mixture m = c.mixture();
    std::vector<std::byte> expected(bytes()), got(bytes());
    scalar().mixture(storage(), x.data(), expected.data(), n(), m, false);
    tested().mixture(storage(), x.data(), got.data(), n(), m, false);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
    Aligned past_cache(bytes());
    tested().mixture(storage(), x.data(), past_cache.data(), n(), m, true);
    ASSERT_EQ(std::memcmp(expected.data(), past_cache.data(), bytes()), 0);
    if (m.count == 1) continue;

    double expected_sums[2][kMaxGrids] = {}, sums[2][kMaxGrids] = {};
    scalar().mixture_backward(storage(), g.data(), finite.data(), expected.data(), n(), m, expected_sums[0],
                              expected_sums[1], false);
    tested().mixture_backward(storage(), g.data(), finite.data(), got.data(), n(), m, sums[0], sums[1], false);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
    for (int64_t k = 0; k < kMaxGrids; ++k) {
      ASSERT_TRUE(same_bits(expected_sums[0][k], sums[0][k]));
      ASSERT_TRUE(same_bits(expected_sums[1][k], sums[1][k]));
    }
    // Every part alone is what it is together with the others.
    double levels[kMaxGrids] = {};
    tested().mixture_backward(storage(), g.data(), finite.data(), nullptr, n(), m, levels, nullptr, false);
    for (int64_t k = 0; k < kMaxGrids; ++k) ASSERT_TRUE(same_bits(expected_sums[0][k], levels[k]));
    tested().mixture_backward(storage(), g.data(), finite.data(), past_cache.data(), n(), m, nullptr, nullptr, true);
    ASSERT_EQ(std::memcmp(expected.data(), past_cache.data(), bytes()), 0);
    // NaN, infinite and huge x: dx has bits of its own there.
    scalar().mixture_backward(storage(), g.data(), x.data(), expected.data(), n(), m, nullptr, nullptr, false);
    tested().mixture_backward(storage(), g.data(), x.data(), got.data(), n(), m, nullptr, nullptr, false);
    ASSERT_EQ(std::memcmp(expected.data(), got.data(), bytes()), 0);
  }
}

// Weights that walk about on their grids, with what is kept of them.
struct Walking {
  std::vector<uint8_t> extra_bits;
  std::vector<int8_t> codes, marks;
  std::vector<int16_t> counts, runs;
  std::vector<float> frequencies, averages;

  explicit Walking(int64_t n) {
    const auto size = static_cast<size_t>(n);
    codes.assign(size, 0);
    marks.assign(size, 0);
    counts.assign(size, 0);
    runs.assign(size, 0);
    frequencies.assign(size, 0.0f);
    averages.assign(size, 0.0f);
    for (size_t i = 0; i < size; ++i) {
      extra_bits.push_back(static_cast<uint8_t>(i * 7 / 3 % 3));
      if (i % 5 == 1) counts[i] = runs[i] = mixbit::kMaxSwitchCount - 1;
      if (i % 5 == 2) frequencies[i] = i % 2 == 0 ? 0.3f : mixbit::kSmallestFrequency;
    }
  }
  bool operator==(const Walking&) const = default;
};

std::vector<Quantizer> level_grids() {
  std::vector<Quantizer> all;
  for (const int bits : {2, 3, 6}) {
    for (const bool narrow : {true, false}) {
      for (const auto rounding : {Rounding::kHalfEven, Rounding::kHalfUp}) {
        all.push_back({0.37f, 0.0f, mixbit::quant_range(bits, true, narrow), rounding});
      }
    }
  }
  return all;
}

TEST_P(CpuKernels, SwitchesEqualScalarBitByBit) {
  using mixbit::SwitchScore;
  for (const Quantizer& q : level_grids()) {
    for (const auto score :
         {SwitchScore::kAdjacent, SwitchScore::kPair, SwitchScore::kOscillation, SwitchScore::kEma}) {
      for (const bool extra : {false, true}) {
        Walking expected(n()), got(n());
        const auto states = [&](Walking& w) {
          const bool marks = score != SwitchScore::kAdjacent, ema = score == SwitchScore::kEma;
          return SwitchStates{w.codes.data(), marks ? w.marks.data() : nullptr, ema ? nullptr : w.counts.data(),
                              score == SwitchScore::kPair ? w.runs.data() : nullptr,
                              ema ? w.frequencies.data() : nullptr};
        };
        for (unsigned step = 0; step < 5; ++step) {
          // Values near zero switch often, those of every kind clip, and NaN keeps its code.
          const auto x = stored(samples(n(), step % 2 == 0 ? 0.03f : 0.3f, 30 + step / 2), storage());
          const uint8_t* bits = extra ? expected.extra_bits.data() : nullptr;
          const LevelFindings wanted =
              scalar().count_switches(storage(), x.data(), bits, n(), q, score, 0.1f, states(expected));
          const LevelFindings found =
              tested().count_switches(storage(), x.data(), bits, n(), q, score, 0.1f, states(got));
          ASSERT_EQ(wanted.count, found.count);
          ASSERT_EQ(wanted.most_extra_bits, found.most_extra_bits);
          ASSERT_TRUE(expected == got);
        }
      }
    }
  }
}

TEST_P(CpuKernels, FreezingEqualsScalarBitByBit) {
  for (const Quantizer& q : level_grids()) {
    for (const bool extra : {false, true}) {
      Walking expected(n()), got(n());
      const auto states = [](Walking& w) {
        return FreezeStates{w.codes.data(), w.marks.data(), w.frequencies.data(), w.averages.data()};
      };
      int64_t frozen = 0;
      for (unsigned step = 0; step < 8; ++step) {
        auto x = stored(samples(n(), step % 2 == 0 ? 0.03f : 0.3f, 40 + step % 3), storage());
        auto y = x;
        const uint8_t* bits = extra ? expected.extra_bits.data() : nullptr;
        const float threshold = step < 3 ? 0.0f : 0.15f;
        const LevelFindings wanted =
            scalar().freeze_oscillating(storage(), x.data(), bits, n(), q, 0.1f, threshold, states(expected));
        const LevelFindings found =
            tested().freeze_oscillating(storage(), y.data(), bits, n(), q, 0.1f, threshold, states(got));
        ASSERT_EQ(wanted.count, found.count);
        ASSERT_TRUE(expected == got);
        ASSERT_EQ(x, y);
        ASSERT_GE(wanted.count, frozen);
        frozen = wanted.count;
      }
      ASSERT_TRUE(frozen > 0 || n() < 100);
    }
  }
}

// Weights, gradients and states of threshold-aware steps, and what a step makes of them.
struct StepData {
  std::vector<std::byte> weight, grad, momentum, moment2, largest_moment2;
  bool operator==(const StepData&) const = default;
  StepRun run(const uint8_t* extra_bits, int64_t n) {
    return {weight.data(), grad.data(), momentum.data(), moment2.data(), largest_moment2.data(), extra_bits, n};
  }
};

StepData step_data(int64_t n, StorageType storage) {
  const auto magnitudes = [n](float scale, unsigned seed) {
    std::vector<float> values = samples(n, scale, seed);
    // Second moments; NaN and infinity of one gradient would meet those of another there.
    for (float& v : values) v = std::isfinite(v) && std::abs(v) < 1e10f ? v * v : 0.25f;
    return values;
  };
  std::vector<float> grad = samples(n, 0.05f, 21), momentum = samples(n, 0.05f, 22);
  for (float& v : grad) v = std::isnan(v) ? 0.125f : v;
  for (float& v : momentum) v = std::isfinite(v) ? v : -0.5f;
  return {stored(samples(n, 0.37f, 20), storage), stored(grad, storage), stored(momentum, storage),
          stored(magnitudes(0.1f, 23), storage), stored(magnitudes(0.1f, 24), storage)};
}

// f(quantizer, multiplier, extra bits or null).
template <typename F>
void for_each_step_setting(int64_t n, const F& f) {
  std::vector<uint8_t> extra(static_cast<size_t>(n));
  for (size_t i = 0; i < extra.size(); ++i) extra[i] = static_cast<uint8_t>(i % 5 % 3);
  for (const auto& [bits, narrow] : {std::pair{2, false}, std::pair{3, true}, std::pair{8, true}}) {
    const Quantizer q{0.37f, 0.0f, mixbit::quant_range(bits, true, narrow), Rounding::kHalfEven};
    for (const auto shape :
         {mixbit::StepShape::kOff, mixbit::StepShape::kStep, mixbit::StepShape::kLinear, mixbit::StepShape::kGauss}) {
      for (const bool with_extra : {false, true}) {
        f(q, mixbit::StepMultiplier{shape, 0.1f, 0.125f}, with_extra ? extra.data() : nullptr);
      }
    }
  }
}

TEST_P(CpuKernels, SgdStepsEqualScalarBitByBit) {
  for_each_step_setting(n(), [&](const Quantizer& q, const mixbit::StepMultiplier& m, const uint8_t* extra) {
    for (int option = 0; option < 6; ++option) {
      const mixbit::SgdRule rule = {0.05f,       option == 1 ? 0.0f : 0.9f,
                                    0.75f,       option == 2 ? 0.0f : 1e-2f,
                                    option == 3, option == 4,
                                    option == 5, option == 4};
      const float grad_scale = option == 0 ? 1.0f : 8.0f;
      StepData expected = step_data(n(), storage()), got = expected;
      scalar().sgd_step(storage(), expected.run(extra, n()), q, m, rule, grad_scale);
      tested().sgd_step(storage(), got.run(extra, n()), q, m, rule, grad_scale);
      ASSERT_EQ(expected, got) << option;
    }
  });
}

TEST_P(CpuKernels, AdamStepsEqualScalarBitByBit) {
  for_each_step_setting(n(), [&](const Quantizer& q, const mixbit::StepMultiplier& m, const uint8_t* extra) {
    for (int option = 0; option < 4; ++option) {
      mixbit::AdamRule rule{};
      mixbit::set_adam_step(&rule, 0.01, option == 1 ? 0.3 : 0.9, 0.999, 0.1, 3.0, option != 2);
      rule.epsilon = 1e-8f;
      rule.maximize = option == 3;
      rule.on_grad = option == 3;
      StepData expected = step_data(n(), storage()), got = expected;
      StepRun expected_run = expected.run(extra, n()), run = got.run(extra, n());
      if (option == 2) expected_run.largest_moment2 = run.largest_moment2 = nullptr;
      scalar().adam_step(storage(), expected_run, q, m, rule, option == 0 ? 1.0f : 8.0f);
      tested().adam_step(storage(), run, q, m, rule, option == 0 ? 1.0f : 8.0f);
      ASSERT_EQ(expected, got) << option;
    }
  });
}

TEST_P(CpuKernels, ScaledUpdatesAndMultipliersEqualScalarBitByBit) {
  const auto before = stored(samples(n(), 0.37f, 25), storage());
  std::vector<float> moved = samples(n(), 0.37f, 26);
  for (float& v : moved) v = std::isfinite(v) ? v : 1.0f;
  const auto after = stored(moved, storage());
  for_each_step_setting(n(), [&](const Quantizer& q, const mixbit::StepMultiplier& m, const uint8_t* extra) {
    auto expected = after, got = after;
    scalar().scale_updates(storage(), before.data(), expected.data(), extra, n(), q, m);
    tested().scale_updates(storage(), before.data(), got.data(), extra, n(), q, m);
    ASSERT_EQ(expected, got);
    scalar().step_multipliers(storage(), before.data(), expected.data(), extra, n(), q, m);
    tested().step_multipliers(storage(), before.data(), got.data(), extra, n(), q, m);
    ASSERT_EQ(expected, got);
  });
}

INSTANTIATE_TEST_SUITE_P(
    All, CpuKernels,
    testing::Combine(testing::Values(StorageType::kFloat32, StorageType::kFloat16, StorageType::kBFloat16),
                     testing::Values(Isa::kAvx2, Isa::kAvx512), testing::Values(1, 15, 16, 17, 100, 4097, 16384)));

// The vector kernels divide by multiplication: code - x / scale, exact inside the grid, shows the quotient's last bit.
TEST(Quotients, AreThoseOfTheDivisionBitByBit) {
  std::mt19937 random(31);
  std::uniform_real_distribution<float> exponent(-38.0f, 38.0f), mantissa(1.0f, 2.0f), position(-1.0f, 1.0f);
  std::vector<float> scales = {1.0f, 0.1f, 1.0f / 3.0f, std::nextafter(2.0f, 0.0f), std::nextafter(1.0f, 2.0f)};
  for (int i = 0; i < 60; ++i) scales.push_back(std::ldexp(mantissa(random), static_cast<int>(exponent(random))));
  const mixbit::QuantRange range = mixbit::quant_range(16, true, false);
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
    if (kernels(isa).isa != isa) continue;
    for (const float scale : scales) {
      const Quantizer q{scale, 0.0f, range, Rounding::kHalfEven};
      const float weight = 1.0f, g = 1.0f;
      const Mixture m{&q, &weight, 1, MixtureForm::kMixture};
      for (int i = 0; i < 2000; ++i) {
        float x = position(random) * range.quant_max * scale;
        if (i % 2 == 0) {  // next to a tie between two codes
          x = (std::floor(x / scale) + 0.5f) * scale;
          for (int step = i % 8; step < 4; ++step) x = std::nextafter(x, 0.0f);
        }
        float dx = 0.0f;
        double expected_level, expected_step, level, step;
        kernels(Isa::kScalar)
            .mixture_backward(StorageType::kFloat32, &g, &x, &dx, 1, m, &expected_level, &expected_step, false);
        kernels(isa).mixture_backward(StorageType::kFloat32, &g, &x, &dx, 1, m, &level, &step, false);
        ASSERT_TRUE(same_bits(expected_step, step) && same_bits(expected_level, level)) << x << " / " << scale;
      }
    }
  }
}

TEST(ScalarKernels, FakeQuantizeIsTheFormula) {
  const auto values = samples(1000, 0.37f, 7);
  for (const Quantizer& q : quantizers()) {
    std::vector<float> got(values.size());
    kernels(Isa::kScalar).fake_quantize(StorageType::kFloat32, values.data(), got.data(), 1000, q, false);
    for (size_t i = 0; i < values.size(); ++i) {
      const float expected = mixbit::fake_quantize(values[i], q.scale, q.zero_point, q.range, q.rounding);
      ASSERT_TRUE(same_bits(expected, got[i])) << values[i];
    }
  }
}

TEST(ScalarKernels, ExtraLevelsAreTheFormula) {
  const auto values = samples(1000, 0.37f, 15);
  std::vector<uint8_t> extra(values.size());
  for (size_t i = 0; i < extra.size(); ++i) extra[i] = static_cast<uint8_t>(i % 3);
  for (const bool narrow : {true, false}) {
    for (const auto rounding : {Rounding::kHalfEven, Rounding::kHalfUp}) {
      const Quantizer q{0.37f, 0.0f, mixbit::quant_range(3, true, narrow), rounding};
      std::vector<float> got(values.size());
      kernels(Isa::kScalar)
          .extra_levels(StorageType::kFloat32, values.data(), extra.data(), got.data(), 1000, q, false);
      for (size_t i = 0; i < values.size(); ++i) {
        const float expected = mixbit::extra_level_fake_quantize(values[i], q.scale, q.range, extra[i], q.rounding);
        ASSERT_TRUE(same_bits(expected, got[i])) << values[i];
      }
    }
  }
}

TEST(ScalarKernels, NoiseIsThatOfTheDivision) {
  // The multiplication with the inverse may take the other neighbour of a tie; levels of the grid have no noise at all.
  const Quantizer q{0.37f, 0.0f, mixbit::quant_range(5, true, true), Rounding::kHalfEven};
  std::vector<float> values;
  for (const float v : samples(5000, 0.37f, 10)) {
    if (std::abs(v) < 1e6f) values.push_back(v);
  }
  double exact = 0.0;
  for (const float v : values) {
    const double error = static_cast<double>(v) -
                         static_cast<double>(mixbit::fake_quantize(v, q.scale, q.zero_point, q.range, q.rounding));
    exact += error * error;
  }
  double signal, noise;
  const auto n = static_cast<int64_t>(values.size());
  kernels(Isa::kScalar).quantization_noise(StorageType::kFloat32, values.data(), n, &q, 1, &signal, &noise);
  EXPECT_NEAR(noise, exact, 1e-5 * exact);
  std::vector<float> levels;
  for (int code = -15; code <= 15; ++code) levels.push_back(static_cast<float>(code) * q.scale);
  kernels(Isa::kScalar).quantization_noise(StorageType::kFloat32, levels.data(), 31, &q, 1, &signal, &noise);
  EXPECT_EQ(noise, 0.0);
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

}  // namespace
