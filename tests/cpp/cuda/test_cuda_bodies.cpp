// The bodies of the CUDA kernels, run on the host, against the CPU kernels: values bit by bit, sums to rounding.
#include "simt.h"

#include <cuda/fake_quantize.cuh>
#include <cuda/noise.cuh>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <regex>
#include <sstream>

#include <mixbit/kernels/cpu.h>

namespace {

namespace cpu = mixbit::kernels::cpu;
namespace cuda = mixbit::kernels::cuda;
using mixbit::Rounding;

template <typename T>
constexpr cpu::StorageType kStorage = std::is_same_v<T, float>        ? cpu::StorageType::kFloat32
                                      : std::is_same_v<T, simt::Half> ? cpu::StorageType::kFloat16
                                                                      : cpu::StorageType::kBFloat16;

const cpu::KernelTable& oracle() { return cpu::kernels(cpu::Isa::kScalar); }

template <typename T>
std::vector<T> values(int64_t n, unsigned seed, bool finite) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float special[] = {0.0f, -0.0f, 0.5f, 1e-41f, kInfinity, -kInfinity, NAN};
  std::vector<T> made;
  for (int64_t i = 0; i < n; ++i) {
    made.push_back(static_cast<T>(!finite && i % 9 == 4 ? special[random() % std::size(special)] : normal(random)));
  }
  return made;
}

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct View {
  int64_t outer, channels, inner;
  int64_t numel() const { return outer * channels * inner; }
};
const View kViews[] = {{1, 1, 1}, {1, 1, 37},    {1, 1, 2048}, {3, 5, 24},   {2, 7, 33},
                       {4, 3, 1}, {1, 2, 16384}, {2, 1, 8200}, {1, 1, 40000}};

// Parameters of a case, in vectors that the arguments point to.
struct Setting {
  std::vector<float> scale, zero_point, bit_width;
  cuda::QuantizeArguments arguments{};

  Setting(const View& v, bool per_channel, bool is_signed, bool narrow, Rounding rounding) {
    const auto count = static_cast<size_t>(per_channel ? v.channels : 1);
    for (size_t c = 0; c < count; ++c) {
      scale.push_back(0.21f + 0.03f * static_cast<float>(c));
      zero_point.push_back(static_cast<float>(static_cast<int>(c % 3) - 1));
      bit_width.push_back(static_cast<float>(2 + c % 7));
    }
    arguments.outer = v.outer;
    arguments.channels = v.channels;
    arguments.inner = v.inner;
    arguments.is_signed = is_signed;
    arguments.narrow_range = narrow;
    arguments.rounding = rounding;
    point();
  }
  void point() {
    arguments.scale = scale.data();
    arguments.scale_count = static_cast<int64_t>(scale.size());
    arguments.zero_point = zero_point.data();
    arguments.zero_point_count = static_cast<int64_t>(zero_point.size());
    arguments.bit_width = bit_width.data();
    arguments.bit_width_count = static_cast<int64_t>(bit_width.size());
  }
  cpu::Quantizer quantizer(int64_t channel) const {
    const auto c = scale.size() == 1 ? 0 : static_cast<size_t>(channel);
    return {scale[c], zero_point[c],
            mixbit::quant_range(static_cast<int>(bit_width[c]), arguments.is_signed, arguments.narrow_range),
            arguments.rounding};
  }
};

// f(view, setting) for views x per tensor or channel x grids.
template <typename F>
void for_each_setting(const F& f) {
  for (const View& view : kViews) {
    for (const bool per_channel : {false, true}) {
      for (const auto& [is_signed, narrow, rounding] :
           {std::tuple{true, false, Rounding::kHalfEven}, std::tuple{true, true, Rounding::kHalfUp},
            std::tuple{false, false, Rounding::kHalfEven}}) {
        f(view, Setting(view, per_channel, is_signed, narrow, rounding));
      }
    }
  }
}

template <typename T>
class CudaBodies : public testing::Test {};
using Types = testing::Types<float, simt::Half, simt::BFloat16>;
TYPED_TEST_SUITE(CudaBodies, Types);

