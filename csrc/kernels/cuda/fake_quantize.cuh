#pragma once

// Bodies of the fake_quantize kernels. Host code may compile them too (threadIdx, blockIdx, __syncthreads supplied).

#include <cstdint>

#include <mixbit/kernels/cuda.h>

#include "reduce.cuh"

namespace mixbit::kernels::cuda {

// One parameter set of a channel, read from device memory.
struct ChannelQuantizer {
  float scale;
  float zero_point;
  QuantRange range;
  bool valid;
};

__device__ inline ChannelQuantizer load_channel(const QuantizeArguments& a, int64_t channel) {
  const float bits = a.bit_width[a.bit_width_count == 1 ? 0 : channel];
  ChannelQuantizer c;
  c.scale = a.scale[a.scale_count == 1 ? 0 : channel];
  c.zero_point = a.zero_point[a.zero_point_count == 1 ? 0 : channel];
  c.valid = is_valid_bit_width(bits) && !(a.is_signed && a.narrow_range && bits == 1.0f);
  c.range = quant_range(c.valid ? static_cast<int>(bits) : 8, a.is_signed, a.narrow_range);
  return c;
}

template <typename T>
__device__ inline T fake_quantize_element(const QuantizeArguments& a, const ChannelQuantizer& c, T x) {
  const float y = mixbit::fake_quantize(static_cast<float>(x), c.scale, c.zero_point, c.range, a.rounding);
  return static_cast<T>(c.valid ? y : NAN);
}

template <typename T>
__device__ inline FakeQuantizeGrad element_grad(const QuantizeArguments& a, const ChannelQuantizer& c, T grad, T x) {
  if (!c.valid) {
    return {NAN, NAN, NAN};
  }
  const auto g = static_cast<float>(grad);
  const auto value = static_cast<float>(x);
  return a.gradient == Gradient::kClip ? clip_grad(g, value, c.scale, c.zero_point, c.range)
                                       : fake_quantize_grad(g, value, c.scale, c.zero_point, c.range, a.rounding);
}

// Pack p of a tensor. Packs cross channels only where inner is not a multiple of a pack, so the channel is found anew
// per element there.
template <typename T>
__device__ inline void fake_quantize_pack(const QuantizeArguments& a, const T* x, T* y, bool aligned, int64_t p) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t numel = a.outer * a.channels * a.inner;
  const int64_t first = p * kSize;
  if (aligned && first + kSize <= numel) {
    Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + first);
    ChannelQuantizer c = load_channel(a, first / a.inner % a.channels);
    for (int i = 0; i < kSize; ++i) {
      if (i > 0 && a.channels > 1 && a.inner % kSize != 0) {
        c = load_channel(a, (first + i) / a.inner % a.channels);
      }
      pack.v[i] = fake_quantize_element(a, c, pack.v[i]);
    }
    *reinterpret_cast<Pack<T>*>(y + first) = pack;
  } else {
    for (int64_t i = first; i < numel && i < first + kSize; ++i) {
      y[i] = fake_quantize_element(a, load_channel(a, i / a.inner % a.channels), x[i]);
    }
  }
}

template <typename T>
__device__ inline int64_t pack_count(const QuantizeArguments& a) {
  return (a.outer * a.channels * a.inner + Pack<T>::kSize - 1) / Pack<T>::kSize;
}

template <typename T>
__global__ void fake_quantize_kernel(QuantizeArguments a, const T* x, T* y, bool aligned) {
  const int64_t packs = pack_count<T>(a);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; p < packs; p += step) {
    fake_quantize_pack(a, x, y, aligned, p);
  }
}

// Block `block` of channels * blocks (of one channel): a block owns kReduceBlock consecutive elements of its channel.
template <typename T>
__device__ inline void fake_quantize_backward_block(const QuantizeArguments& a, int64_t blocks, int64_t block,
                                                    const T* grad, const T* x, T* dx, bool aligned,
                                                    double (&sums)[2][kThreads], double* partials) {
  const BlockPart part = block_part(a.outer, a.channels, a.inner, blocks, block);
  const ChannelQuantizer c = load_channel(a, part.channel);
  float values[2] = {0.0f, 0.0f};
  for_each_pack<T>(part, aligned, [&](const auto& at, int n, bool whole) {
    const Pack<T> gs = read_pack(grad, at, n, whole);
    Pack<T> pack = read_pack(x, at, n, whole);
    for (int j = 0; j < n; ++j) {
      const FakeQuantizeGrad g = element_grad(a, c, gs.v[j], pack.v[j]);
      pack.v[j] = static_cast<T>(g.dx);
      values[0] += g.dscale;
      values[1] += g.dzero_point;
    }
    if (dx != nullptr) {
      write_pack(dx, at, n, whole, pack);
    }
  });
  reduce_in_block(sums, values, 2, partials + block * 2);
}

// grid: channels * blocks.
template <typename T>
__global__ void fake_quantize_backward_kernel(QuantizeArguments a, int64_t blocks, const T* grad, const T* x, T* dx,
                                              bool aligned, double* partials) {
  __shared__ double sums[2][kThreads];
  fake_quantize_backward_block(a, blocks, static_cast<int64_t>(blockIdx.x), grad, x, dx, aligned, sums, partials);
}

