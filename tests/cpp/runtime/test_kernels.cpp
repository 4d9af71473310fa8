// Scalar kernels against the formulas written out, and every instruction set against scalar, byte by byte.
#include <mixbit/common/packing.h>
#include <mixbit/runtime/kernels.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace mixbit::runtime;
using mixbit::CodeGrid;
using mixbit::Isa;

std::mt19937 seeded(unsigned seed) { return std::mt19937(seed); }

int32_t draw(std::mt19937& random, int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(random);
}

// Bytes at a 64-byte boundary with guards on both sides; all of it starts as `fill`.
class Buffer {
 public:
  explicit Buffer(int64_t size, uint8_t fill = 0xa5)
      : size_(size), bytes_(static_cast<size_t>(size) + 3 * kGuard, fill), fill_(fill) {
    void* p = bytes_.data() + kGuard;
    size_t space = bytes_.size() - kGuard;
    data_ = static_cast<uint8_t*>(std::align(kAlignment, 1, p, space));
  }
  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }
  // Whether nothing was written before or after.
  bool intact() const {
    const auto is_fill = [&](uint8_t byte) { return byte == fill_; };
    return std::all_of(bytes_.data(), const_cast<const uint8_t*>(data_), is_fill) &&
           std::all_of(const_cast<const uint8_t*>(data_) + size_, bytes_.data() + bytes_.size(), is_fill);
  }

 private:
  static constexpr size_t kGuard = 64;
  int64_t size_;
  std::vector<uint8_t> bytes_;
  uint8_t fill_;
  uint8_t* data_;
};

CodeGrid grid(int32_t bits, bool is_signed, int32_t zero_point = 0, float scale = 0.05f) {
  return is_signed ? CodeGrid{scale, zero_point, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, true}
                   : CodeGrid{scale, zero_point, 0, (1 << bits) - 1, false};
}

Convolution convolution(int64_t batch, int64_t size, int64_t inputs, int64_t outputs, int64_t kernel, int64_t stride,
                        int64_t pad, int64_t groups = 1, int64_t dilation = 1) {
  Convolution c = {};
  c.batch = batch;
  c.in_height = size;
  c.in_width = size + 1;  // not square
  c.in_channels = inputs;
  c.out_channels = outputs;
  c.kernel_height = c.kernel_width = kernel;
  c.stride_height = c.stride_width = stride;
  c.pad_top = c.pad_left = pad;
  c.dilation_height = c.dilation_width = dilation;
  c.groups = groups;
  const int64_t span = dilation * (kernel - 1) + 1;
  c.out_height = (c.in_height + 2 * pad - span) / stride + 1;
  c.out_width = (c.in_width + 2 * pad - span) / stride + 1;
  c.weight_bits = 8;
  c.x = grid(8, false, 3);
  c.y = grid(8, true, -2);
  return c;
}

Convolution linear(int64_t batch, int64_t inputs, int64_t outputs) {
  Convolution c = convolution(batch, 1, inputs, outputs, 1, 1, 0);
  c.in_width = c.out_width = 1;
  return c;
}

std::string describe(const Convolution& c) {
  std::string text;
  for (const auto& [name, value] : std::vector<std::pair<std::string, int64_t>>{{"batch", c.batch},
                                                                                {"height", c.in_height},
                                                                                {"width", c.in_width},
                                                                                {"inputs", c.in_channels},
                                                                                {"outputs", c.out_channels},
                                                                                {"kernel", c.kernel_height},
                                                                                {"stride", c.stride_height},
                                                                                {"pad", c.pad_top},
                                                                                {"dilation", c.dilation_height},
                                                                                {"groups", c.groups},
                                                                                {"weight bits", c.weight_bits},
                                                                                {"x low", c.x.low},
                                                                                {"x high", c.x.high},
                                                                                {"x zero", c.x.zero_point},
                                                                                {"y low", c.y.low},
                                                                                {"y high", c.y.high},
                                                                                {"y zero", c.y.zero_point}}) {
    text += name + " " + std::to_string(value) + " ";
  }
  return text;
}

