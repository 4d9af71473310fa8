#pragma once

// Runs the bodies of CUDA kernels on the host: include this before a .cuh. The threads of a block are fibers that take
// turns from barrier to barrier, blocks run one after the other, so shared memory can be static. What this cannot show
// is a missing barrier between threads of one warp, or anything about speed.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include <mixbit/common/half.h>

#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() simt::barrier()

namespace simt {

struct Index {
  unsigned x = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> body;

inline void barrier() { swapcontext(&fibers[current].context, &scheduler); }

inline void enter() {
  body();
  fibers[current].done = true;
  barrier();
}

}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// kernel<<<blocks, threads>>>(arguments...). Throws where some threads of a block wait at a barrier that others, having
// returned, will never reach.
template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, unsigned threads, Kernel kernel, Arguments... arguments) {
  constexpr size_t kStack = size_t{128} << 10;
  gridDim.x = blocks;
  blockDim.x = threads;
  body = [&] { kernel(arguments...); };
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    if (fiber.stack == nullptr) fiber.stack = std::make_unique<char[]>(kStack);
  }
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      makecontext(&fiber.context, enter, 0);
    }
    unsigned done = 0;
    while (done == 0) {
      for (current = 0; current < threads; ++current) {
        threadIdx.x = current;
        swapcontext(&scheduler, &fibers[current].context);
        done += fibers[current].done ? 1u : 0u;
      }
    }
    if (done != threads) throw std::logic_error("threads of a block have parted at a barrier");
  }
}

// The 16-bit types of CUDA, with the conversions of common/half.h.
struct Half {
  uint16_t bits;
  Half() = default;
  explicit Half(float v) : bits(mixbit::float_to_half(v)) {}
  explicit operator float() const { return mixbit::half_to_float(bits); }
};
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float v) : bits(mixbit::float_to_bfloat16(v)) {}
  explicit operator float() const { return mixbit::bfloat16_to_float(bits); }
};

}  // namespace simt