// Many tensors in one launch: a block finds its tensor by the entries' first_block. Tensors without elements have no
// blocks.
template <typename T>
__global__ void fake_quantize_list_kernel(const QuantizeEntry* entries, int64_t count) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  const QuantizeEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  constexpr int64_t kPacks = kReduceBlock / Pack<T>::kSize;
  const int64_t first = (block - e.first_block) * kPacks;
  const int64_t packs = pack_count<T>(e.arguments);
  for (int64_t p = first + threadIdx.x; p < packs && p < first + kPacks; p += kThreads) {
    fake_quantize_pack(e.arguments, static_cast<const T*>(e.x), static_cast<T*>(e.y), e.aligned, p);
  }
}

template <typename T>
__global__ void fake_quantize_backward_list_kernel(const QuantizeEntry* entries, int64_t count) {
  __shared__ double sums[2][kThreads];
  const auto block = static_cast<int64_t>(blockIdx.x);
  const QuantizeEntry& e = entries[find_entry(count, block, [&](int64_t i) { return entries[i].first_block; })];
  fake_quantize_backward_block(e.arguments, e.blocks, block - e.first_block, static_cast<const T*>(e.grad),
                               static_cast<const T*>(e.x), static_cast<T*>(e.y), e.aligned, sums, e.partials);
}

// One thread a channel of any tensor.
__global__ void add_list_kernel(const QuantizeEntry* entries, int64_t count, int64_t channels) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < channels) {
    const QuantizeEntry& e = entries[find_entry(count, at, [&](int64_t i) { return entries[i].first_channel; })];
    const int64_t channel = at - e.first_channel;
    e.dscale[channel] = static_cast<float>(sum_of_blocks(e.partials, channel, e.blocks, 2, 0));
    e.dzero_point[channel] = static_cast<float>(sum_of_blocks(e.partials, channel, e.blocks, 2, 1));
  }
}

// A thread a byte of the mask: eight elements of one row.
template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T>
__global__ void fake_quantize_mask_kernel(QuantizeArguments a, const T* x, T* y, uint8_t* mask, bool aligned) {
  const int64_t row_bytes = (a.inner + 7) / 8;
  const int64_t bytes = a.outer * a.channels * row_bytes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; m < bytes; m += step) {
    const int64_t row = m / row_bytes;
    const int64_t in_row = (m % row_bytes) * 8;
    const int64_t first = row * a.inner + in_row;
    const int count = static_cast<int>(a.inner - in_row < 8 ? a.inner - in_row : 8);
    const ChannelQuantizer c = load_channel(a, row % a.channels);
    // Rows of a multiple of eight elements start where a vector may start.
    const bool whole = aligned && a.inner % 8 == 0;
    Eight<T> pack;
    if (whole) {
      pack = *reinterpret_cast<const Eight<T>*>(x + first);
    } else {
      for (int i = 0; i < count; ++i) {
        pack.v[i] = x[first + i];
      }
    }
    unsigned bits = 0;
    for (int i = 0; i < count; ++i) {
      const auto value = static_cast<float>(pack.v[i]);
      const bool inside = a.gradient == Gradient::kClip ? is_unclipped(value, c.scale, c.zero_point, c.range)
                                                        : is_inside(value, c.scale, c.zero_point, c.range);
      bits |= inside ? 1u << i : 0u;
      pack.v[i] = fake_quantize_element(a, c, pack.v[i]);
    }
    mask[m] = static_cast<uint8_t>(bits);
    if (whole) {
      *reinterpret_cast<Eight<T>*>(y + first) = pack;
    } else {
      for (int i = 0; i < count; ++i) {
        y[first + i] = pack.v[i];
      }
    }
  }
}

template <typename T>
__global__ void apply_mask_kernel(int64_t rows, int64_t inner, const T* grad, const uint8_t* mask, T* dx,
                                  bool aligned) {
  const int64_t row_bytes = (inner + 7) / 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; m < rows * row_bytes; m += step) {
    const int64_t in_row = (m % row_bytes) * 8;
    const int64_t first = (m / row_bytes) * inner + in_row;
    const int count = static_cast<int>(inner - in_row < 8 ? inner - in_row : 8);
    const unsigned bits = mask[m];
    if (aligned && inner % 8 == 0) {
      Eight<T> pack = *reinterpret_cast<const Eight<T>*>(grad + first);
      for (int i = 0; i < 8; ++i) {
        pack.v[i] = (bits >> i & 1u) != 0 ? pack.v[i] : static_cast<T>(0.0f);
      }
      *reinterpret_cast<Eight<T>*>(dx + first) = pack;
    } else {
      for (int i = 0; i < count; ++i) {
        dx[first + i] = (bits >> i & 1u) != 0 ? grad[first + i] : static_cast<T>(0.0f);
      }
    }
  }
}

}  // namespace mixbit::kernels::cuda