// What a layer needs, filled at random: codes in the packed form of packages, and plain.
struct Layer {
  Convolution shape;
  std::vector<int32_t> codes;  // [out_channels][taps]
  std::vector<uint8_t> rows;
  int32_t row_bits;
  std::vector<int32_t> bias;
  std::vector<float> multiplier;
  Buffer x;

  Weights weights() const {
    return {rows.data(), row_bits, mixbit::packed_bytes(shape.taps(), row_bits), bias.data(), multiplier.data()};
  }
};

// `row_bits`: how the codes are stored, at least weight_bits. `extreme`: codes at the ends of their ranges only.
Layer make_layer(const Convolution& c, int32_t row_bits, bool extreme, unsigned seed) {
  std::mt19937 random = seeded(seed);
  const int32_t low = -(1 << (c.weight_bits - 1)), high = (1 << (c.weight_bits - 1)) - 1;
  const auto pick = [&](int32_t from, int32_t to) {
    return extreme ? (random() % 2 != 0 ? from : to) : draw(random, from, to);
  };
  Layer layer = {c, {}, {}, row_bits, {}, {}, Buffer(c.batch * c.in_height * c.in_width * c.in_channels)};
  const int64_t row_bytes = mixbit::packed_bytes(c.taps(), row_bits);
  layer.rows.assign(static_cast<size_t>(c.out_channels * row_bytes), 0);
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t k = 0; k < c.taps(); ++k) {
      const int32_t code = pick(low, high);
      layer.codes.push_back(code);
      for (int32_t b = 0; b < row_bits; ++b) {
        const int64_t bit = k * row_bits + b;
        layer.rows[static_cast<size_t>(o * row_bytes + bit / 8)] |= static_cast<uint8_t>(((code >> b) & 1) << bit % 8);
      }
    }
    layer.bias.push_back(draw(random, -5000, 5000));
    // Totals spread over the grid of y and beyond both of its ends.
    const double reach = std::sqrt(static_cast<double>(c.taps())) * 0.3 * (c.x.high - c.x.low + 1) * (high - low + 1);
    const double wanted = 0.6 * (c.y.high - c.y.low + 1) / reach;
    layer.multiplier.push_back(static_cast<float>(wanted * (o % 5 == 1 ? -1.0 : 1.0) * (0.5 + o % 3)));
  }
  for (int64_t i = 0; i < layer.x.size(); ++i) {
    layer.x.data()[i] = byte_of(pick(c.x.low, c.x.high));
  }
  return layer;
}

// One call, or parts of a few positions and channels each; fails if anything is written outside.
Buffer run(const KernelTable& table, const Layer& layer, bool in_parts) {
  const Convolution& c = layer.shape;
  Buffer packed(table.packed_bytes(c)), y(c.positions() * c.out_channels), scratch(table.scratch_bytes(c), 0x5a);
  table.pack(c, layer.weights(), packed.data());
  const int64_t positions = in_parts ? std::max<int64_t>(c.positions() / 3, 1) : c.positions();
  const int64_t channels = in_parts ? channel_step(c) : c.out_channels;
  for (int64_t p = 0; p < c.positions(); p += positions) {
    for (int64_t o = 0; o < c.out_channels; o += channels) {
      const Part part = {p, std::min(p + positions, c.positions()), o, std::min(o + channels, c.out_channels)};
      table.convolve(c, packed.data(), layer.x.data(), y.data(), part, scratch.data());
    }
  }
  EXPECT_TRUE(packed.intact() && y.intact() && scratch.intact()) << describe(c);
  return y;
}

void expect_same(const Buffer& expected, const Buffer& got, const std::string& what) {
  ASSERT_EQ(expected.size(), got.size());
  if (std::memcmp(expected.data(), got.data(), static_cast<size_t>(got.size())) != 0) {
    int64_t different = 0, first = -1;
    for (int64_t i = 0; i < got.size(); ++i) {
      if (expected.data()[i] != got.data()[i]) {
        ++different;
        first = first < 0 ? i : first;
      }
    }
    FAIL() << what << ": " << different << " of " << got.size() << " differ, first at " << first << ": "
           << int{got.data()[first]} << ", expected " << int{expected.data()[first]};
  }
}

