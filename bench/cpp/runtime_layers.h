#pragma once

// Single layers of the integer runtime with random codes, for the benchmarks.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include <mixbit/runtime/kernels.h>

namespace mixbit::bench {

using runtime::Convolution;
using runtime::KernelTable;

// A square convolution with "same" padding at stride 1 (and half of it beyond); size 1 and kernel 1: a linear layer.
inline Convolution square_layer(int64_t size, int64_t inputs, int64_t outputs, int64_t kernel, int64_t stride,
                                int64_t groups, int32_t act_bits, bool signed_act, int32_t weight_bits) {
  Convolution c = {};
  c.batch = 1;
  c.in_height = c.in_width = size;
  c.in_channels = inputs;
  c.out_channels = outputs;
  c.kernel_height = c.kernel_width = kernel;
  c.stride_height = c.stride_width = stride;
  c.pad_top = c.pad_left = kernel / 2;
  c.dilation_height = c.dilation_width = 1;
  c.groups = groups;
  c.out_height = c.out_width = (size + 2 * (kernel / 2) - kernel) / stride + 1;
  c.weight_bits = weight_bits;
  const int32_t half = 1 << (act_bits - 1);
  c.x = signed_act ? CodeGrid{1.0f, 0, -half, half - 1, true} : CodeGrid{1.0f, 0, 0, 2 * half - 1, false};
  c.y = c.x;
  return c;
}

// Everything one call needs; with several copies of the weights each call takes the next one.
class LayerRun {
 public:
  LayerRun(const Convolution& convolution, const KernelTable& table, int64_t copies = 1)
      : convolution_(convolution),
        table_(table),
        x_(allocate(convolution.batch * convolution.in_height * convolution.in_width * convolution.in_channels)),
        y_(allocate(convolution.positions() * convolution.out_channels)),
        scratch_(allocate(table.scratch_bytes(convolution))) {
    std::mt19937 random(1);
    const auto draw = [&](int32_t low, int32_t high) {
      return static_cast<uint8_t>(low + static_cast<int32_t>(random() % static_cast<uint32_t>(high - low + 1)));
    };
    const int64_t inputs = convolution.batch * convolution.in_height * convolution.in_width * convolution.in_channels;
    for (int64_t i = 0; i < inputs; ++i) {
      x_.get()[i] = draw(convolution.x.low, convolution.x.high);
    }
    const int32_t half = 1 << (convolution.weight_bits - 1);
    std::vector<uint8_t> codes(static_cast<size_t>(convolution.out_channels * convolution.taps()));
    std::generate(codes.begin(), codes.end(), [&] { return draw(-half, half - 1); });
    const std::vector<float> multiplier(static_cast<size_t>(convolution.out_channels), 1e-3f);
    const std::vector<int32_t> bias(static_cast<size_t>(convolution.out_channels), 100);
    for (int64_t i = 0; i < copies; ++i) {
      packed_.push_back(allocate(table.packed_bytes(convolution)));
      table.pack(convolution, {codes.data(), 8, convolution.taps(), bias.data(), multiplier.data()},
                 packed_.back().get());
    }
  }

  void operator()() {
    table_.convolve(convolution_, packed_[next_++ % packed_.size()].get(), x_.get(), y_.get(),
                    {0, convolution_.positions(), 0, convolution_.out_channels}, scratch_.get());
  }

  double macs() const {
    return static_cast<double>(convolution_.positions() * convolution_.out_channels * convolution_.taps());
  }

 private:
  using Bytes = std::unique_ptr<uint8_t, decltype(&std::free)>;
  static Bytes allocate(int64_t bytes) {
    const auto size = static_cast<size_t>(bytes + runtime::kReadSlack + 63) / 64 * 64;
    return {static_cast<uint8_t*>(std::aligned_alloc(64, size)), &std::free};
  }

  Convolution convolution_;
  const KernelTable& table_;
  Bytes x_, y_, scratch_;
  std::vector<Bytes> packed_;
  size_t next_ = 0;
};

}  // namespace mixbit::bench
