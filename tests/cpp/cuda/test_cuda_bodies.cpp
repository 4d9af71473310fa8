// The bodies of the CUDA kernels, run on the host, against the CPU kernels: values bit by bit, sums to rounding.
#include "simt.h"

#include <cuda/extra_levels.cuh>
#include <cuda/fake_quantize.cuh>
#include <cuda/mixture.cuh>
#include <cuda/noise.cuh>
#include <cuda/packing.cuh>
#include <cuda/statistics.cuh>
#include <cuda/steps.cuh>
#include <cuda/switches.cuh>

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
using mixbit::Gradient;
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
            arguments.rounding, arguments.gradient};
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

// The same with every gradient.
template <typename F>
void for_each_gradient(const F& f) {
  for (const auto gradient : {Gradient::kLearnedStep, Gradient::kClip}) {
    for_each_setting([&](const View& view, Setting setting) {
      setting.arguments.gradient = gradient;
      setting.point();
      f(view, setting);
    });
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
  for_each_gradient([](const View& view, const Setting& setting) {
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
    std::vector<double> aligned_partials;
    for (const auto& [with_dx, aligned] : {std::pair{true, true}, std::pair{true, false}, std::pair{false, true}}) {
      std::fill(dx.begin(), dx.end(), static_cast<T>(-1.0f));
      simt::launch(static_cast<unsigned>(view.channels * blocks), cuda::kThreads,
                   cuda::fake_quantize_backward_kernel<T>, setting.arguments, blocks, grad.data(), x.data(),
                   with_dx ? dx.data() : nullptr, aligned, partials.data());
      // Which thread owns an element must not depend on addresses.
      if (aligned_partials.empty()) aligned_partials = partials;
      ASSERT_TRUE(same_bytes(aligned_partials, partials));
      ASSERT_TRUE(!with_dx || same_bytes(expected, dx));
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
  });
}

std::vector<uint8_t> extra_bits(int64_t n) {
  std::mt19937 random(17);
  std::vector<uint8_t> made(static_cast<size_t>(n));
  for (uint8_t& e : made) e = static_cast<uint8_t>(random() % 3);
  return made;
}

TYPED_TEST(CudaBodies, ExtraLevels) {
  using T = TypeParam;
  for_each_setting([](const View& view, const Setting& setting) {
    if (!setting.arguments.is_signed) return;
    const auto quantizer = [&](int64_t channel) {
      cpu::Quantizer q = setting.quantizer(channel);
      q.zero_point = 0.0f;
      return q;
    };
    const auto extra = extra_bits(view.numel());
    const auto any = values<T>(view.numel(), 18, false);
    const auto x = values<T>(view.numel(), 19, true);
    const auto grad = values<T>(view.numel(), 20, true);
    std::vector<T> expected(x.size()), expected_dx(x.size());
    std::vector<double> wanted(static_cast<size_t>(view.channels));
    for (int64_t row = 0; row < view.outer * view.channels; ++row) {
      const int64_t channel = row % view.channels;
      for (int64_t at = 0; at < view.inner; at += cpu::kReduceBlock) {
        const int64_t first = row * view.inner + at;
        const int64_t length = std::min(cpu::kReduceBlock, view.inner - at);
        double dscale;
        oracle().extra_levels(kStorage<T>, any.data() + first, extra.data() + first, expected.data() + first, length,
                              quantizer(channel), false);
        oracle().extra_levels_backward(kStorage<T>, grad.data() + first, x.data() + first, extra.data() + first,
                                       expected_dx.data() + first, length, quantizer(channel), &dscale, false);
        wanted[static_cast<size_t>(channel)] += dscale;
      }
    }
    const int64_t count = view.outer * view.inner;
    const int64_t blocks = std::max<int64_t>(1, (count + cuda::kReduceBlock - 1) / cuda::kReduceBlock);
    std::vector<double> aligned_partials;
    for (const bool aligned : {true, false}) {
      std::vector<T> y(x.size()), dx(x.size());
      simt::launch(2, cuda::kThreads, cuda::extra_levels_kernel<T>, setting.arguments, any.data(), extra.data(),
                   y.data(), aligned);
      ASSERT_TRUE(same_bytes(expected, y)) << view.outer << " " << view.channels << " " << view.inner;
      std::vector<double> partials(static_cast<size_t>(view.channels * blocks), -1.0);
      for (const bool with_dx : {true, false}) {
        simt::launch(static_cast<unsigned>(view.channels * blocks), cuda::kThreads,
                     cuda::extra_levels_backward_kernel<T>, setting.arguments, blocks, grad.data(), x.data(),
                     extra.data(), with_dx ? dx.data() : nullptr, aligned, partials.data());
        if (aligned_partials.empty()) aligned_partials = partials;
        ASSERT_TRUE(same_bytes(aligned_partials, partials));
        ASSERT_TRUE(!with_dx || same_bytes(expected_dx, dx));
      }
      for (size_t c = 0; c < wanted.size(); ++c) {
        double sum = 0.0;
        for (int64_t b = 0; b < blocks; ++b) sum += partials[c * static_cast<size_t>(blocks) + static_cast<size_t>(b)];
        ASSERT_NEAR(sum, wanted[c], 1e-5 * (1.0 + static_cast<double>(count)));
      }
    }
  });
}

// Nothing synchronizes on a device, so wrong widths and extra bits cannot raise: they show as NaN.
TEST(CudaBodiesExtra, WhatMakesNoGridIsNan) {
  const float x[2] = {0.3f, 0.3f};
  for (const auto& [bits, extra, valid] :
       {std::tuple{4.0f, 2, true}, std::tuple{4.0f, 3, false}, std::tuple{15.0f, 2, false}, std::tuple{16.0f, 0, true},
        std::tuple{17.0f, 0, false}, std::tuple{1.0f, 0, false}}) {
    Setting setting({1, 1, 2}, false, true, true, Rounding::kHalfUp);
    setting.bit_width[0] = bits;
    const uint8_t map[2] = {static_cast<uint8_t>(extra), static_cast<uint8_t>(extra)};
    float y[2], dx[2];
    double partial;
    simt::launch(1, cuda::kThreads, cuda::extra_levels_kernel<float>, setting.arguments, x, map, y, false);
    simt::launch(1, cuda::kThreads, cuda::extra_levels_backward_kernel<float>, setting.arguments, int64_t{1}, x, x, map,
                 dx, false, &partial);
    EXPECT_EQ(std::isnan(y[1]), !valid) << bits << " " << extra;
    EXPECT_EQ(std::isnan(dx[1]) && std::isnan(partial), !valid);
  }
}

TYPED_TEST(CudaBodies, Mask) {
  using T = TypeParam;
  for_each_gradient([](const View& view, const Setting& setting) {
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
                     arguments, blocks, x.data(), count != 8, partials.data());
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
                 reference.data(), n != 100, partials.data());
    double sums[2];
    for (int64_t which : {0, 1}) {
      simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), int64_t{1}, blocks, int64_t{2},
                   which, int64_t{1}, &sums[which]);
    }
    EXPECT_NEAR(sums[0], expected_signal, 1e-5 * expected_signal);
    EXPECT_NEAR(sums[1], expected_noise, 1e-5 * expected_noise);
  }
}