TYPED_TEST(CudaBodies, Forward) {
  using T = TypeParam;
  for_each_setting([](const View& view, const Setting& setting) {
    const auto x = values<T>(view.numel(), 1, false);
    std::vector<T> expected(x.size());
    for (int64_t row = 0; row < view.outer * view.channels; ++row) {
      oracle().fake_quantize(kStorage<T>, x.data() + row * view.inner, expected.data() + row * view.inner, view.inner,
                             setting.quantizer(row % view.channels), false);
    }
    // More and fewer threads than packs; vector loads and single ones.
    for (const unsigned blocks : {1u, 3u}) {
      for (const bool aligned : {true, false}) {
        std::vector<T> y(x.size());
        simt::launch(blocks, cuda::kThreads, cuda::fake_quantize_kernel<T>, setting.arguments, x.data(), y.data(),
                     aligned);
        ASSERT_TRUE(same_bytes(expected, y)) << view.outer << " " << view.channels << " " << view.inner;
      }
    }
  });
}

TYPED_TEST(CudaBodies, Backward) {
  using T = TypeParam;
  for_each_setting([](const View& view, const Setting& setting) {
    const auto x = values<T>(view.numel(), 2, true);
    const auto grad = values<T>(view.numel(), 3, true);
    std::vector<T> expected(x.size()), dx(x.size());
    std::vector<double> scale_sums(static_cast<size_t>(view.channels)), zero_point_sums(scale_sums.size());
    for (int64_t row = 0; row < view.outer * view.channels; ++row) {
      const auto channel = static_cast<size_t>(row % view.channels);
      for (int64_t at = 0; at < view.inner; at += cpu::kReduceBlock) {
        const int64_t first = row * view.inner + at;
        double dscale, dzero_point;
        oracle().fake_quantize_backward(kStorage<T>, grad.data() + first, x.data() + first, expected.data() + first,
                                        std::min(cpu::kReduceBlock, view.inner - at),
                                        setting.quantizer(row % view.channels), &dscale, &dzero_point, false);
        scale_sums[channel] += dscale;
        zero_point_sums[channel] += dzero_point;
      }
    }
    const int64_t count = view.outer * view.inner;
    const int64_t blocks = std::max<int64_t>(1, (count + cuda::kReduceBlock - 1) / cuda::kReduceBlock);
    std::vector<double> partials(static_cast<size_t>(view.channels * blocks * 2), -1.0);
    for (const bool with_dx : {true, false}) {
      simt::launch(static_cast<unsigned>(view.channels * blocks), cuda::kThreads,
                   cuda::fake_quantize_backward_kernel<T>, setting.arguments, blocks, grad.data(), x.data(),
                   with_dx ? dx.data() : nullptr, partials.data());
      for (const int64_t which : {0, 1}) {
        std::vector<float> sums(scale_sums.size(), -1.0f);
        simt::launch(static_cast<unsigned>((view.channels + cuda::kThreads - 1) / cuda::kThreads), cuda::kThreads,
                     cuda::add_blocks_kernel<float>, partials.data(), view.channels, blocks, int64_t{2}, which,
                     int64_t{1}, sums.data());
        const auto& wanted = which == 0 ? scale_sums : zero_point_sums;
        for (size_t c = 0; c < sums.size(); ++c) {
          ASSERT_NEAR(sums[c], wanted[c], 1e-5 * (1.0 + static_cast<double>(count)));
        }
      }
    }
    ASSERT_TRUE(same_bytes(expected, dx));
  });
}

TYPED_TEST(CudaBodies, Mask) {
  using T = TypeParam;
  for_each_setting([](const View& view, const Setting& setting) {
    const auto x = values<T>(view.numel(), 4, false);
    const auto grad = values<T>(view.numel(), 5, true);
    const int64_t rows = view.outer * view.channels;
    const int64_t row_bytes = (view.inner + 7) / 8;
    std::vector<T> expected(x.size()), y(x.size()), expected_dx(x.size()), dx(x.size());
    std::vector<uint8_t> expected_mask(static_cast<size_t>(rows * row_bytes)), mask(expected_mask.size(), 0xa5);
    for (int64_t row = 0; row < rows; ++row) {
      oracle().fake_quantize_mask(kStorage<T>, x.data() + row * view.inner, expected.data() + row * view.inner,
                                  expected_mask.data() + row * row_bytes, view.inner,
                                  setting.quantizer(row % view.channels));
      oracle().apply_mask(kStorage<T>, grad.data() + row * view.inner, expected_mask.data() + row * row_bytes,
                          expected_dx.data() + row * view.inner, view.inner);
    }
    for (const bool aligned : {true, false}) {
      simt::launch(2, cuda::kThreads, cuda::fake_quantize_mask_kernel<T>, setting.arguments, x.data(), y.data(),
                   mask.data(), aligned);
      simt::launch(2, cuda::kThreads, cuda::apply_mask_kernel<T>, rows, view.inner, grad.data(), mask.data(), dx.data(),
                   aligned);
      ASSERT_EQ(mask, expected_mask);
      ASSERT_TRUE(same_bytes(expected, y));
      ASSERT_TRUE(same_bytes(expected_dx, dx));
    }
  });
}