// The definition once more, in 64-bit integers and doubles, from plain codes.
Buffer written_out(const Layer& layer) {
  const Convolution& c = layer.shape;
  Buffer y(c.positions() * c.out_channels);
  const int64_t inputs = c.group_inputs();
  int64_t at = 0;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t oh = 0; oh < c.out_height; ++oh) {
      for (int64_t ow = 0; ow < c.out_width; ++ow) {
        for (int64_t o = 0; o < c.out_channels; ++o) {
          int64_t total = layer.bias[static_cast<size_t>(o)];
          for (int64_t i = 0; i < inputs; ++i) {
            for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
              for (int64_t kw = 0; kw < c.kernel_width; ++kw) {
                const int64_t h = oh * c.stride_height + kh * c.dilation_height - c.pad_top;
                const int64_t w = ow * c.stride_width + kw * c.dilation_width - c.pad_left;
                if (h < 0 || w < 0 || h >= c.in_height || w >= c.in_width) continue;
                const int64_t channel = o / c.group_outputs() * inputs + i;
                const uint8_t byte = layer.x.data()[((n * c.in_height + h) * c.in_width + w) * c.in_channels + channel];
                const int64_t code = c.x.is_signed ? static_cast<int8_t>(byte) : int64_t{byte};
                const int64_t weight =
                    layer.codes[static_cast<size_t>(((o * inputs + i) * c.kernel_height + kh) * c.kernel_width + kw)];
                total += (code - c.x.zero_point) * weight;
              }
            }
          }
          const float product = static_cast<float>(total) * layer.multiplier[static_cast<size_t>(o)];
          const double code = std::nearbyint(static_cast<double>(product)) + c.y.zero_point;
          y.data()[at++] = static_cast<uint8_t>(static_cast<int64_t>(std::clamp<double>(code, c.y.low, c.y.high)));
        }
      }
    }
  }
  return y;
}

class Kernels : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (kernels(GetParam()).isa != GetParam()) {
      GTEST_SKIP() << "no kernels of this instruction set here";
    }
  }
  const KernelTable& tested() const { return kernels(GetParam()); }
  const KernelTable& scalar() const { return kernels(Isa::kScalar); }

  // Whole and in parts, from packed and plain rows, against scalar.
  void compare(const Convolution& c, bool extreme, unsigned seed) {
    const Layer layer = make_layer(c, seed % 2 == 0 ? 8 : c.weight_bits, extreme, seed);
    const Buffer expected = GetParam() == Isa::kScalar ? written_out(layer) : run(scalar(), layer, false);
    expect_same(expected, run(tested(), layer, false), describe(c));
    expect_same(expected, run(tested(), layer, true), describe(c) + "in parts");
  }

  // Every act and weight width and every combination of signs, with a zero point and without.
  void compare_widths(Convolution c, unsigned seed) {
    for (const int32_t weight_bits : {1, 2, 3, 4, 5, 6, 7, 8}) {
      for (const int32_t act_bits : {2, 4, 8}) {
        for (const bool signed_x : {false, true}) {
          for (const bool signed_y : {false, true}) {
            const bool shifted = seed % 3 == 1;
            c.weight_bits = weight_bits;
            c.x = grid(act_bits, signed_x, shifted ? (signed_x ? -1 : 2) : 0);
            c.y = grid(act_bits, signed_y, shifted ? 1 : 0);
            compare(c, seed % 4 == 3, seed);
            if (HasFatalFailure() || HasNonfatalFailure()) return;
            ++seed;
          }
        }
      }
    }
  }
};

TEST_P(Kernels, PointwiseOfAllWidthsAndSigns) {
  compare_widths(convolution(1, 6, 40, 48, 1, 1, 0), 1);
  compare_widths(convolution(2, 5, 136, 35, 1, 1, 0), 2);
}

