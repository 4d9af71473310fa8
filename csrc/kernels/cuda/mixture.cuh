#pragma once

// Bodies of the kernels of gated_fake_quantize and mixture_fake_quantize; see fake_quantize.cuh.

#include <cstdint>

#include <mixbit/common/gates.h>
#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// kCount grids known at compile time live in registers; 0 stands for any number.
template <int kCount>
constexpr int kGridSlots = kCount > 0 ? kCount : kMaxBitWidth;

// The grids of one channel and what they contribute to one sample, read from device memory.
template <int kCount>
struct Grids {
  float scale[kGridSlots<kCount>];
  float ratio[kGridSlots<kCount>];
  float weight[kGridSlots<kCount>];
  QuantRange range[kGridSlots<kCount>];
  bool valid;  // of all bit-widths

  __device__ int count(const MixtureArguments& a) const { return kCount > 0 ? kCount : static_cast<int>(a.count); }

  __device__ Grids(const MixtureArguments& a, int64_t sample, int64_t channel) : valid(true) {
    const bool is_mixture = a.form == MixtureForm::kMixture;
    float open = 1.0f;
    for (int k = 0; k < count(a); ++k) {
      const float given = is_mixture ? a.bit_widths[k] : static_cast<float>(a.precisions[k]);
      valid = valid && is_valid_bit_width(given);
      const int bits = is_valid_bit_width(given) ? static_cast<int>(given) : 8;
      range[k] = quant_range(bits, a.is_signed, false);
      ratio[k] = k == 0 ? 0.0f : grid_ratio(range[k], range[k - 1]);
      if (is_mixture) {
        scale[k] = a.scales[a.per_channel ? k * a.channels + channel : k];
        weight[k] = a.weights[k];
      } else {
        scale[k] = gated_step(a.scales[a.per_channel ? channel + sample * a.scale_stride : 0], bits, a.is_signed);
        // gate_shares, with the gates of a sample `gate_stride` apart
        const float next = k + 1 < count(a) ? open * a.weights[k * a.gate_stride + sample] : 0.0f;
        weight[k] = open - next;
        open = next;
      }
    }
  }

  // f(k, level, code) for the levels of x on each grid.
  template <typename F>
  __device__ void for_each_level(const MixtureArguments& a, float x, const F& f) const {
    float code = 0.0f;
    float level = 0.0f;
    for (int k = 0; k < count(a); ++k) {
      code = a.form == MixtureForm::kGatedResidual && k > 0
                 ? residual_code(x, code, level, ratio[k], scale[k], range[k])
                 : level_code(x, scale[k], range[k]);
      level = code * scale[k];
      f(k, level, code);
    }
  }
};

// The part of sample `sample` that a block owns: grid = samples * channels * blocks (of one channel of a sample).
struct SamplePart {
  int64_t sample;
  BlockPart part;
  int64_t offset;  // of the sample
  bool aligned;

  __device__ SamplePart(const MixtureArguments& a, int64_t blocks, bool tensor_aligned, int pack)
      : sample(static_cast<int64_t>(blockIdx.x) / (a.channels * blocks)),
        part(
            block_part(a.outer, a.channels, a.inner, blocks, static_cast<int64_t>(blockIdx.x) % (a.channels * blocks))),
        offset(sample * a.outer * a.channels * a.inner),
        aligned(tensor_aligned && (a.samples == 1 || a.outer * a.channels * a.inner % pack == 0)) {}
};

template <typename T, int kCount>
__global__ void mixture_kernel(MixtureArguments a, int64_t blocks, const T* x, T* y, bool tensor_aligned) {
  const SamplePart own(a, blocks, tensor_aligned, Pack<T>::kSize);
  const Grids<kCount> grids(a, own.sample, own.part.channel);
  for_each_pack<T>(own.part, own.aligned, [&](const auto& at, int n, bool whole) {
    Pack<T> pack = read_pack(x + own.offset, at, n, whole);
    for (int j = 0; j < n; ++j) {
      float sum = 0.0f;
      grids.for_each_level(a, static_cast<float>(pack.v[j]), [&](int k, float level, float) {
        sum = k == 0 ? grids.weight[k] * level : sum + grids.weight[k] * level;
      });
      pack.v[j] = static_cast<T>(grids.valid ? sum : NAN);
    }
    write_pack(y + own.offset, at, n, whole, pack);
  });
}

// partials: [samples, channels, blocks, level_count + step_count], see MixtureArguments.
template <typename T, int kCount>
__global__ void mixture_backward_kernel(MixtureArguments a, int64_t blocks, const T* grad, const T* x, T* dx,
                                        bool tensor_aligned, double* partials) {
  constexpr int kSlots = kGridSlots<kCount>;
  __shared__ double sums[kSlots][kThreads];
  const SamplePart own(a, blocks, tensor_aligned, Pack<T>::kSize);
  const Grids<kCount> grids(a, own.sample, own.part.channel);
  const bool is_mixture = a.form == MixtureForm::kMixture;
  const int last = grids.count(a) - 1;
  float levels[kSlots] = {};
  float steps[kSlots] = {};
  for_each_pack<T>(own.part, own.aligned, [&](const auto& at, int n, bool whole) {
    const Pack<T> gs = read_pack(grad + own.offset, at, n, whole);
    Pack<T> pack = read_pack(x + own.offset, at, n, whole);
    for (int j = 0; j < n; ++j) {
      const float g = static_cast<float>(gs.v[j]);
      const float value = static_cast<float>(pack.v[j]);
      float weight = 0.0f;  // of the grids around x
      float before = 0.0f;
      grids.for_each_level(a, value, [&](int k, float level, float code) {
        if (is_mixture) {
          levels[k] = fmaf(g, level, levels[k]);
        } else if (k > 0) {
          levels[k - 1] = fmaf(g, level - before, levels[k - 1]);
        }
        before = level;
        if (is_mixture || k == last) {
          float& sum = steps[is_mixture ? k : 0];
          sum = fmaf(g, step_gradient(value, code, grids.scale[k], grids.range[k]), sum);
          if (is_inside(value, grids.scale[k], 0.0f, grids.range[k])) {
            weight = is_mixture ? weight + grids.weight[k] : 1.0f;
          }
        }
      });
      const float result = is_mixture ? weight * g : (weight != 0.0f ? g : 0.0f);
      pack.v[j] = static_cast<T>(grids.valid ? result : NAN);
    }
    if (dx != nullptr) {
      write_pack(dx + own.offset, at, n, whole, pack);
    }
  });
  if (!grids.valid) {
    for (int k = 0; k <= last; ++k) {
      levels[k] = steps[k] = NAN;
    }
  }
  const int level_count = static_cast<int>(a.level_count());
  const int step_count = static_cast<int>(a.step_count());
  double* out = partials + static_cast<int64_t>(blockIdx.x) * (level_count + step_count);
  reduce_in_block(sums, levels, level_count, out);
  reduce_in_block(sums, steps, step_count, out + level_count);
}

// dgates: [count - 1, samples] from sums [count - 1, samples]; one thread a sample.
__global__ void gate_gradients_kernel(const double* sums, const float* gates, int64_t samples, int64_t count,
                                      float* dgates) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (sample < samples) {
    gate_gradients(sums + sample, gates + sample, samples, count, dgates + sample);
  }
}

}  // namespace mixbit::kernels::cuda