// A mixture or gated grids over a view of a sample, with everything the arguments point to.
struct MixtureSetting {
  View view;
  int64_t samples;
  std::vector<float> scales, weights, bits;
  cuda::MixtureArguments arguments{};

  MixtureSetting(const View& v, int64_t given_samples, const std::vector<int>& precisions, mixbit::MixtureForm form,
                 bool per_channel, bool is_signed, bool by_channel)
      : view(v), samples(given_samples) {
    if (by_channel) view.channels = 1;  // the samples are the channels
    const bool is_mixture = form == mixbit::MixtureForm::kMixture;
    const auto count = static_cast<int64_t>(precisions.size());
    for (int64_t k = 0; k < count; ++k) {
      bits.push_back(static_cast<float>(precisions[static_cast<size_t>(k)]));
      arguments.precisions[k] = precisions[static_cast<size_t>(k)];
      for (int64_t c = 0; c < (by_channel ? samples : per_channel ? view.channels : 1); ++c) {
        if (is_mixture || k == 0) {
          scales.push_back(is_mixture ? 2.1f / static_cast<float>(3 * k + c % 5 + 1)
                                      : 1.7f + 0.1f * static_cast<float>(c));
        }
      }
      if (is_mixture) {
        weights.push_back(0.9f - 0.4f * static_cast<float>(k));
      } else if (k > 0) {
        for (int64_t s = 0; s < samples; ++s) weights.push_back(static_cast<float>((3 * k + s) % 4) / 3.0f);
      }
    }
    arguments.samples = samples;
    arguments.outer = view.outer;
    arguments.channels = view.channels;
    arguments.inner = view.inner;
    arguments.scales = scales.data();
    arguments.per_channel = per_channel;
    arguments.scale_stride = by_channel ? 1 : 0;
    arguments.weights = weights.data();
    arguments.gate_stride = samples;
    arguments.bit_widths = bits.data();
    arguments.count = count;
    arguments.is_signed = is_signed;
    arguments.form = form;
  }

  // f(sample, channel, first element, elements, mixture) for the runs of the CPU kernels.
  template <typename F>
  void for_each_run(const F& f) const {
    const int64_t count = arguments.count;
    for (int64_t row = 0; row < samples * view.outer * view.channels; ++row) {
      const int64_t sample = row / (view.outer * view.channels);
      const int64_t channel = row % view.channels;
      std::vector<cpu::Quantizer> quantizers;
      std::vector<float> shares(static_cast<size_t>(count));
      const bool is_mixture = arguments.form == mixbit::MixtureForm::kMixture;
      for (int64_t k = 0; k < count; ++k) {
        const auto width = static_cast<int>(bits[static_cast<size_t>(k)]);
        const int64_t c = arguments.per_channel ? channel + sample * arguments.scale_stride : 0;
        const int64_t channels = arguments.per_channel ? view.channels : 1;
        quantizers.push_back({is_mixture
                                  ? scales[static_cast<size_t>(k * channels + c)]
                                  : mixbit::gated_step(scales[static_cast<size_t>(c)], width, arguments.is_signed),
                              0.0f, mixbit::quant_range(width, arguments.is_signed, false), Rounding::kHalfEven});
      }
      if (is_mixture) {
        shares = weights;
      } else {
        mixbit::gate_shares(weights.data() + sample, samples, count, shares.data());
      }
      for (int64_t at = 0; at < view.inner; at += cpu::kReduceBlock) {
        f(sample, channel, row * view.inner + at, std::min(cpu::kReduceBlock, view.inner - at),
          cpu::Mixture{quantizers.data(), shares.data(), count, arguments.form});
      }
    }
  }
};

template <typename F>
void for_each_mixture(const F& f) {
  using Form = mixbit::MixtureForm;
  for (const View& view : kViews) {
    for (const auto& [form, samples, precisions, per_channel, is_signed, by_channel] :
         {std::tuple{Form::kMixture, int64_t{1}, std::vector<int>{2, 4, 8}, true, true, false},
          std::tuple{Form::kMixture, int64_t{1}, std::vector<int>{3}, false, false, false},
          std::tuple{Form::kGated, int64_t{3}, std::vector<int>{2, 4, 8}, false, true, false},
          std::tuple{Form::kGated, int64_t{1}, std::vector<int>{4, 8}, true, false, false},
          std::tuple{Form::kGated, int64_t{5}, std::vector<int>{2, 4, 8}, true, true, true},
          std::tuple{Form::kGatedResidual, int64_t{2}, std::vector<int>{2, 4, 8, 16}, true, false, false},
          std::tuple{Form::kGatedResidual, int64_t{3}, std::vector<int>{2, 4, 8}, true, true, true},
          std::tuple{Form::kGatedResidual, int64_t{1}, std::vector<int>{2, 4, 8}, false, true, false}}) {
      f(MixtureSetting(view, samples, precisions, form, per_channel, is_signed, by_channel));
    }
  }
}

template <typename T>
void launch_mixture(const MixtureSetting& setting, const std::vector<T>& x, std::vector<T>& y, bool aligned) {
  const cuda::MixtureArguments& a = setting.arguments;
  const int64_t blocks = std::max<int64_t>(1, (a.outer * a.inner + cuda::kReduceBlock - 1) / cuda::kReduceBlock);
  const auto grid = static_cast<unsigned>(a.samples * a.channels * blocks);
  a.count == 3 ? simt::launch(grid, cuda::kThreads, cuda::mixture_kernel<T, 3>, a, blocks, x.data(), y.data(), aligned)
               : simt::launch(grid, cuda::kThreads, cuda::mixture_kernel<T, 0>, a, blocks, x.data(), y.data(), aligned);
}

TYPED_TEST(CudaBodies, Mixtures) {
  using T = TypeParam;
  for_each_mixture([](const MixtureSetting& setting) {
    const auto x = values<T>(setting.samples * setting.view.numel(), 20, false);
    std::vector<T> expected(x.size()), y(x.size());
    setting.for_each_run([&](int64_t, int64_t, int64_t first, int64_t n, const cpu::Mixture& mixture) {
      oracle().mixture(kStorage<T>, x.data() + first, expected.data() + first, n, mixture, false);
    });
    for (const bool aligned : {true, false}) {
      launch_mixture(setting, x, y, aligned);
      for (size_t i = 0; i < x.size(); ++i) {
        // The CPU skips grids of weight 0, which may change the sign of a zero.
        const auto got = static_cast<float>(y[i]), wanted = static_cast<float>(expected[i]);
        ASSERT_TRUE(got == wanted || (std::isnan(got) && std::isnan(wanted))) << got << " " << wanted;
      }
    }
  });
}