TEST_P(Kernels, ConvolutionOfAllWidthsAndSigns) {
  compare_widths(convolution(1, 6, 12, 20, 3, 1, 1), 3);
  compare_widths(convolution(1, 9, 16, 33, 3, 2, 1), 4);
}

TEST_P(Kernels, DepthwiseOfAllWidthsAndSigns) {
  compare_widths(convolution(1, 6, 72, 72, 3, 1, 1, 72), 5);
  compare_widths(convolution(2, 9, 16, 16, 3, 2, 1, 16), 6);
  compare_widths(convolution(1, 7, 33, 33, 5, 1, 2, 33), 7);
}

TEST_P(Kernels, LinearOfAllWidthsAndSigns) {
  compare_widths(linear(1, 130, 70), 8);
  compare_widths(linear(5, 64, 10), 9);
}

TEST_P(Kernels, EveryNumberOfChannels) {
  unsigned seed = 10;
  for (const int64_t inputs : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200}) {
    for (const int64_t outputs : {1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 130}) {
      Convolution c = convolution(1, 4, inputs, outputs, seed % 3 == 0 ? 3 : 1, 1, seed % 3 == 0 ? 1 : 0);
      c.weight_bits = seed % 3 == 0 ? 8 : seed % 3 == 1 ? 4 : 2;
      c.x = grid(8, seed % 5 < 2, seed % 7 == 0 ? 0 : 5);
      compare(c, seed % 6 == 0, seed);
      if (HasFailure()) return;
      ++seed;
    }
  }
  for (const int64_t channels : {2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 130}) {
    for (const int64_t kernel : {1, 2, 3}) {
      Convolution c = convolution(1, 5, channels, channels, kernel, 1, kernel / 2, channels);
      c.x = grid(8, seed % 2 == 0, 7);
      compare(c, seed % 6 == 0, seed);
      if (HasFailure()) return;
      ++seed;
    }
  }
}

TEST_P(Kernels, EveryNumberOfPositions) {
  for (int64_t n = 1; n <= 70; ++n) {
    for (const bool signed_x : {false, true}) {
      Convolution c = linear(n, 68, 40);
      c.x = grid(8, signed_x, 3);
      c.weight_bits = n % 3 == 0 ? 2 : n % 3 == 1 ? 4 : 8;
      compare(c, false, static_cast<unsigned>(100 + n));
      if (HasFailure()) return;
    }
  }
}

TEST_P(Kernels, ShapesOfAllKinds) {
  std::mt19937 random = seeded(11);
  for (unsigned trial = 0; trial < 150; ++trial) {
    const int64_t groups = trial % 3 == 0 ? draw(random, 2, 4) : 1;
    const bool depthwise = trial % 5 == 4;
    const int64_t inputs = depthwise ? draw(random, 2, 140) : groups * draw(random, 1, 40);
    const int64_t outputs = depthwise ? inputs : groups * draw(random, 1, 80);
    Convolution c = convolution(draw(random, 1, 3), draw(random, 4, 11), inputs, outputs, draw(random, 1, 4),
                                draw(random, 1, 3), draw(random, 0, 2), depthwise ? inputs : groups);
    if (trial % 7 == 0) {  // not square in anything
      c.kernel_height = draw(random, 1, 3);
      c.stride_width = draw(random, 1, 3);
      c.dilation_height = draw(random, 1, 2);
      c.pad_left = draw(random, 0, 3);
      c.out_height =
          (c.in_height + 2 * c.pad_top - c.dilation_height * (c.kernel_height - 1) - 1) / c.stride_height + 1;
      c.out_width = (c.in_width + 2 * c.pad_left - c.dilation_width * (c.kernel_width - 1) - 1) / c.stride_width + 1;
    }
    c.weight_bits = draw(random, 1, 8);
    const bool signed_x = random() % 2 != 0;
    c.x = grid(draw(random, 1, 8), signed_x, 0);
    c.x.zero_point = draw(random, c.x.low, c.x.high);
    c.y = grid(draw(random, 2, 8), random() % 2 != 0, 0);
    c.y.zero_point = draw(random, c.y.low, c.y.high);
    if (random() % 2 != 0) c.y.low = c.y.zero_point;  // a fused relu
    compare(c, random() % 4 == 0, 1000 + trial);
    if (HasFailure()) return;
  }
}

