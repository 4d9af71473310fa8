#pragma once

// Element-wise kernels and pools for any vector V. Each instruction set includes its own copy (internal linkage).

#include <cstdint>

#include <mixbit/runtime/kernels.h>

namespace mixbit::runtime {
namespace {

template <typename V>
inline typename V::Float reals_of(typename V::Int codes, const CodeGrid& grid) {
  return V::mul(V::to_float(V::sub32(codes, V::all32(grid.zero_point))), V::all_float(grid.scale));
}

// code_of of each value.
template <typename V>
inline typename V::Int codes_of(typename V::Float v, const CodeGrid& y) {
  v = V::max(v, V::all_float(static_cast<float>(y.low - y.zero_point)));
  v = V::min(v, V::all_float(static_cast<float>(y.high - y.zero_point)));
  return V::add32(V::to_int(v), V::all32(y.zero_point));
}

template <typename V>
void add_codes(const uint8_t* a, const CodeGrid& a_grid, const uint8_t* b, const CodeGrid& b_grid, uint8_t* y,
               const CodeGrid& y_grid, int64_t n) {
  constexpr int64_t kLanes = V::kBytes / 4;
  const typename V::Float scale = V::all_float(y_grid.scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const typename V::Float sum = V::add(reals_of<V>(V::load_codes(a + i, n - i, a_grid.is_signed), a_grid),
                                         reals_of<V>(V::load_codes(b + i, n - i, b_grid.is_signed), b_grid));
    V::store_codes(y + i, n - i, codes_of<V>(V::div(sum, scale), y_grid));
  }
}

template <typename V>
void quantize_values(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t n) {
  constexpr int64_t kLanes = V::kBytes / 4;
  const typename V::Float scale = V::all_float(y_grid.scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    V::store_codes(y + i, n - i, codes_of<V>(V::div(V::load_floats_first(x + i, n - i), scale), y_grid));
  }
}

// Four channels at a time, a run of pixels of each; then interleaved.
template <typename V>
void quantize_planes(const float* x, uint8_t* y, const CodeGrid& y_grid, int64_t channels, int64_t pixels) {
  constexpr int64_t kRun = 256;
  if (channels == 1) {
    quantize_values<V>(x, y, y_grid, pixels);
    return;
  }
  uint8_t codes[4][kRun];
  for (int64_t p = 0; p < pixels; p += kRun) {
    const int64_t run = pixels - p < kRun ? pixels - p : kRun;
    for (int64_t first = 0; first < channels; first += 4) {
      const int64_t count = channels - first < 4 ? channels - first : 4;
      for (int64_t c = 0; c < count; ++c) {
        quantize_values<V>(x + (first + c) * pixels + p, codes[c], y_grid, run);
      }
      uint8_t* to = y + p * channels + first;
      if (count == 3) {
        for (int64_t i = 0; i < run; ++i, to += channels) {
          to[0] = codes[0][i];
          to[1] = codes[1][i];
          to[2] = codes[2][i];
        }
        continue;
      }
      for (int64_t i = 0; i < run; ++i, to += channels) {
        for (int64_t c = 0; c < count; ++c) {
          to[c] = codes[c][i];
        }
      }
    }
  }
}

template <typename V>
void dequantize_codes(const uint8_t* x, const CodeGrid& x_grid, float* y, int64_t n) {
  constexpr int64_t kLanes = V::kBytes / 4;
  for (int64_t i = 0; i < n; i += kLanes) {
    V::store_floats_first(y + i, n - i, reals_of<V>(V::load_codes(x + i, n - i, x_grid.is_signed), x_grid));
  }
}

// Calls f(pixel) for the pixels of output position p that lie inside the image; returns their number.
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

template <typename V>
void average_windows(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  constexpr int64_t kLanes = V::kBytes / 4;
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; c += kLanes) {
      typename V::Int sum = V::zero();
      int32_t n = for_window(pool, x, p, [&](const uint8_t* pixel) {
        sum = V::add32(sum, V::load_codes(pixel + c, pool.channels - c, pool.x.is_signed));
      });
      sum = V::sub32(sum, V::all32(n * pool.x.zero_point));
      if (pool.count_include_pad) {
        n = static_cast<int32_t>(pool.kernel_height * pool.kernel_width);
      }
      const typename V::Float multiplier = V::all_float(average_multiplier(pool.x.scale, pool.y.scale, n));
      V::store_codes(y + p * pool.channels + c, pool.channels - c,
                     codes_of<V>(V::mul(V::to_float(sum), multiplier), pool.y));
    }
  }
}

template <typename V>
void largest_of_windows(const Pool& pool, const uint8_t* x, uint8_t* y, int64_t first, int64_t last) {
  const typename V::Int lowest = V::all8(pool.x.is_signed ? 0x80 : 0);
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < pool.channels; c += V::kBytes) {
      typename V::Int largest = lowest;
      for_window(pool, x, p, [&](const uint8_t* pixel) {
        const typename V::Int codes = V::load_first(pixel + c, pool.channels - c);
        largest = pool.x.is_signed ? V::max_signed8(largest, codes) : V::max_unsigned8(largest, codes);
      });
      V::store_first(y + p * pool.channels + c, pool.channels - c, largest);
    }
  }
}

// Sixteen shuffles, one for each upper half of an index.
template <typename V>
void look_up(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += V::kBytes) {
    const typename V::Int index = V::load_first(x + i, n - i);
    typename V::Int result = V::zero();
    for (int r = 0; r < 16; ++r) {
      // The shuffle yields 0 where the top bit is set: here wherever the upper half of the index is not r.
      const typename V::Int own = V::exclusive_or(index, V::all8(static_cast<uint8_t>(r << 4)));
      const typename V::Int here = V::add_saturated_unsigned8(own, V::all8(0x70));
      result = V::bit_or(result, V::shuffle8(V::repeat16(table + 16 * r), here));
    }
    V::store_first(y + i, n - i, result);
  }
}

}  // namespace
}  // namespace mixbit::runtime