TYPED_TEST(CudaBodies, Noise) {
  using T = TypeParam;
  for (const View& view : kViews) {
    for (const bool per_channel : {false, true}) {
      for (const int64_t count : {0, 1, 8, 11}) {
        const auto x = values<T>(view.numel(), 6, true);
        std::vector<float> scales, bits;
        for (int64_t k = 0; k < count; ++k) {
          bits.push_back(static_cast<float>(2 + k % 9));
          for (int64_t c = 0; c < (per_channel ? view.channels : 1); ++c) {
            scales.push_back(0.5f / static_cast<float>(k + c + 1));
          }
        }
        std::vector<double> expected_signal(static_cast<size_t>(view.channels));
        std::vector<double> expected(static_cast<size_t>(count * view.channels));
        for (int64_t row = 0; row < view.outer * view.channels; ++row) {
          const int64_t c = row % view.channels;
          std::vector<cpu::Quantizer> quantizers;
          for (int64_t k = 0; k < count; ++k) {
            quantizers.push_back({scales[static_cast<size_t>(per_channel ? k * view.channels + c : k)], 0.0f,
                                  mixbit::quant_range(static_cast<int>(bits[static_cast<size_t>(k)]), true, true),
                                  Rounding::kHalfEven});
          }
          for (int64_t at = 0; at < view.inner; at += cpu::kReduceBlock) {
            double signal;
            std::vector<double> noise(static_cast<size_t>(count));
            oracle().quantization_noise(kStorage<T>, x.data() + row * view.inner + at,
                                        std::min(cpu::kReduceBlock, view.inner - at), quantizers.data(), count, &signal,
                                        noise.data());
            expected_signal[static_cast<size_t>(c)] += signal;
            for (int64_t k = 0; k < count; ++k) {
              expected[static_cast<size_t>(k * view.channels + c)] += noise[static_cast<size_t>(k)];
            }
          }
        }
        const cuda::NoiseArguments arguments{cuda::StorageType::kFloat32,
                                             view.outer,
                                             view.channels,
                                             view.inner,
                                             scales.data(),
                                             per_channel,
                                             bits.data(),
                                             count,
                                             true,
                                             true};
        const int64_t blocks =
            std::max<int64_t>(1, (view.outer * view.inner + cuda::kReduceBlock - 1) / cuda::kReduceBlock);
        std::vector<double> partials(static_cast<size_t>(view.channels * blocks * (count + 1)), -1.0);
        simt::launch(static_cast<unsigned>(view.channels * blocks), cuda::kThreads, cuda::quantization_noise_kernel<T>,
                     arguments, blocks, x.data(), partials.data());
        std::vector<double> signal(expected_signal.size(), -1.0), noise(expected.size(), -1.0);
        simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), view.channels, blocks,
                     count + 1, int64_t{0}, int64_t{1}, signal.data());
        simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), view.channels, blocks,
                     count + 1, int64_t{1}, count, noise.data());
        for (size_t c = 0; c < signal.size(); ++c)
          ASSERT_NEAR(signal[c], expected_signal[c], 1e-5 * expected_signal[c]);
        for (size_t k = 0; k < noise.size(); ++k) ASSERT_NEAR(noise[k], expected[k], 1e-5 * expected[k]);
      }
    }
  }
}