TEST_P(Kernels, LargeLayers) {
  unsigned seed = 20;
  for (const int32_t weight_bits : {2, 4, 8}) {
    for (Convolution c : {convolution(1, 14, 512, 128, 1, 1, 0), convolution(1, 7, 512, 96, 3, 1, 1),
                          convolution(1, 28, 128, 128, 3, 1, 1, 128), linear(1, 1024, 1000),
                          convolution(1, 56, 3, 32, 3, 2, 1), convolution(1, 31, 64, 64, 3, 2, 1)}) {
      c.weight_bits = weight_bits;
      c.x = grid(8, seed % 2 == 0, 9);
      compare(c, false, seed++);
      if (HasFailure()) return;
    }
  }
}

// Totals near both ends of 32 bits, multipliers above one and huge: nothing wraps or saturates on the way.
TEST_P(Kernels, ExtremeTotals) {
  for (const bool signed_x : {false, true}) {
    for (const int32_t sign : {-1, 1}) {
      for (const float factor : {1e-7f, 0.75f, 1.0f, 3.0f, 1e9f, 3e38f, 1e-40f, 0.0f}) {
        Convolution c = linear(2, 60000, 5);
        c.x = grid(8, signed_x, 0);
        c.y = grid(8, true, 5);
        Layer layer = make_layer(c, 8, true, 30);
        std::fill(layer.x.data(), layer.x.data() + layer.x.size(), byte_of(signed_x ? -128 : 255));
        std::fill(layer.rows.begin(), layer.rows.end(), byte_of(sign > 0 ? 127 : -128));
        std::fill(layer.codes.begin(), layer.codes.end(), sign > 0 ? 127 : -128);
        std::fill(layer.multiplier.begin(), layer.multiplier.end(), factor);
        layer.bias = {0, 1, -1, 100000000, -100000000};
        const Buffer expected = written_out(layer);
        expect_same(expected, run(tested(), layer, false), describe(c));
        if (HasFailure()) return;
      }
    }
  }
}

// Narrow codes are multiplied where they lie in their bytes: sums of long rows, 2^4 or 2^6 too large, would not fit.
TEST_P(Kernels, LongRowsOfNarrowCodes) {
  for (const int32_t weight_bits : {2, 4}) {
    for (const int64_t rows : {1, 2}) {
      Convolution c = linear(rows, 263201, 1);
      c.weight_bits = weight_bits;
      c.x = grid(8, false);
      c.y = grid(8, true);
      const std::vector<int32_t> codes(static_cast<size_t>(c.taps()), -(1 << (weight_bits - 1)));
      const int64_t row_bytes = mixbit::packed_bytes(c.taps(), weight_bits);
      Layer layer = {c,
                     codes,
                     std::vector<uint8_t>(static_cast<size_t>(row_bytes)),
                     weight_bits,
                     {0},
                     {1e-7f},
                     Buffer(rows * c.taps(), 255)};
      mixbit::pack_row(codes.data(), c.taps(), weight_bits, 0, row_bytes, layer.rows.data());
      expect_same(written_out(layer), run(tested(), layer, false), describe(c));
      if (HasFailure()) return;
    }
  }
}

// A zero point that no byte holds: padding cannot be a code.
TEST_P(Kernels, ZeroPointsOutsideTheBytes) {
  unsigned seed = 40;
  for (const bool signed_x : {false, true}) {
    for (const int32_t zero_point : {-300, -129, 256, 1000}) {
      for (Convolution c : {convolution(1, 5, 20, 24, 3, 1, 1), convolution(1, 5, 24, 24, 3, 1, 1, 24),
                            convolution(1, 5, 20, 24, 1, 1, 0)}) {
        c.x = grid(8, signed_x, zero_point);
        compare(c, false, seed++);
        if (HasFailure()) return;
      }
    }
  }
}

