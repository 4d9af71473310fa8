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

// Block `block` of channels * blocks; partials: [channels, blocks, count + 1], the signal first.
template <typename T>
__device__ inline void quantization_noise_block(const NoiseArguments& a, int64_t blocks, int64_t block, const T* x,
                                                bool aligned, double (&sums)[kCandidates + 1][kThreads],
                                                double* partials) {
  const BlockPart part = block_part(a.outer, a.channels, a.inner, blocks, block);
  double* out = partials + block * (a.count + 1);
  for (int64_t k = 0; k == 0 || k < a.count; k += kCandidates) {
    const int here = static_cast<int>(a.count - k < kCandidates ? a.count - k : kCandidates);
    Candidate candidates[kCandidates];
    for (int j = 0; j < here; ++j) {
      candidates[j] = load_candidate(a, k + j, part.channel);
    }
    float values[kCandidates + 1] = {};
    for_each_pack<T>(part, aligned, [&](const auto& at, int n, bool whole) {
      const Pack<T> pack = read_pack(x, at, n, whole);
      for (int e = 0; e < n; ++e) {
        const float v = static_cast<float>(pack.v[e]);
        values[kCandidates] = fmaf(v, v, values[kCandidates]);
        for (int j = 0; j < here; ++j) {
          const float error = candidate_error(candidates[j], v);
          values[j] = fmaf(error, error, values[j]);
        }
      }
    });
    reduce_in_block(sums, values, here, out + 1 + k);
    if (k == 0 && threadIdx.x == 0) {
      out[0] = sums[kCandidates][0];
    }
    __syncthreads();
  }
}

// grid: channels * blocks.
template <typename T>
__global__ void quantization_noise_kernel(NoiseArguments a, int64_t blocks, const T* x, bool aligned,
                                          double* partials) {
  __shared__ double sums[kCandidates + 1][kThreads];
  quantization_noise_block(a, blocks, static_cast<int64_t>(blockIdx.x), x, aligned, sums, partials);
}

// Many tensors in one launch, as in fake_quantize_list_kernel.
template <typename T>
__global__ void quantization_noise_list_kernel(const NoiseEntry* entries, int64_t count) {
  __shared__ double sums[kCandidates + 1][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const NoiseEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  quantization_noise_block(e.arguments, e.blocks, block - e.first_block, static_cast<const T*>(e.x), e.aligned, sums,
                           e.partials);
}

// One thread a sum of any tensor: the signals of its channels, then the noises [count, channels].
__global__ void add_noise_list_kernel(const NoiseEntry* entries, int64_t count, int64_t total) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < total) {
    const NoiseEntry& e = entries[find_entry(count, at, [&](int64_t i) { return entries[i].first_sum; })];
    const int64_t channels = e.arguments.channels;
    const int64_t own = at - e.first_sum;
    const double sum = sum_of_blocks(e.partials, own % channels, e.blocks, e.arguments.count + 1, own / channels);
    (own < channels ? e.signal[own] : e.noise[own - channels]) = sum;
  }
}

// grid: blocks. partials: [blocks, 2].
template <typename T>
__global__ void noise_power_kernel(int64_t n, const T* x, const T* reference, bool aligned, double* partials) {
  __shared__ double sums[2][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const BlockPart part = block_part(1, 1, n, static_cast<int64_t>(gridDim.x), block);
  float values[2] = {};
  for_each_pack<T>(part, aligned, [&](const auto& at, int count, bool whole) {
    const Pack<T> xs = read_pack(x, at, count, whole);
    const Pack<T> references = read_pack(reference, at, count, whole);
    for (int j = 0; j < count; ++j) {
      const float r = static_cast<float>(references.v[j]);
      const float error = static_cast<float>(xs.v[j]) - r;
      values[0] += r * r;
      values[1] += error * error;
    }
  });
  reduce_in_block(sums, values, 2, partials + block * 2);
}

}  // namespace mixbit::kernels::cuda