TYPED_TEST(CudaBodies, MixturesBackward) {
  using T = TypeParam;
  for_each_mixture([](const MixtureSetting& setting) {
    const cuda::MixtureArguments& a = setting.arguments;
    const auto x = values<T>(setting.samples * setting.view.numel(), 21, true);
    const auto grad = values<T>(setting.samples * setting.view.numel(), 22, true);
    std::vector<T> expected(x.size()), dx(x.size());
    const auto level_count = static_cast<size_t>(a.level_count()), step_count = static_cast<size_t>(a.step_count());
    const auto samples = static_cast<size_t>(a.samples), channels = static_cast<size_t>(a.channels);
    std::vector<double> expected_levels(level_count * samples), expected_steps(step_count * samples * channels);
    setting.for_each_run([&](int64_t sample, int64_t channel, int64_t first, int64_t n, const cpu::Mixture& mixture) {
      double levels[cpu::kMaxGrids], steps[cpu::kMaxGrids];
      oracle().mixture_backward(kStorage<T>, grad.data() + first, x.data() + first, expected.data() + first, n, mixture,
                                levels, steps, false);
      for (size_t k = 0; k < level_count; ++k) {
        expected_levels[k * samples + static_cast<size_t>(sample)] += levels[k];
      }
      for (size_t k = 0; k < step_count; ++k) {
        expected_steps[(k * samples + static_cast<size_t>(sample)) * channels + static_cast<size_t>(channel)] +=
            steps[k];
      }
    });
    const int64_t count = a.outer * a.inner;
    const int64_t blocks = std::max<int64_t>(1, (count + cuda::kReduceBlock - 1) / cuda::kReduceBlock);
    const auto grid = static_cast<unsigned>(a.samples * a.channels * blocks);
    const int64_t per_block = a.level_count() + a.step_count();
    std::vector<double> partials(static_cast<size_t>(grid * per_block), -1.0), aligned_partials;
    for (const auto& [with_dx, aligned] : {std::pair{true, true}, std::pair{true, false}, std::pair{false, true}}) {
      T* out = with_dx ? dx.data() : nullptr;
      a.count == 3 ? simt::launch(grid, cuda::kThreads, cuda::mixture_backward_kernel<T, 3>, a, blocks, grad.data(),
                                  x.data(), out, aligned, partials.data())
                   : simt::launch(grid, cuda::kThreads, cuda::mixture_backward_kernel<T, 0>, a, blocks, grad.data(),
                                  x.data(), out, aligned, partials.data());
      if (aligned_partials.empty()) aligned_partials = partials;
      ASSERT_TRUE(same_bytes(aligned_partials, partials));
      ASSERT_TRUE(same_bytes(expected, dx));
    }
    std::vector<double> levels(expected_levels.size()), steps(expected_steps.size());
    simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), a.samples, a.channels * blocks,
                 per_block, int64_t{0}, a.level_count(), levels.data());
    simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), a.samples * a.channels, blocks,
                 per_block, a.level_count(), a.step_count(), steps.data());
    const double tolerance = 1e-5 * (1.0 + static_cast<double>(count * a.channels));
    for (size_t i = 0; i < levels.size(); ++i) ASSERT_NEAR(levels[i], expected_levels[i], tolerance);
    const double largest_code = std::exp2(setting.bits.back());
    for (size_t i = 0; i < steps.size(); ++i) {
      ASSERT_NEAR(steps[i], expected_steps[i], 1e-6 * largest_code * static_cast<double>(count));
    }
    if (a.form != mixbit::MixtureForm::kMixture) {
      std::vector<float> wanted(levels.size()), dgates(levels.size(), -1.0f);
      for (size_t s = 0; s < samples; ++s) {
        mixbit::gate_gradients(levels.data() + s, setting.weights.data() + s, a.samples, a.count, wanted.data() + s);
      }
      simt::launch(1, cuda::kThreads, cuda::gate_gradients_kernel, levels.data(), setting.weights.data(), a.samples,
                   a.count, dgates.data());
      ASSERT_EQ(dgates, wanted);
    }
  });
}