// Threads compute parts at the same time, each with scratch memory of its own.
TEST_P(Kernels, PartsInThreads) {
  for (const int32_t weight_bits : {2, 8}) {
    for (Convolution c : {convolution(1, 20, 72, 130, 3, 1, 1), convolution(2, 20, 130, 130, 3, 1, 1, 130)}) {
      c.weight_bits = weight_bits;
      const Layer layer = make_layer(c, 8, false, 55);
      const Buffer expected = run(tested(), layer, false);
      Buffer packed(tested().packed_bytes(c)), y(expected.size());
      tested().pack(c, layer.weights(), packed.data());
      std::vector<std::thread> threads;
      for (int64_t t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
          Buffer scratch(tested().scratch_bytes(c));
          const Part part = {c.positions() * (t / 2) / 2, c.positions() * (t / 2 + 1) / 2, t % 2 * 64,
                             t % 2 == 0 ? 64 : c.out_channels};
          tested().convolve(c, packed.data(), layer.x.data(), y.data(), part, scratch.data());
        });
      }
      for (std::thread& thread : threads) thread.join();
      expect_same(expected, y, describe(c));
    }
  }
}

TEST_P(Kernels, NothingToDo) {
  Convolution c = convolution(0, 4, 8, 8, 3, 1, 1);
  const Layer layer = make_layer(c, 8, false, 50);
  EXPECT_EQ(run(tested(), layer, false).size(), 0);
  tested().lookup(nullptr, nullptr, nullptr, 0);
  tested().quantize(nullptr, nullptr, grid(8, false), 0);
  tested().add(nullptr, grid(8, false), nullptr, grid(8, false), nullptr, grid(8, false), 0);
}

// ------------------------------------------------------------------------------------------------------ element-wise

std::vector<CodeGrid> some_grids() {
  return {grid(8, false, 0, 0.031f), grid(8, true, 0, 0.047f),    grid(4, true, 1, 0.5f),
          grid(2, false, 0, 1.3f),   grid(8, false, 100, 0.021f), {0.03f, -20, -20, 100, true}};
}

Buffer random_codes(int64_t n, const CodeGrid& g, unsigned seed) {
  std::mt19937 random = seeded(seed);
  Buffer codes(n);
  for (int64_t i = 0; i < n; ++i) codes.data()[i] = byte_of(draw(random, g.low, g.high));
  return codes;
}

TEST_P(Kernels, AddFollowsTheFormula) {
  unsigned seed = 60;
  for (const CodeGrid& a : some_grids()) {
    for (const CodeGrid& b : some_grids()) {
      for (const CodeGrid& y : some_grids()) {
        const int64_t n = 1 + seed % 150;
        const Buffer a_codes = random_codes(n, a, seed), b_codes = random_codes(n, b, seed + 1);
        Buffer expected(n), got(n);
        for (int64_t i = 0; i < n; ++i) {
          const float left = static_cast<float>(code_at(a_codes.data() + i, a.is_signed) - a.zero_point) * a.scale;
          const float right = static_cast<float>(code_at(b_codes.data() + i, b.is_signed) - b.zero_point) * b.scale;
          const float scaled = std::nearbyint((left + right) / y.scale);
          expected.data()[i] = byte_of(static_cast<int32_t>(std::clamp(
              scaled + static_cast<float>(y.zero_point), static_cast<float>(y.low), static_cast<float>(y.high))));
        }
        tested().add(a_codes.data(), a, b_codes.data(), b, got.data(), y, n);
        expect_same(expected, got, "add");
        EXPECT_TRUE(got.intact());
        if (HasFailure()) return;
        ++seed;
      }
    }
  }
}

