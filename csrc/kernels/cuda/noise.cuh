#pragma once

// Bodies of the noise kernels; see fake_quantize.cuh.

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// Candidates whose sums a thread holds in registers; more are done in further rounds over the block's elements.
constexpr int kCandidates = 8;

struct Candidate {
  float scale;
  float inverse;
  QuantRange range;
  bool valid;
};

__device__ inline Candidate load_candidate(const NoiseArguments& a, int64_t k, int64_t channel) {
  const float bits = a.bit_widths[k];
  Candidate c;
  c.scale = a.scales[a.per_channel ? k * a.channels + channel : k];
  c.inverse = 1.0f / c.scale;
  c.valid = is_valid_bit_width(bits) && !(a.is_signed && a.narrow_range && bits == 1.0f);
  c.range = quant_range(c.valid ? static_cast<int>(bits) : 8, a.is_signed, a.narrow_range);
  return c;
}

__device__ inline float candidate_error(const Candidate& c, float x) {
  if (!c.valid) {
    return NAN;
  }
  if (has_normal_inverse(c.scale)) {
    return quantization_error(x, c.scale, c.inverse, c.range, Rounding::kHalfEven);
  }
  return x - mixbit::fake_quantize(x, c.scale, 0.0f, c.range, Rounding::kHalfEven);
}

// grid: channels * blocks. partials: [channels, blocks, count + 1], the signal first.
template <typename T>
__global__ void quantization_noise_kernel(NoiseArguments a, int64_t blocks, const T* x, double* partials) {
  __shared__ double sums[kCandidates + 1][kThreads];
  const int64_t channel = blockIdx.x / blocks;
  const int64_t count = a.outer * a.inner;
  const int64_t first = (blockIdx.x % blocks) * kReduceBlock;
  const int64_t last = first + kReduceBlock < count ? first + kReduceBlock : count;
  double* out = partials + static_cast<int64_t>(blockIdx.x) * (a.count + 1);
  for (int64_t k = 0; k == 0 || k < a.count; k += kCandidates) {
    const int here = static_cast<int>(a.count - k < kCandidates ? a.count - k : kCandidates);
    Candidate candidates[kCandidates];
    for (int j = 0; j < here; ++j) {
      candidates[j] = load_candidate(a, k + j, channel);
    }
    float values[kCandidates + 1] = {};
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const int64_t at = ((i / a.inner) * a.channels + channel) * a.inner + i % a.inner;
      const float v = static_cast<float>(x[at]);
      values[kCandidates] = fmaf(v, v, values[kCandidates]);
      for (int j = 0; j < here; ++j) {
        const float error = candidate_error(candidates[j], v);
        values[j] = fmaf(error, error, values[j]);
      }
    }
    reduce_in_block(sums, values, here, out + 1 + k);
    if (k == 0 && threadIdx.x == 0) {
      out[0] = sums[kCandidates][0];
    }
    __syncthreads();
  }
}

// grid: blocks. partials: [blocks, 2].
template <typename T>
__global__ void noise_power_kernel(int64_t n, const T* x, const T* reference, double* partials) {
  __shared__ double sums[2][kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kReduceBlock;
  const int64_t last = first + kReduceBlock < n ? first + kReduceBlock : n;
  float values[2] = {};
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const float r = static_cast<float>(reference[i]);
    const float error = static_cast<float>(x[i]) - r;
    values[0] += r * r;
    values[1] += error * error;
  }
  reduce_in_block(sums, values, 2, partials + static_cast<int64_t>(blockIdx.x) * 2);
}

}  // namespace mixbit::kernels::cuda