// All views as one list, empty tensors between them: the same bits as one by one.
TYPED_TEST(CudaBodies, Lists) {
  using T = TypeParam;
  struct Item {
    View view;
    Setting setting;
    std::vector<T> x, grad, y, dx, expected_y, expected_dx;
    std::vector<double> partials, expected_partials, noise_partials, signal, noise;
    std::vector<float> dscale, dzero_point, scales;
    int64_t blocks;
  };
  std::vector<Item> items;
  const std::vector<float> widths = {2.0f, 5.0f, 8.0f};
  for (const View& view :
       {View{1, 1, 37}, View{2, 7, 33}, View{1, 4, 0}, View{1, 2, 16384}, View{1, 1, 40000}, View{3, 5, 24}}) {
    Item item{view, Setting(view, true, true, true, Rounding::kHalfEven),
              {},   {},
              {},   {},
              {},   {},
              {},   {},
              {},   {},
              {},   {},
              {},   {},
              0};
    item.x = values<T>(view.numel(), 10, true);
    item.grad = values<T>(view.numel(), 11, true);
    const auto channels = static_cast<size_t>(view.channels);
    item.y = item.dx = item.expected_y = item.expected_dx = std::vector<T>(item.x.size());
    item.blocks = view.numel() == 0 ? 0 : (view.outer * view.inner + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
    item.partials.assign(channels * static_cast<size_t>(item.blocks) * 2, -1.0);
    item.expected_partials = item.partials;
    item.noise_partials.assign(channels * static_cast<size_t>(item.blocks) * (widths.size() + 1), -1.0);
    item.signal.assign(channels, -1.0);
    item.noise.assign(channels * widths.size(), -1.0);
    item.scales.assign(channels * widths.size(), 0.4f);
    item.dscale.assign(channels, -1.0f);
    item.dzero_point = item.dscale;
    items.push_back(std::move(item));
  }
  std::vector<cuda::QuantizeEntry> forward, backward;
  std::vector<cuda::NoiseEntry> noises;
  int64_t forward_blocks = 0, backward_blocks = 0, channels = 0, sums = 0;
  for (Item& item : items) {
    item.setting.point();
    if (item.blocks == 0) continue;
    cuda::QuantizeEntry entry{};
    entry.arguments = item.setting.arguments;
    entry.grad = item.grad.data();
    entry.x = item.x.data();
    entry.y = item.y.data();
    entry.aligned = true;
    entry.first_block = forward_blocks;
    forward.push_back(entry);
    forward_blocks += (item.view.numel() + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
    entry.y = item.dx.data();
    entry.first_block = backward_blocks;
    entry.blocks = item.blocks;
    entry.first_channel = channels;
    entry.partials = item.partials.data();
    entry.dscale = item.dscale.data();
    entry.dzero_point = item.dzero_point.data();
    backward.push_back(entry);
    cuda::NoiseEntry noise{};
    noise.arguments = {kStorage<T>,
                       item.view.outer,
                       item.view.channels,
                       item.view.inner,
                       item.scales.data(),
                       true,
                       widths.data(),
                       static_cast<int64_t>(widths.size()),
                       true,
                       true};
    noise.x = item.x.data();
    noise.aligned = true;
    noise.first_block = backward_blocks;
    noise.blocks = item.blocks;
    noise.first_sum = sums;
    noise.partials = item.noise_partials.data();
    noise.signal = item.signal.data();
    noise.noise = item.noise.data();
    noises.push_back(noise);
    backward_blocks += item.view.channels * item.blocks;
    channels += item.view.channels;
    sums += item.view.channels * static_cast<int64_t>(widths.size() + 1);
  }
  const auto count = static_cast<int64_t>(forward.size());
  const auto grid = [](int64_t n) { return static_cast<unsigned>((n + cuda::kThreads - 1) / cuda::kThreads); };
  simt::launch(static_cast<unsigned>(forward_blocks), cuda::kThreads, cuda::fake_quantize_list_kernel<T>,
               static_cast<const cuda::QuantizeEntry*>(forward.data()), count);
  simt::launch(static_cast<unsigned>(backward_blocks), cuda::kThreads, cuda::fake_quantize_backward_list_kernel<T>,
               static_cast<const cuda::QuantizeEntry*>(backward.data()), count);
  simt::launch(grid(channels), cuda::kThreads, cuda::add_list_kernel,
               static_cast<const cuda::QuantizeEntry*>(backward.data()), count, channels);
  simt::launch(static_cast<unsigned>(backward_blocks), cuda::kThreads, cuda::quantization_noise_list_kernel<T>,
               static_cast<const cuda::NoiseEntry*>(noises.data()), count);
  simt::launch(grid(sums), cuda::kThreads, cuda::add_noise_list_kernel,
               static_cast<const cuda::NoiseEntry*>(noises.data()), count, sums);
  for (size_t i = 0; i < items.size(); ++i) {
    Item& item = items[i];
    if (item.blocks == 0) continue;
    const auto own = static_cast<unsigned>(item.view.channels * item.blocks);
    simt::launch(2, cuda::kThreads, cuda::fake_quantize_kernel<T>, item.setting.arguments, item.x.data(),
                 item.expected_y.data(), true);
    simt::launch(own, cuda::kThreads, cuda::fake_quantize_backward_kernel<T>, item.setting.arguments, item.blocks,
                 item.grad.data(), item.x.data(), item.expected_dx.data(), true, item.expected_partials.data());
    EXPECT_TRUE(same_bytes(item.expected_y, item.y)) << i;
    EXPECT_TRUE(same_bytes(item.expected_dx, item.dx)) << i;
    EXPECT_EQ(item.expected_partials, item.partials) << i;
    std::vector<double> noise_partials(item.noise_partials.size());
    const auto k = static_cast<int64_t>(widths.size());
    const cuda::NoiseArguments arguments{kStorage<T>,
                                         item.view.outer,
                                         item.view.channels,
                                         item.view.inner,
                                         item.scales.data(),
                                         true,
                                         widths.data(),
                                         k,
                                         true,
                                         true};
    simt::launch(own, cuda::kThreads, cuda::quantization_noise_kernel<T>, arguments, item.blocks, item.x.data(), true,
                 noise_partials.data());
    EXPECT_EQ(noise_partials, item.noise_partials);
    for (int64_t c = 0; c < item.view.channels; ++c) {
      const auto at = static_cast<size_t>(c);
      EXPECT_EQ(item.dscale[at], static_cast<float>(cuda::sum_of_blocks(item.partials.data(), c, item.blocks, 2, 0)));
      EXPECT_EQ(item.dzero_point[at],
                static_cast<float>(cuda::sum_of_blocks(item.partials.data(), c, item.blocks, 2, 1)));
      EXPECT_EQ(item.signal[at], cuda::sum_of_blocks(noise_partials.data(), c, item.blocks, k + 1, 0));
      for (int64_t j = 0; j < k; ++j) {
        EXPECT_EQ(item.noise[static_cast<size_t>(j * item.view.channels + c)],
                  cuda::sum_of_blocks(noise_partials.data(), c, item.blocks, k + 1, 1 + j));
      }
    }
  }
}

// Weights of several shapes in one launch, with and without extra bits and grids of their rows, against the CPU.
TYPED_TEST(CudaBodies, Steps) {
  using T = TypeParam;
  struct Weight {
    int64_t channels, inner;
    std::vector<float> scale, bit_width;
    std::vector<uint8_t> extra_bits;
    bool narrow_range;
    std::vector<T> weight, grad, momentum, moment2, largest_moment2;

    std::vector<std::vector<T>> all() const { return {weight, grad, momentum, moment2, largest_moment2}; }
  };
  std::vector<Weight> made;
  for (const auto& [channels, inner, per_channel] :
       {std::tuple{1, 37, false}, std::tuple{7, 33, true}, std::tuple{2, 16384, true}, std::tuple{1, 40000, false}}) {
    Weight w{channels, inner, {}, {}, {}, made.size() % 2 == 0, {}, {}, {}, {}, {}};
    for (int c = 0; c < (per_channel ? channels : 1); ++c) {
      w.scale.push_back(0.21f + 0.03f * static_cast<float>(c));
      w.bit_width.push_back(static_cast<float>(2 + c % 4));
    }
    const int64_t n = w.channels * w.inner;
    if (made.size() != 1) {
      for (int64_t i = 0; i < n; ++i) w.extra_bits.push_back(static_cast<uint8_t>(i % 3));
    }
    w.weight = values<T>(n, 31, false);
    w.grad = values<T>(n, 32, true);
    w.momentum = values<T>(n, 33, true);
    w.moment2 = values<T>(n, 34, true);
    for (T& v : w.moment2) v = static_cast<T>(std::abs(static_cast<float>(v)));
    w.largest_moment2 = w.moment2;
    made.push_back(w);
  }
  const auto entries_of = [](std::vector<Weight>& weights, int64_t* blocks) {
    std::vector<cuda::StepEntry> entries;
    *blocks = 0;
    for (Weight& w : weights) {
      cuda::StepEntry e{};
      e.weight = w.weight.data();
      e.grad = w.grad.data();
      e.momentum = w.momentum.data();
      e.moment2 = w.moment2.data();
      e.largest_moment2 = w.largest_moment2.data();
      e.extra_bits = w.extra_bits.empty() ? nullptr : w.extra_bits.data();
      e.scale = w.scale.data();
      e.scale_count = static_cast<int64_t>(w.scale.size());
      e.bit_width = w.bit_width.data();
      e.bit_width_count = static_cast<int64_t>(w.bit_width.size());
      e.narrow_range = w.narrow_range;
      e.numel = w.channels * w.inner;
      e.inner = w.inner;
      e.first_block = *blocks;
      e.host_steps = 3.0;
      *blocks += (e.numel + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
      entries.push_back(e);
    }
    return entries;
  };
  // f(run, quantizer) for the rows of every weight.
  const auto on_cpu = [](std::vector<Weight>& weights, const auto& f) {
    for (Weight& w : weights) {
      for (int64_t c = 0; c < w.channels; ++c) {
        const auto at = static_cast<size_t>(w.scale.size() == 1 ? 0 : c);
        const int64_t i = c * w.inner;
        f(cpu::StepRun{w.weight.data() + i, w.grad.data() + i, w.momentum.data() + i, w.moment2.data() + i,
                       w.largest_moment2.data() + i, w.extra_bits.empty() ? nullptr : w.extra_bits.data() + i, w.inner},
          cpu::Quantizer{w.scale[at], 0.0f,
                         mixbit::quant_range(static_cast<int>(w.bit_width[at]), true, w.narrow_range),
                         Rounding::kHalfEven});
      }
    }
  };
  const auto check = [&](const auto& launch, const auto& step) {
    std::vector<Weight> device = made, host = made;
    int64_t blocks;
    const auto entries = entries_of(device, &blocks);
    launch(entries.data(), static_cast<int64_t>(entries.size()), static_cast<unsigned>(blocks));
    on_cpu(host, step);
    for (size_t i = 0; i < made.size(); ++i) {
      const auto got = device[i].all(), expected = host[i].all();
      for (size_t j = 0; j < got.size(); ++j) ASSERT_TRUE(same_bytes(expected[j], got[j])) << i << " " << j;
    }
  };
  const double rate = 0.05, scale = 8.0, fine = 0.0, not_finite = 1.0;
  for (const auto shape :
       {mixbit::StepShape::kOff, mixbit::StepShape::kStep, mixbit::StepShape::kLinear, mixbit::StepShape::kGauss}) {
    const mixbit::StepMultiplier multiplier = {shape, 0.1f, 0.125f};
    const cuda::StepArguments arguments = {multiplier, {nullptr, rate}, {&scale, 0.0}, {&fine, 1.0}};
    mixbit::SgdRule sgd = {0.0f, 0.9f, 1.0f, 1e-2f, false, false, false, false};
    check(
        [&](const cuda::StepEntry* entries, int64_t count, unsigned blocks) {
          simt::launch(blocks, cuda::kThreads, cuda::sgd_step_list_kernel<T>, entries, count, arguments, sgd);
        },
        [&](const cpu::StepRun& run, const cpu::Quantizer& q) {
          mixbit::SgdRule rule = sgd;
          rule.lr = static_cast<float>(rate);
          oracle().sgd_step(kStorage<T>, run, q, multiplier, rule, 8.0f);
        });
    mixbit::AdamRule adam{};
    adam.epsilon = 1e-8f;
    check(
        [&](const cuda::StepEntry* entries, int64_t count, unsigned blocks) {
          simt::launch(blocks, cuda::kThreads, cuda::adam_step_list_kernel<T>, entries, count, arguments, adam,
                       cuda::AdamArguments{0.9, 0.999, 0.1, true});
        },
        [&](const cpu::StepRun& run, const cpu::Quantizer& q) {
          mixbit::AdamRule rule = adam;
          mixbit::set_adam_step(&rule, rate, 0.9, 0.999, 0.1, 3.0, true);
          oracle().adam_step(kStorage<T>, run, q, multiplier, rule, 8.0f);
        });
    check(
        [&](const cuda::StepEntry* entries, int64_t count, unsigned blocks) {
          simt::launch(blocks, cuda::kThreads, cuda::scale_updates_list_kernel<T>, entries, count, multiplier);
        },
        [&](const cpu::StepRun& run, const cpu::Quantizer& q) {
          oracle().scale_updates(kStorage<T>, run.grad, run.weight, run.extra_bits, run.n, q, multiplier);
        });
    check(
        [&](const cuda::StepEntry* entries, int64_t count, unsigned blocks) {
          simt::launch(blocks, cuda::kThreads, cuda::step_multipliers_list_kernel<T>, entries, count, multiplier);
        },
        [&](const cpu::StepRun& run, const cpu::Quantizer& q) {
          oracle().step_multipliers(kStorage<T>, run.weight, run.grad, run.extra_bits, run.n, q, multiplier);
        });
    // A step that is left out, and a width that no grid has.
    std::vector<Weight> device = made;
    int64_t blocks;
    auto entries = entries_of(device, &blocks);
    cuda::StepArguments left_out = arguments;
    left_out.found_inf = {&not_finite, 0.0};
    simt::launch(static_cast<unsigned>(blocks), cuda::kThreads, cuda::sgd_step_list_kernel<T>,
                 static_cast<const cuda::StepEntry*>(entries.data()), static_cast<int64_t>(entries.size()), left_out,
                 sgd);
    ASSERT_TRUE(same_bytes(made[0].weight, device[0].weight));
    device[0].bit_width = {2.5f};
    entries = entries_of(device, &blocks);
    simt::launch(static_cast<unsigned>(blocks), cuda::kThreads, cuda::sgd_step_list_kernel<T>,
                 static_cast<const cuda::StepEntry*>(entries.data()), static_cast<int64_t>(entries.size()), arguments,
                 sgd);
    ASSERT_TRUE(std::isnan(static_cast<float>(device[0].weight[0])));
  }
}

TYPED_TEST(CudaBodies, Moments) {
  using T = TypeParam;
  for (const View& view : kViews) {
    for (const bool with_nan : {false, true}) {
      auto x = values<T>(view.numel(), 12, true);
      if (with_nan) x[x.size() / 2] = static_cast<T>(NAN);
      const int64_t blocks = (view.outer * view.inner + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
      std::vector<double> partials(static_cast<size_t>(view.channels * blocks * 4)),
          moments(static_cast<size_t>(view.channels * 4));
      simt::launch(static_cast<unsigned>(view.channels * blocks), cuda::kThreads, cuda::moments_kernel<T>, view.outer,
                   view.channels, view.inner, blocks, x.data(), true, partials.data());
      simt::launch(1, cuda::kThreads, cuda::join_moments_kernel, partials.data(), view.channels, blocks,
                   moments.data());
      for (int64_t c = 0; c < view.channels; ++c) {
        cpu::Moments expected{INFINITY, -INFINITY, 0.0, 0.0};
        for (int64_t o = 0; o < view.outer; ++o) {
          for (int64_t at = 0; at < view.inner; at += cpu::kReduceBlock) {
            cpu::Moments part;
            oracle().observe(kStorage<T>, x.data() + (o * view.channels + c) * view.inner + at,
                             std::min(cpu::kReduceBlock, view.inner - at), &part);
            expected = {cuda::smaller(part.min, expected.min), cuda::larger(part.max, expected.max),
                        expected.sum + part.sum, expected.sum_squares + part.sum_squares};
          }
        }
        const double* got = moments.data() + c * 4;
        if (std::isnan(expected.min)) {
          EXPECT_TRUE(std::isnan(got[0]) && std::isnan(got[1]) && std::isnan(got[2]));
        } else {
          EXPECT_EQ(got[0], expected.min);
          EXPECT_EQ(got[1], expected.max);
          EXPECT_NEAR(got[2], expected.sum, 1e-5 * static_cast<double>(view.numel()));
          EXPECT_NEAR(got[3], expected.sum_squares, 1e-5 * expected.sum_squares);
        }
      }
    }
  }
}

// Sorted rows of each channel; one constant, one with an infinity, one with NaN (which sort last).
std::vector<std::vector<float>> sorted_channels(int64_t n) {
  std::vector<std::vector<float>> rows;
  for (unsigned seed = 20; seed < 23; ++seed) rows.push_back(values<float>(n, seed, true));
  rows.push_back(std::vector<float>(static_cast<size_t>(n), 0.0f));
  rows.push_back(values<float>(n, 23, true));
  rows.back()[0] = INFINITY;
  for (auto& row : rows) std::sort(row.begin(), row.end());
  rows.push_back(rows[0]);
  rows.back().back() = NAN;
  return rows;
}

TEST(CudaSearch, HistogramsAndPrefixSumsAreThoseOfTheRows) {
  for (const int64_t n : {1, 300, 16384, 33000}) {
    const auto rows = sorted_channels(n);
    const auto channels = static_cast<int64_t>(rows.size());
    constexpr int64_t kBins = 32;
    std::vector<float> sorted;
    std::vector<double> moments;
    for (const auto& row : rows) {
      sorted.insert(sorted.end(), row.begin(), row.end());
      const bool nan = std::isnan(row.back());
      moments.insert(moments.end(), {nan ? NAN : row.front(), nan ? NAN : row.back(), 0.0, 0.0});
    }
    std::vector<double> histogram(static_cast<size_t>(channels * 3 * kBins), -1.0);
    simt::launch(static_cast<unsigned>(channels * kBins), cuda::kThreads, cuda::histogram_kernel, n, sorted.data(),
                 moments.data(), kBins, histogram.data());
    const int64_t blocks = (n + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
    std::vector<double> partials(static_cast<size_t>(channels * blocks * 2)), squares(static_cast<size_t>(channels)),
        prefix(static_cast<size_t>(channels * (n + 1)), -1.0);
    simt::launch(static_cast<unsigned>(channels * blocks), cuda::kThreads, cuda::row_sums_kernel, n, blocks,
                 sorted.data(), partials.data());
    simt::launch(1, cuda::kThreads, cuda::add_blocks_kernel<double>, partials.data(), channels, blocks, int64_t{2},
                 int64_t{1}, int64_t{1}, squares.data());
    simt::launch(static_cast<unsigned>(channels * blocks), cuda::kThreads, cuda::prefix_sums_kernel, n, blocks,
                 sorted.data(), partials.data(), prefix.data());
    for (int64_t c = 0; c < channels; ++c) {
      const auto& row = rows[static_cast<size_t>(c)];
      const double* got = histogram.data() + c * 3 * kBins;
      std::vector<double> expected(3 * kBins);
      if (std::isfinite(row.front()) && std::isfinite(row.back())) {
        const double range =
            mixbit::histogram_range(std::max(-static_cast<double>(row.front()), static_cast<double>(row.back())));
        for (const float v : row) {
          const auto bin = static_cast<size_t>(mixbit::histogram_bin(v, range, kBins));
          expected[bin] += 1.0;
          expected[kBins + bin] += v;
          expected[2 * kBins + bin] += static_cast<double>(v) * v;
        }
        double running = 0.0, square = 0.0;
        for (int64_t i = 0; i < n; ++i) {
          ASSERT_NEAR(prefix[static_cast<size_t>(c * (n + 1) + i)], running, 1e-7);
          running += row[static_cast<size_t>(i)];
          square += static_cast<double>(row[static_cast<size_t>(i)]) * row[static_cast<size_t>(i)];
        }
        ASSERT_NEAR(prefix[static_cast<size_t>(c * (n + 1) + n)], running, 1e-7);
        ASSERT_NEAR(squares[static_cast<size_t>(c)], square, 1e-6);
      }
      for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-8) << c << " " << i;
    }
  }
}

TEST(CudaSearch, ScalesAreThoseOfTheCpu) {
  constexpr int64_t kLength = 5000;
  const auto rows = sorted_channels(kLength);
  const auto channels = static_cast<int64_t>(rows.size());
  std::vector<float> sorted;
  std::vector<double> prefix, squares;
  for (auto row : rows) {
    sorted.insert(sorted.end(), row.begin(), row.end());
    double running = 0.0, square = 0.0;
    prefix.push_back(0.0);
    for (const float v : row) {
      prefix.push_back(running += v);
      square += static_cast<double>(v) * v;
    }
    squares.push_back(square);
  }
  const std::vector<float> widths = {2.0f, 4.0f, 8.0f, 12.0f, 17.0f, 2.5f};
  const auto count = static_cast<int64_t>(widths.size());
  const cuda::SortedRows data{sorted.data(), prefix.data(), squares.data(), kLength};
  for (const bool is_signed : {true, false}) {
    const cuda::SearchArguments arguments{channels, widths.data(), count, is_signed, true};
    std::vector<double> errors(static_cast<size_t>(count * channels * mixbit::kScaleCandidates), NAN);
    std::vector<float> scales(static_cast<size_t>(count * channels), -1.0f);
    simt::launch(static_cast<unsigned>(errors.size()), cuda::kThreads, cuda::candidate_errors_kernel<cuda::SortedRows>,
                 arguments, data, errors.data());
    simt::launch(1, cuda::kThreads, cuda::pick_scales_kernel<cuda::SortedRows>, arguments, data, errors.data(),
                 scales.data());
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        auto row = rows[static_cast<size_t>(c)];
        const float got = scales[static_cast<size_t>(k * channels + c)];
        if (k >= 4 || !std::isfinite(row.back())) {
          EXPECT_TRUE(std::isnan(got));
          continue;
        }
        const mixbit::SortedCumulative cumulative(row);
        const double high = row.back();
        const double largest = is_signed ? std::max(high, -static_cast<double>(row.front())) : high;
        const auto range = mixbit::quant_range(static_cast<int>(widths[static_cast<size_t>(k)]), is_signed, true);
        EXPECT_EQ(got, mixbit::best_scale(cumulative.view(), largest, range)) << k << " " << c;
      }
    }
  }
}

TEST(CudaSearch, HistogramsGiveTheScalesAndTheNoiseOfTheCpu) {
  const auto x = sorted_channels(20000)[0];
  constexpr int64_t kBins = 512;
  const double low = x.front(), high = x.back();
  const double range = mixbit::histogram_range(std::max(-low, high));
  std::vector<double> histogram(3 * kBins);
  for (const float v : x) {
    const auto bin = static_cast<size_t>(mixbit::histogram_bin(v, range, kBins));
    histogram[bin] += 1.0;
    histogram[kBins + bin] += v;
    histogram[2 * kBins + bin] += static_cast<double>(v) * v;
  }
  const mixbit::HistogramCumulative expected(histogram.data(), histogram.data() + kBins, histogram.data() + 2 * kBins,
                                             kBins, range);
  std::vector<mixbit::Below> starts(kBins + 1);
  double squares = -1.0;
  const cuda::HistogramRow row{histogram.data(), &low, &high, starts.data(), &squares, kBins};
  simt::launch(2, cuda::kThreads, cuda::histogram_starts_kernel, row);
  EXPECT_NEAR(squares, expected.view().sum_squares(), 1e-6);
  const std::vector<float> widths = {2.0f, 3.0f, 8.0f, 0.0f}, given = {0.9f, 0.5f, 0.03f, 1.0f};
  const cuda::SearchArguments arguments{1, widths.data(), 4, true, true};
  std::vector<double> errors(static_cast<size_t>(4 * mixbit::kScaleCandidates)), noise(4);
  std::vector<float> scales(4);
  simt::launch(static_cast<unsigned>(errors.size()), cuda::kThreads, cuda::candidate_errors_kernel<cuda::HistogramRow>,
               arguments, row, errors.data());
  simt::launch(1, cuda::kThreads, cuda::pick_scales_kernel<cuda::HistogramRow>, arguments, row, errors.data(),
               scales.data());
  simt::launch(4, cuda::kThreads, cuda::given_errors_kernel<cuda::HistogramRow>, arguments, row, given.data(),
               noise.data());
  for (size_t k = 0; k < 3; ++k) {
    const auto grid = mixbit::quant_range(static_cast<int>(widths[k]), true, true);
    EXPECT_EQ(scales[k], mixbit::best_scale(expected.view(), std::max(-low, high), grid));
    EXPECT_NEAR(noise[k], mixbit::squared_error(expected.view(), given[k], grid), 1e-6);
  }
  EXPECT_TRUE(std::isnan(scales[3]) && std::isnan(noise[3]));
}

// Weights with what counting and freezing keep of them, and a list of one entry each.
template <typename T>
struct LevelItem {
  View view;
  Setting setting;
  std::vector<T> weight;
  std::vector<uint8_t> extra_bits;
  std::vector<int8_t> codes, marks;
  std::vector<int16_t> counts, runs;
  std::vector<float> frequencies, averages;
  int64_t result = -1;

  LevelItem(const View& v, unsigned seed, bool narrow, Rounding rounding)
      : view(v), setting(v, true, true, narrow, rounding), weight(values<T>(v.numel(), seed, false)) {
    const auto size = weight.size();
    for (float& bits : setting.bit_width) bits = std::min(bits, 6.0f);
    for (size_t i = 0; i < size; ++i) extra_bits.push_back(static_cast<uint8_t>(i % 3));
    codes.assign(size, 0);
    marks.assign(size, 0);
    counts.assign(size, 0);
    runs.assign(size, 0);
    frequencies.assign(size, 0.0f);
    averages.assign(size, 0.0f);
  }
  bool same_states(const LevelItem& other) const {
    return codes == other.codes && marks == other.marks && counts == other.counts && runs == other.runs &&
           frequencies == other.frequencies && averages == other.averages;
  }
};

template <typename T>
std::vector<cuda::LevelEntry> level_entries(std::vector<LevelItem<T>>& items, bool extra, int64_t* blocks) {
  std::vector<cuda::LevelEntry> entries;
  *blocks = 0;
  for (LevelItem<T>& item : items) {
    item.setting.point();
    cuda::LevelEntry e{};
    e.arguments = item.setting.arguments;
    e.weight = item.weight.data();
    e.extra_bits = extra ? item.extra_bits.data() : nullptr;
    e.codes = item.codes.data();
    e.marks = item.marks.data();
    e.counts = item.counts.data();
    e.runs = item.runs.data();
    e.frequencies = item.frequencies.data();
    e.averages = item.averages.data();
    e.first_block = *blocks;
    e.blocks = (item.view.numel() + cuda::kReduceBlock - 1) / cuda::kReduceBlock;
    e.result = &item.result;
    *blocks += e.blocks;
    entries.push_back(e);
  }
  return entries;
}

// f(item, row offset, n, quantizer) for every row of a weight.
template <typename T, typename F>
void for_each_level_row(LevelItem<T>& item, const F& f) {
  for (int64_t row = 0; row < item.view.outer * item.view.channels; ++row) {
    cpu::Quantizer q = item.setting.quantizer(row % item.view.channels);
    q.zero_point = 0.0f;
    f(row * item.view.inner, item.view.inner, q);
  }
}

template <typename T>
std::vector<LevelItem<T>> level_items(unsigned seed) {
  std::vector<LevelItem<T>> items;
  for (const View& view : {View{1, 1, 37}, View{2, 7, 33}, View{1, 2, 16384}, View{1, 1, 40000}, View{3, 5, 24}}) {
    items.emplace_back(view, seed, seed % 2 == 0, seed % 2 == 0 ? Rounding::kHalfUp : Rounding::kHalfEven);
  }
  return items;
}

template <typename T, mixbit::SwitchScore kScore>
void compare_switches(bool extra) {
  auto items = level_items<T>(50);
  auto expected = items;
  for (unsigned step = 0; step < 4; ++step) {
    for (size_t t = 0; t < items.size(); ++t) {
      items[t].weight = expected[t].weight = values<T>(items[t].view.numel(), 51 + step % 2, false);
      int64_t count = 0;
      LevelItem<T>& item = expected[t];
      for_each_level_row(item, [&](int64_t at, int64_t n, const cpu::Quantizer& q) {
        const bool ema = kScore == mixbit::SwitchScore::kEma;
        count += oracle()
                     .count_switches(
                         kStorage<T>, item.weight.data() + at, extra ? item.extra_bits.data() + at : nullptr, n, q,
                         kScore, 0.1f,
                         {item.codes.data() + at, item.marks.data() + at, ema ? nullptr : item.counts.data() + at,
                          item.runs.data() + at, ema ? item.frequencies.data() + at : nullptr})
                     .count;
      });
      item.result = count;
    }
    int64_t blocks;
    const auto entries = level_entries(items, extra, &blocks);
    std::vector<double> partials(static_cast<size_t>(blocks), -1.0);
    const auto count = static_cast<int64_t>(entries.size());
    simt::launch(static_cast<unsigned>(blocks), cuda::kThreads, cuda::count_switches_kernel<T, kScore>, entries.data(),
                 count, 0.1f, partials.data());
    simt::launch(1, cuda::kThreads, cuda::add_findings_kernel, entries.data(), count, partials.data());
    for (size_t t = 0; t < items.size(); ++t) {
      ASSERT_TRUE(items[t].same_states(expected[t])) << t;
      ASSERT_EQ(items[t].result, expected[t].result);
    }
  }
}

TYPED_TEST(CudaBodies, Switches) {
  for (const bool extra : {false, true}) {
    compare_switches<TypeParam, mixbit::SwitchScore::kAdjacent>(extra);
    compare_switches<TypeParam, mixbit::SwitchScore::kPair>(extra);
    compare_switches<TypeParam, mixbit::SwitchScore::kOscillation>(extra);
    compare_switches<TypeParam, mixbit::SwitchScore::kEma>(extra);
  }
}

TYPED_TEST(CudaBodies, Freezing) {
  using T = TypeParam;
  for (const bool extra : {false, true}) {
    auto items = level_items<T>(60);
    auto expected = items;
    for (unsigned step = 0; step < 6; ++step) {
      const float threshold = step < 2 ? 0.0f : 0.15f;
      for (size_t t = 0; t < items.size(); ++t) {
        LevelItem<T>& item = expected[t];
        items[t].weight = item.weight = values<T>(item.view.numel(), 61 + step % 2, false);
        item.result = 0;
        for_each_level_row(item, [&](int64_t at, int64_t n, const cpu::Quantizer& q) {
          item.result += oracle()
                             .freeze_oscillating(kStorage<T>, item.weight.data() + at,
                                                 extra ? item.extra_bits.data() + at : nullptr, n, q, 0.1f, threshold,
                                                 {item.codes.data() + at, item.marks.data() + at,
                                                  item.frequencies.data() + at, item.averages.data() + at})
                             .count;
        });
      }
      int64_t blocks;
      const auto entries = level_entries(items, extra, &blocks);
      std::vector<double> partials(static_cast<size_t>(blocks), -1.0);
      const auto count = static_cast<int64_t>(entries.size());
      simt::launch(static_cast<unsigned>(blocks), cuda::kThreads, cuda::freeze_oscillating_kernel<T>, entries.data(),
                   count, 0.1f, threshold, partials.data());
      simt::launch(1, cuda::kThreads, cuda::add_findings_kernel, entries.data(), count, partials.data());
      for (size_t t = 0; t < items.size(); ++t) {
        ASSERT_TRUE(items[t].same_states(expected[t])) << t;
        ASSERT_EQ(items[t].result, expected[t].result);
        ASSERT_TRUE(same_bytes(items[t].weight, expected[t].weight));
      }
    }
    ASSERT_GT(items[3].result, 0);
  }
}

TEST(CudaLevels, WidthsThatDoNotFitLeaveEverythingAsItWas) {
  for (const float bits : {0.0f, 2.5f, 7.0f, 17.0f, NAN}) {
    std::vector<LevelItem<float>> items;
    items.emplace_back(View{1, 1, 20}, 70, false, Rounding::kHalfUp);
    items[0].setting.bit_width = {bits};
    items[0].extra_bits.assign(20, 2);
    auto before = items;
    int64_t blocks;
    const auto entries = level_entries(items, true, &blocks);
    double partials;
    simt::launch(1, cuda::kThreads, cuda::count_switches_kernel<float, mixbit::SwitchScore::kAdjacent>, entries.data(),
                 int64_t{1}, 0.1f, &partials);
    simt::launch(1, cuda::kThreads, cuda::freeze_oscillating_kernel<float>, entries.data(), int64_t{1}, 0.1f, 0.0f,
                 &partials);
    EXPECT_EQ(partials, 0.0);
    EXPECT_TRUE(items[0].same_states(before[0]) && same_bytes(items[0].weight, before[0].weight)) << bits;
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
                 x.data(), dx.data(), true, partials);
    EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](float v) { return std::isnan(v); })) << bits;
    EXPECT_TRUE(std::isnan(dx[0]) && std::isnan(partials[0]) && std::isnan(partials[1]));
    const float scale = 0.1f;
    const cuda::NoiseArguments arguments{cuda::StorageType::kFloat32, 1, 1, 20, &scale, false, &bits, 1, true, true};
    simt::launch(1, cuda::kThreads, cuda::quantization_noise_kernel<float>, arguments, int64_t{1}, x.data(), true,
                 partials);
    EXPECT_FALSE(std::isnan(partials[0]));
    EXPECT_TRUE(std::isnan(partials[1]));
    if (bits != 1.0f) {  // two's complement has one bit
      MixtureSetting mixture({1, 1, 20}, 1, {4}, mixbit::MixtureForm::kMixture, false, true, false);
      mixture.arguments.bit_widths = &bits;
      launch_mixture(mixture, x, y, true);
      EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](float v) { return std::isnan(v); })) << bits;
      simt::launch(1, cuda::kThreads, cuda::mixture_backward_kernel<float, 0>, mixture.arguments, int64_t{1}, x.data(),
                   x.data(), dx.data(), true, partials);
      EXPECT_TRUE(std::isnan(dx[0]) && std::isnan(partials[0]) && std::isnan(partials[1]));
    }
  }
}