TEST_P(Kernels, LookupMovesCodes) {
  for (const CodeGrid& x : some_grids()) {
    for (const CodeGrid& y : some_grids()) {
      uint8_t table[256];
      move_table(x, y, table);
      for (const int64_t n : {1, 15, 16, 63, 64, 65, 300}) {
        const Buffer codes = random_codes(n, x, 61);
        Buffer expected(n), got(n);
        for (int64_t i = 0; i < n; ++i) {
          const int32_t value = code_at(codes.data() + i, x.is_signed) - x.zero_point;
          const float scaled = std::nearbyint(static_cast<float>(value) * (x.scale / y.scale));
          expected.data()[i] = byte_of(static_cast<int32_t>(std::clamp(
              scaled + static_cast<float>(y.zero_point), static_cast<float>(y.low), static_cast<float>(y.high))));
        }
        tested().lookup(table, codes.data(), got.data(), n);
        expect_same(expected, got, "lookup");
        EXPECT_TRUE(got.intact());
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(Kernels, QuantizeAndDequantize) {
  std::mt19937 random = seeded(62);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const CodeGrid& y : some_grids()) {
    for (const int64_t n : {1, 15, 16, 17, 64, 333}) {
      std::vector<float> x(static_cast<size_t>(n));
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = i % 11 == 3   ? y.scale * (static_cast<float>(i) - 8.5f)  // ties
               : i % 31 == 9 ? infinity
               : i % 31 == 4 ? -infinity
               : i % 31 == 5 ? std::numeric_limits<float>::quiet_NaN()
               : i % 31 == 6 ? 3e38f
                             : normal(random);
      }
      Buffer expected(n), got(n);
      for (size_t i = 0; i < x.size(); ++i) {
        const double code = std::nearbyint(static_cast<double>(x[i] / y.scale)) + y.zero_point;
        const double clamped = std::isnan(code) ? y.low : std::clamp<double>(code, y.low, y.high);
        expected.data()[i] = byte_of(static_cast<int32_t>(clamped));
      }
      tested().quantize(x.data(), got.data(), y, n);
      expect_same(expected, got, "quantize");
      EXPECT_TRUE(got.intact());
      std::vector<float> back(static_cast<size_t>(n) + 1, -7.0f);
      tested().dequantize(got.data(), y, back.data(), n);
      for (size_t i = 0; i < x.size(); ++i) {
        const int32_t code = code_at(got.data() + i, y.is_signed);
        ASSERT_EQ(back[i], static_cast<float>(code - y.zero_point) * y.scale);
      }
      EXPECT_EQ(back.back(), -7.0f);
    }
    for (const int64_t channels : {1, 3, 4, 16, 17}) {
      const int64_t pixels = 45;
      std::vector<float> x(static_cast<size_t>(channels * pixels));
      for (float& v : x) v = normal(random);
      Buffer planes(channels * pixels), got(channels * pixels);
      scalar().quantize(x.data(), planes.data(), y, planes.size());
      tested().quantize_image(x.data(), got.data(), y, channels, pixels);
      EXPECT_TRUE(got.intact());
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < pixels; ++p) {
          ASSERT_EQ(got.data()[p * channels + c], planes.data()[c * pixels + p]);
        }
      }
    }
  }
}

Pool pool(int64_t size, int64_t channels, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation = 1) {
  Pool p = {};
  p.batch = 2;
  p.in_height = size;
  p.in_width = size + 2;
  p.channels = channels;
  p.kernel_height = p.kernel_width = kernel;
  p.stride_height = p.stride_width = stride;
  p.pad_top = p.pad_left = pad;
  p.dilation_height = p.dilation_width = dilation;
  const int64_t span = dilation * (kernel - 1) + 1;
  p.out_height = (p.in_height + 2 * pad - span) / stride + 1;
  p.out_width = (p.in_width + 2 * pad - span) / stride + 1;
  p.count_include_pad = true;
  return p;
}

