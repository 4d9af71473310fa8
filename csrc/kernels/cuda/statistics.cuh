#pragma once

// Bodies of the kernels that calibrate: moments, histograms, prefix sums and scale searches; see fake_quantize.cuh. All
// sums are made in a fixed order, so a calibration gives the same bits every time.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

struct RunningMoments {
  double min;
  double max;
  double sum;
  double squares;
};

// NaN on either side comes through.
__device__ inline double smaller(double a, double b) { return a < b || a != a ? a : b; }
__device__ inline double larger(double a, double b) { return a > b || a != a ? a : b; }
__device__ inline RunningMoments joined(const RunningMoments& a, const RunningMoments& b) {
  return {smaller(a.min, b.min), larger(a.max, b.max), a.sum + b.sum, a.squares + b.squares};
}

// grid: channels * blocks. partials: [channels, blocks, 4].
template <typename T>
__global__ void moments_kernel(int64_t outer, int64_t channels, int64_t inner, int64_t blocks, const T* x, bool aligned,
                               double* partials) {
  __shared__ RunningMoments all[kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  float sum = 0.0f;
  float squares = 0.0f;
  RunningMoments own{INFINITY, -INFINITY, 0.0, 0.0};
  for_each_pack<T>(block_part(outer, channels, inner, blocks, block), aligned, [&](const auto& at, int n, bool whole) {
    const Pack<T> pack = read_pack(x, at, n, whole);
    for (int j = 0; j < n; ++j) {
      const float v = static_cast<float>(pack.v[j]);
      own.min = smaller(v, own.min);
      own.max = larger(v, own.max);
      sum += v;
      squares += v * v;
    }
  });
  own.sum = sum;
  own.squares = squares;
  all[threadIdx.x] = own;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      all[threadIdx.x] = joined(all[threadIdx.x], all[threadIdx.x + half]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    double* out = partials + block * 4;
    out[0] = all[0].min;
    out[1] = all[0].max;
    out[2] = all[0].sum;
    out[3] = all[0].squares;
  }
}

// One thread a channel. moments: [channels, 4].
__global__ void join_moments_kernel(const double* partials, int64_t channels, int64_t blocks, double* moments) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= channels) {
    return;
  }
  RunningMoments all{INFINITY, -INFINITY, 0.0, 0.0};
  for (int64_t b = 0; b < blocks; ++b) {
    const double* part = partials + (c * blocks + b) * 4;
    all = joined({part[0], part[1], part[2], part[3]}, all);
  }
  double* out = moments + c * 4;
  out[0] = all.min;
  out[1] = all.max;
  out[2] = all.sum;
  out[3] = all.squares;
}

__device__ inline bool finite_range(double low, double high) {
  return low - low == 0.0 && high - high == 0.0;  // NaN for NaN and infinities
}
__device__ inline double largest_magnitude(double low, double high) {
  const double a = low < 0.0 ? -low : low;
  const double b = high < 0.0 ? -high : high;
  return a > b ? a : b;
}