TYPED_TEST(CudaBodies, NoisePower) {
  using T = TypeParam;
  for (const int64_t n : {1, 100, 16384, 40001}) {
    const auto x = values<T>(n, 7, true);
    const auto reference = values<T>(n, 8, true);
    double expected_signal = 0.0, expected_noise = 0.0;
    for (int64_t at = 0; at < n; at += cpu::kReduceBlock) {
      double signal, noise;
      oracle().noise_power(kStorage<T>, x.data() + at, reference.data() + at, std::min(cpu::kReduceBlock, n - at),
                           &signal, &noise);
      expected_signal += signal;
      expected_noise += noise;
    }
    const int64_t blocks = (n + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
    std::vector<double> partials(static_cast<size_t>(2 * blocks), -1.0);
    simt::launch(static_cast<unsigned>(blocks), cuda::kThreads, cuda::noise_power_kernel<T>, n, x.data(),
                 reference.data(), partials.data());
    double sums[2];
    for (int64_t which : {0, 1}) {
      simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), int64_t{1}, blocks, int64_t{2},
                   which, int64_t{1}, &sums[which]);
    }
    EXPECT_NEAR(sums[0], expected_signal, 1e-5 * expected_signal);
    EXPECT_NEAR(sums[1], expected_noise, 1e-5 * expected_noise);
  }
}

TEST(CudaWidths, OutsideOneToSixteenYieldNan) {
  const auto x = values<float>(20, 9, true);
  for (const float bits : {0.0f, 17.0f, 2.5f, -1.0f, 1.0f, NAN}) {
    Setting setting({1, 1, 20}, false, true, true, Rounding::kHalfEven);
    setting.bit_width = {bits};
    setting.point();
    std::vector<float> y(x.size()), dx(x.size());
    double partials[2];
    simt::launch(1, cuda::kThreads, cuda::fake_quantize_kernel<float>, setting.arguments, x.data(), y.data(), true);
    simt::launch(1, cuda::kThreads, cuda::fake_quantize_backward_kernel<float>, setting.arguments, int64_t{1}, x.data(),
                 x.data(), dx.data(), partials);
    EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](float v) { return std::isnan(v); })) << bits;
    EXPECT_TRUE(std::isnan(dx[0]) && std::isnan(partials[0]) && std::isnan(partials[1]));
    const float scale = 0.1f;
    const cuda::NoiseArguments arguments{cuda::StorageType::kFloat32, 1, 1, 20, &scale, false, &bits, 1, true, true};
    simt::launch(1, cuda::kThreads, cuda::quantization_noise_kernel<float>, arguments, int64_t{1}, x.data(), partials);
    EXPECT_FALSE(std::isnan(partials[0]));
    EXPECT_TRUE(std::isnan(partials[1]));
  }
}

TEST(Simt, ABarrierThatSomeThreadsNeverReachIsFound) {
  const auto parted = [](int limit) {
    if (static_cast<int>(threadIdx.x) < limit) __syncthreads();
  };
  EXPECT_THROW(simt::launch(1, 8, parted, 3), std::logic_error);
  EXPECT_NO_THROW(simt::launch(2, 8, parted, 8));
}

// Every body that nvcc compiles runs here too.
TEST(CudaSources, NoBodyIsLeftOut) {
  std::ifstream self(MIXBIT_SOURCE_DIR "/tests/cpp/cuda/test_cuda_bodies.cpp");
  std::stringstream tests;
  tests << self.rdbuf();
  const std::regex kernel(R"(__global__ void (\w+)\()");
  std::vector<std::string> found, missing;
  for (const auto& entry : std::filesystem::directory_iterator(MIXBIT_SOURCE_DIR "/csrc/kernels/cuda")) {
    std::ifstream file(entry.path());
    std::stringstream text;
    text << file.rdbuf();
    const std::string source = text.str();
    for (std::sregex_iterator it(source.begin(), source.end(), kernel), end; it != end; ++it) {
      found.push_back((*it)[1]);
      // A .cu file holds launchers only: what it defined itself could not be included here.
      if (entry.path().extension() == ".cu" || tests.str().find("cuda::" + found.back() + "<") == std::string::npos) {
        missing.push_back(found.back());
      }
    }
  }
  EXPECT_GE(found.size(), 7u);
  EXPECT_EQ(missing, std::vector<std::string>{});
}

}  // namespace