TEST_P(Kernels, PoolsFollowTheFormula) {
  unsigned seed = 70;
  for (Pool p : {pool(6, 5, 2, 2, 0), pool(7, 64, 3, 2, 1), pool(5, 17, 3, 1, 1), pool(7, 130, 3, 2, 0),
                 pool(9, 33, 3, 1, 2, 2), pool(4, 1, 4, 4, 0), pool(8, 100, 2, 1, 1)}) {
    for (const CodeGrid& x : some_grids()) {
      for (const CodeGrid& y : some_grids()) {
        p.x = x;
        p.y = y;
        p.count_include_pad = seed % 2 == 0;
        // Ceil mode: the last windows begin inside and end outside.
        const bool ceil = seed % 5 == 0 && p.out_height * p.stride_height - p.pad_top < p.in_height;
        if (ceil) ++p.out_height;
        const Buffer codes = random_codes(p.batch * p.in_height * p.in_width * p.channels, x, seed);
        const int64_t n = p.positions();
        Buffer largest(n * p.channels), average(n * p.channels), got(n * p.channels);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t image = i / (p.out_height * p.out_width), oh = i / p.out_width % p.out_height,
                        ow = i % p.out_width;
          for (int64_t c = 0; c < p.channels; ++c) {
            int64_t top = -1000, sum = 0, count = 0;
            for (int64_t kh = 0; kh < p.kernel_height; ++kh) {
              for (int64_t kw = 0; kw < p.kernel_width; ++kw) {
                const int64_t h = oh * p.stride_height + kh * p.dilation_height - p.pad_top;
                const int64_t w = ow * p.stride_width + kw * p.dilation_width - p.pad_left;
                if (h < 0 || w < 0 || h >= p.in_height || w >= p.in_width) continue;
                const int64_t at = ((image * p.in_height + h) * p.in_width + w) * p.channels + c;
                const int64_t code = code_at(codes.data() + at, x.is_signed);
                top = std::max(top, code);
                sum += code - x.zero_point;
                ++count;
              }
            }
            if (p.count_include_pad) count = p.kernel_height * p.kernel_width;
            const float multiplier = x.scale / (static_cast<float>(count) * y.scale);
            const float scaled = std::nearbyint(static_cast<float>(sum) * multiplier);
            largest.data()[i * p.channels + c] = static_cast<uint8_t>(top);
            average.data()[i * p.channels + c] = byte_of(static_cast<int32_t>(std::clamp(
                scaled + static_cast<float>(y.zero_point), static_cast<float>(y.low), static_cast<float>(y.high))));
          }
        }
        tested().max_pool(p, codes.data(), got.data(), 0, n / 2);
        tested().max_pool(p, codes.data(), got.data(), n / 2, n);
        expect_same(largest, got, "max pool");
        tested().average_pool(p, codes.data(), got.data(), n / 2, n);
        tested().average_pool(p, codes.data(), got.data(), 0, n / 2);
        expect_same(average, got, "average pool");
        EXPECT_TRUE(got.intact());
        if (HasFailure()) return;
        if (ceil) --p.out_height;
        ++seed;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllIsas, Kernels, testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kVnni, Isa::kAmx),
                         [](const auto& chosen) { return mixbit::isa_name(chosen.param); });

TEST(Isas, NamesAreThoseOfTheVariable) {
  Isa isa;
  for (const Isa known : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni, Isa::kAmx}) {
    ASSERT_TRUE(parse_isa(mixbit::isa_name(known), &isa));
    EXPECT_EQ(isa, known);
    EXPECT_LE(kernels(known).isa, known);
  }
  EXPECT_FALSE(parse_isa("sse", &isa));
  EXPECT_FALSE(parse_isa("", &isa));
}

TEST(Layers, ChannelSteps) {
  EXPECT_EQ(channel_step(convolution(1, 4, 8, 200, 1, 1, 0)), 64);
  EXPECT_EQ(channel_step(convolution(1, 4, 200, 200, 3, 1, 1, 200)), 64);
  EXPECT_EQ(channel_step(convolution(1, 4, 8, 200, 3, 1, 1, 4)), 50);
}

}  // namespace