// The first of n sorted values whose bin is at least `bin`.
__device__ inline int64_t first_of_bin(const float* sorted, int64_t n, int64_t bin, double range, int64_t bins) {
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (histogram_bin(static_cast<double>(sorted[middle]), range, bins) < bin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// grid: channels * bins. The elements of a bin lie side by side in a sorted row.
__global__ void histogram_kernel(int64_t n, const float* sorted, const double* moments, int64_t bins,
                                 double* histogram) {
  __shared__ double sums[2][kThreads];
  const int64_t channel = blockIdx.x / bins;
  const int64_t bin = blockIdx.x % bins;
  const float* row = sorted + channel * n;
  const double low = moments[channel * 4];
  const double high = moments[channel * 4 + 1];
  double* out = histogram + channel * 3 * bins + bin;
  int64_t first = 0;
  int64_t last = 0;
  if (n > 0 && finite_range(low, high)) {
    const double range = histogram_range(largest_magnitude(low, high));
    first = first_of_bin(row, n, bin, range, bins);
    last = bin + 1 == bins ? n : first_of_bin(row, n, bin + 1, range, bins);
  }
  double values[2] = {0.0, 0.0};
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const auto v = static_cast<double>(row[i]);
    values[0] += v;
    values[1] += v * v;
  }
  double result[2] = {0.0, 0.0};
  reduce_in_block(sums, values, 2, result);
  if (threadIdx.x == 0) {
    out[0] = static_cast<double>(last - first);
    out[bins] = result[0];
    out[2 * bins] = result[1];
  }
}

// grid: channels * blocks. Sums of each block of a row, and of its squares; partials: [channels, blocks, 2].
__global__ void row_sums_kernel(int64_t n, int64_t blocks, const float* values, double* partials) {
  __shared__ double sums[2][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const BlockPart part = block_part(1, 1, n, blocks, block);
  const float* row = values + (block / blocks) * n;
  double own[2] = {0.0, 0.0};
  for (int64_t i = part.first + threadIdx.x; i < part.last; i += kThreads) {
    const auto v = static_cast<double>(row[i]);
    own[0] += v;
    own[1] += v * v;
  }
  reduce_in_block(sums, own, 2, partials + block * 2);
}

// grid: channels * blocks. prefix: [channels, n + 1]. A thread owns consecutive elements, its start is the sum of the
// blocks and threads before it.
__global__ void prefix_sums_kernel(int64_t n, int64_t blocks, const float* values, const double* partials,
                                   double* prefix) {
  __shared__ double starts[kThreads + 1];
  constexpr int64_t kOwn = kReduceBlock / kThreads;
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t channel = block / blocks;
  const BlockPart part = block_part(1, 1, n, blocks, block);
  const float* row = values + channel * n;
  double* out = prefix + channel * (n + 1);
  const int64_t first = part.first + static_cast<int64_t>(threadIdx.x) * kOwn;
  double sum = 0.0;
  for (int64_t i = first; i < part.last && i < first + kOwn; ++i) {
    sum += static_cast<double>(row[i]);
  }
  starts[threadIdx.x + 1] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    starts[0] = 0.0;
    for (int64_t b = 0; b < block % blocks; ++b) {
      starts[0] += partials[(channel * blocks + b) * 2];
    }
    for (int t = 1; t <= kThreads; ++t) {
      starts[t] += starts[t - 1];
    }
    if (block % blocks == 0) {
      out[0] = 0.0;
    }
  }
  __syncthreads();
  double running = starts[threadIdx.x];
  for (int64_t i = first; i < part.last && i < first + kOwn; ++i) {
    running += static_cast<double>(row[i]);
    out[i + 1] = running;
  }
}

// One thread: a histogram has few bins.
__global__ void histogram_starts_kernel(HistogramRow row) {
  if (blockIdx.x > 0 || threadIdx.x > 0) {
    return;
  }
  Below last{0.0, 0.0};
  double squares = 0.0;
  row.starts[0] = last;
  for (int64_t i = 0; i < row.bins; ++i) {
    last = {last.count + row.histogram[i], last.sum + row.histogram[row.bins + i]};
    row.starts[i + 1] = last;
    squares += row.histogram[2 * row.bins + i];
  }
  *row.squares = squares;
}

// The data of a channel: a view for the formulas of common/scale_search.h, the largest value, whether all are finite.
__device__ inline SortedView view_of(const SortedRows& rows, int64_t c) {
  return {rows.values + c * rows.n, rows.prefix + c * (rows.n + 1), rows.n, rows.squares[c]};
}
__device__ inline HistogramView view_of(const HistogramRow& row, int64_t) {
  return {row.histogram,
          row.histogram + row.bins,
          row.starts,
          row.bins,
          histogram_range(largest_magnitude(*row.low, *row.high)),
          *row.squares};
}
// Sorted upwards, NaN come last.
__device__ inline double low_of(const SortedRows& rows, int64_t c) {
  return rows.n > 0 ? rows.values[c * rows.n] : 0.0;
}
__device__ inline double high_of(const SortedRows& rows, int64_t c) {
  return rows.n > 0 ? rows.values[(c + 1) * rows.n - 1] : 0.0;
}
__device__ inline double low_of(const HistogramRow& row, int64_t) { return *row.low; }
__device__ inline double high_of(const HistogramRow& row, int64_t) { return *row.high; }

__device__ inline bool valid_width(const SearchArguments& a, float bits) {
  return is_valid_bit_width(bits) && !(a.is_signed && a.narrow_range && bits == 1.0f);
}
template <typename Data>
__device__ inline double largest_of(const SearchArguments& a, const Data& data, int64_t c) {
  const double high = high_of(data, c);
  return a.is_signed ? largest_magnitude(low_of(data, c), high) : high;
}

// The error of one scale, levels spread over the threads of a block. Every thread must call it; thread 0 gets the sum.
template <typename View>
__device__ inline double error_in_block(const View& view, double scale, QuantRange range, double (&sums)[1][kThreads]) {
  const auto first = static_cast<int64_t>(range.quant_min);
  const auto last = static_cast<int64_t>(range.quant_max);
  double own[1] = {0.0};
  for (int64_t q = first + threadIdx.x; q <= last; q += kThreads) {
    const Below low = q == first ? Below{0.0, 0.0} : below_level(view, q - 1, last, scale);
    own[0] += level_error(q, scale, low, below_level(view, q, last, scale));
  }
  double sum = 0.0;
  reduce_in_block(sums, own, 1, &sum);
  return view.sum_squares() + sum;
}

// grid: count * channels * kScaleCandidates. errors: [count, channels, kScaleCandidates].
template <typename Data>
__global__ void candidate_errors_kernel(SearchArguments a, Data data, double* errors) {
  __shared__ double sums[1][kThreads];
  const int candidate = static_cast<int>(blockIdx.x % kScaleCandidates);
  const int64_t channel = blockIdx.x / kScaleCandidates % a.channels;
  const float bits = a.bit_widths[blockIdx.x / kScaleCandidates / a.channels];
  const double largest = largest_of(a, data, channel);
  const bool usable =
      valid_width(a, bits) && finite_range(low_of(data, channel), high_of(data, channel)) && largest > 0.0;
  const QuantRange range = quant_range(usable ? static_cast<int>(bits) : 8, a.is_signed, a.narrow_range);
  if (!usable || !(range.quant_max > 0.0f)) {
    return;  // the whole block: pick_scales_kernel knows these cases
  }
  const double scale = scale_candidate(candidate) * largest / static_cast<double>(range.quant_max);
  const double error = error_in_block(view_of(data, channel), scale, range, sums);
  if (threadIdx.x == 0) {
    errors[blockIdx.x] = error;
  }
}

// One thread a scale. scales: [count, channels]: the candidate of least error, of equal ones the largest; 1 where
// nothing is positive, NaN where the data or the width is not usable.
template <typename Data>
__global__ void pick_scales_kernel(SearchArguments a, Data data, const double* errors, float* scales) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= a.count * a.channels) {
    return;
  }
  const int64_t channel = at % a.channels;
  const float bits = a.bit_widths[at / a.channels];
  const double largest = largest_of(a, data, channel);
  if (!valid_width(a, bits) || (a.is_signed && bits == 1.0f) ||
      !finite_range(low_of(data, channel), high_of(data, channel))) {
    scales[at] = NAN;
    return;
  }
  if (!(largest > 0.0)) {
    scales[at] = 1.0f;
    return;
  }
  int best = kScaleCandidates - 1;
  for (int i = kScaleCandidates - 2; i >= 0; --i) {
    if (errors[at * kScaleCandidates + i] < errors[at * kScaleCandidates + best]) {
      best = i;
    }
  }
  const QuantRange range = quant_range(static_cast<int>(bits), a.is_signed, a.narrow_range);
  const auto scale = static_cast<float>(scale_candidate(best) * largest / static_cast<double>(range.quant_max));
  scales[at] = scale > 0.0f ? scale : 1e-45f;  // the smallest positive float, as on the CPU
}

// grid: count. noise: [count], of given scales.
template <typename Data>
__global__ void given_errors_kernel(SearchArguments a, Data data, const float* given, double* noise) {
  __shared__ double sums[1][kThreads];
  const float bits = a.bit_widths[blockIdx.x];
  if (!valid_width(a, bits) || !finite_range(low_of(data, 0), high_of(data, 0))) {
    if (threadIdx.x == 0) {
      noise[blockIdx.x] = NAN;
    }
    return;
  }
  const double error = error_in_block(view_of(data, 0), static_cast<double>(given[blockIdx.x]),
                                      quant_range(static_cast<int>(bits), a.is_signed, a.narrow_range), sums);
  if (threadIdx.x == 0) {
    noise[blockIdx.x] = error;
  }
}

}  // namespace mixbit::kernels::cuda
