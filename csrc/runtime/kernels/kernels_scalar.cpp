// The definition of every kernel, written for reading: one output at a time, formulas of mixbit/common/integer.h.

#include <cstdint>
#include <cstring>

#include <mixbit/common/packing.h>

#include "tables.h"

namespace mixbit::runtime {

int64_t channel_step(const Convolution& convolution) {
  const bool whole_groups = convolution.groups > 1 && !convolution.depthwise();
  return whole_groups ? convolution.group_outputs() : 64;
}

void move_table(const CodeGrid& x, const CodeGrid& y, uint8_t table[256]) {
  for (int32_t byte = 0; byte < 256; ++byte) {
    const uint8_t stored = byte_of(byte);
    table[byte] = byte_of(moved_code(code_at(&stored, x.is_signed), x, y));
  }
}

void multiply(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
              const CodeGrid& y_grid, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = byte_of(
        multiplied_code(code_at(a + i, a_grid.is_signed), a_grid, code_at(b + i, b_grid.is_signed), b_grid, y_grid));
  }
}

void softmax(const int32_t* powers, const uint8_t* x, const CodeGrid& x_grid, uint8_t* y, const CodeGrid& y_grid,
             int64_t n, int64_t stride) {
  int32_t largest = x_grid.low;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t code = code_at(x + i * stride, x_grid.is_signed);
    largest = code > largest ? code : largest;
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += powers[largest - code_at(x + i * stride, x_grid.is_signed)];
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t power = powers[largest - code_at(x + i * stride, x_grid.is_signed)];
    y[i * stride] = byte_of(softmax_code(power, sum, y_grid));
  }
}

namespace {

// Packed weights: int8 codes [out_channels][kernel row][kernel column][group input], then multiplier and bias, both
// [out_channels].
struct PackedScalar {
  int8_t* codes;
  float* multiplier;
  int32_t* bias;
};

int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

PackedScalar packed_parts(const Convolution& c, void* packed) {
  auto* base = static_cast<char*>(packed);
  char* multiplier = base + align(c.out_channels * c.taps());
  char* bias = multiplier + align(c.out_channels * 4);
  return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(multiplier), reinterpret_cast<int32_t*>(bias)};
}

int64_t packed_bytes(const Convolution& c) { return align(c.out_channels * c.taps()) + 2 * align(c.out_channels * 4); }

void pack(const Convolution& c, const Weights& weights, void* packed) {
  const PackedScalar parts = packed_parts(c, packed);
  const int64_t inputs = c.group_inputs(), kernel = c.kernel_height * c.kernel_width;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    const uint8_t* row = weights.codes + o * weights.row_bytes;
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t k = 0; k < kernel; ++k) {
        parts.codes[(o * kernel + k) * inputs + i] =
            static_cast<int8_t>(unpacked_code(row, weights.bits, i * kernel + k, true));
      }
    }
    parts.multiplier[o] = weights.multiplier[o];
    parts.bias[o] = weights.bias == nullptr ? 0 : weights.bias[o];
  }
}

int64_t scratch_bytes(const Convolution&) { return 0; }

void convolve(const Convolution& c, const void* packed, const uint8_t* x, uint8_t* y, const Part& part, void*) {
  const PackedScalar parts = packed_parts(c, const_cast<void*>(packed));
  const int64_t inputs = c.group_inputs();
  for (int64_t p = part.first_position; p < part.last_position; ++p) {
    const int64_t column = p % c.out_width, row = p / c.out_width % c.out_height;
    const uint8_t* image = x + p / (c.out_width * c.out_height) * c.in_height * c.in_width * c.in_channels;
    for (int64_t o = part.first_channel; o < part.last_channel; ++o) {
      const int64_t first_input = o / c.group_outputs() * inputs;
      const int8_t* codes = parts.codes + o * c.taps();
      int64_t total = parts.bias[o];
      for (int64_t kh = 0; kh < c.kernel_height; ++kh) {
        const int64_t h = row * c.stride_height - c.pad_top + kh * c.dilation_height;
        for (int64_t kw = 0; kw < c.kernel_width; ++kw, codes += inputs) {
          const int64_t w = column * c.stride_width - c.pad_left + kw * c.dilation_width;
          if (h < 0 || h >= c.in_height || w < 0 || w >= c.in_width) {
            continue;
          }
          const uint8_t* pixel = image + (h * c.in_width + w) * c.in_channels + first_input;
          for (int64_t i = 0; i < inputs; ++i) {
            total += (code_at(pixel + i, c.x.is_signed) - c.x.zero_point) * codes[i];
          }
        }
      }
      y[p * c.out_channels + o] = byte_of(requantize(static_cast<int32_t>(total), parts.multiplier[o], c.y));
    }
  }
}

// Calls f(pointer to the window's pixel) for the pixels of output position p inside the image; returns their number.
template <typename F>
int32_t for_window(const Pool& pool, const uint8_t* x, int64_t p, const F& f) {
  const int64_t column = p % pool.out_width, row = p / pool.out_width % pool.out_height;
  const uint8_t* image = x + p / (pool.out_width * pool.out_height) * pool.in_height * pool.in_width * pool.channels;
  int32_t inside = 0;
  for (int64_t kh = 0; kh < pool.kernel_height; ++kh) {
    const int64_t h = row * pool.stride_height - pool.pad_top + kh * pool.dilation_height;
    for (int64_t kw = 0; kw < pool.kernel_width; ++kw) {
      const int64_t w = column * pool.stride_width - pool.pad_left + kw * pool.dilation_width;
      if (h >= 0 && h < pool.in_height && w >= 0 && w < pool.in_width) {
        f(image + (h * pool.in_width + w) * pool.channels);
        ++inside;
      }
    }
  }
  return inside;
}

void average_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; ++c) {
      int32_t sum = 0;
      int32_t n = for_window(
          pool, x, p, [&](const uint8_t* pixel) { sum += code_at(pixel + c, pool.x.is_signed) - pool.x.zero_point; });
      if (pool.count_include_pad) {
        n = static_cast<int32_t>(pool.kernel_height * pool.kernel_width);
      }
      y[p * pool.channels + c] = byte_of(requantize(sum, average_multiplier(pool.x.scale, pool.y.scale, n), pool.y));
    }
  }
}

void max_pool(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; ++c) {
      int32_t largest = pool.x.is_signed ? -128 : 0;
      for_window(pool, x, p, [&](const uint8_t* pixel) {
        const int32_t code = code_at(pixel + c, pool.x.is_signed);
        largest = code > largest ? code : largest;
      });
      y[p * pool.channels + c] = byte_of(largest);
    }
  }
}

void add(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
         const CodeGrid& y_grid, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] =
        byte_of(added_code(code_at(a + i, a_grid.is_signed), a_grid, code_at(b + i, b_grid.is_signed), b_grid, y_grid));
  }
}

void lookup(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = table[x[i]];
  }
}

void quantize(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = byte_of(input_code(x[i], y_grid));
  }
}

void quantize_image(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) {
      y[p * channels + c] = byte_of(input_code(x[c * pixels + p], y_grid));
    }
  }
}

void dequantize(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = real_of(code_at(x + i, x_grid.is_signed), x_grid);
  }
}

}  // namespace

const KernelTable kKernels_scalar = {Isa::kScalar, packed_bytes, pack,   scratch_bytes, convolve,       average_pool,
                                     max_pool,     add,          lookup, quantize,      quantize_image, dequantize};

}  // namespace mixbit::runtime