TEST(CudaBodies, PackedCodesAreThoseOfTheHost) {
  std::mt19937 random(31);
  for (int bits = 1; bits <= mixbit::kMaxPackedBits; ++bits) {
    for (const auto& [rows, n] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {2, 700}, {40, 9}}) {
      for (const bool is_signed : {false, true}) {
        std::vector<int32_t> codes;
        for (int64_t i = 0; i < rows * n; ++i) {
          const auto code = static_cast<int32_t>(random() % (1u << bits));
          codes.push_back(is_signed ? code - (1 << (bits - 1)) : code);
        }
        const int64_t row_bytes = mixbit::packed_bytes(n, bits);
        std::vector<uint8_t> packed(static_cast<size_t>(rows * row_bytes)), expected(packed.size());
        for (int64_t row = 0; row < rows; ++row) {
          mixbit::pack_row(codes.data() + row * n, n, bits, 0, row_bytes, expected.data() + row * row_bytes);
        }
        simt::launch(2, cuda::kThreads, cuda::pack_bits_kernel, codes.data(), rows, n, bits, packed.data());
        EXPECT_TRUE(same_bytes(packed, expected)) << bits << " " << rows << " " << n;
        std::vector<int32_t> back(codes.size());
        simt::launch(2, cuda::kThreads, cuda::unpack_bits_kernel, packed.data(), rows, n, bits, is_signed, back.data());
        EXPECT_EQ(back, codes);
      }
    }
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
      if (entry.path().extension() == ".cu" ||
          !std::regex_search(tests.str(), std::regex("cuda::" + found.back() + "[<,]"))) {
        missing.push_back(found.back());
      }
    }
  }
  EXPECT_GE(found.size(), 20u);
  EXPECT_EQ(missing, std::vector<std::string>{});
}

}  // namespace
