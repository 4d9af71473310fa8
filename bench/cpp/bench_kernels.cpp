// The CPU kernels without torch: nanoseconds an element and bytes a second for each instruction set, sizes from the
// first cache to memory. Usage: bench_kernels [--benchmark_filter=REGEX] (Google Benchmark's options).

#include <benchmark/benchmark.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <mixbit/kernels/cpu.h>

namespace {

using mixbit::Rounding;
using mixbit::kernels::cpu::Isa;
using mixbit::kernels::cpu::KernelTable;
using mixbit::kernels::cpu::kReduceBlock;
using mixbit::kernels::cpu::Quantizer;
using mixbit::kernels::cpu::StorageType;

constexpr Quantizer kFourBits = {0.4f, 0.0f, {-8.0f, 7.0f}, Rounding::kHalfEven};

// Aligned memory with small numbers in it, in any storage type: the bit patterns of 0.25 ... 2.
struct Buffer {
  std::unique_ptr<void, decltype(&std::free)> data;

  Buffer(StorageType storage, int64_t n) : data(std::aligned_alloc(64, static_cast<size_t>(n) * 4 + 64), &std::free) {
    const float floats[4] = {0.25f, -0.5f, 1.0f, 2.0f};
    const uint16_t halves[2][4] = {{0x3400, 0xb800, 0x3c00, 0x4000}, {0x3e80, 0xbf00, 0x3f80, 0x4000}};
    for (int64_t i = 0; i < n; ++i) {
      if (storage == StorageType::kFloat32) {
        std::memcpy(static_cast<char*>(data.get()) + i * 4, &floats[i % 4], 4);
      } else {
        std::memcpy(static_cast<char*>(data.get()) + i * 2, &halves[storage == StorageType::kBFloat16][i % 4], 2);
      }
    }
  }
};

int64_t size_of(StorageType storage) { return storage == StorageType::kFloat32 ? 4 : 2; }

// Calls f(offset in elements, length) for the blocks that the ops hand to a kernel.
template <typename F>
void for_blocks(int64_t n, const F& f) {
  for (int64_t first = 0; first < n; first += kReduceBlock) {
    f(first, n - first < kReduceBlock ? n - first : kReduceBlock);
  }
}

void count(benchmark::State& state, int64_t elements, int64_t bytes_per_element) {
  state.SetItemsProcessed(state.iterations() * elements);
  state.SetBytesProcessed(state.iterations() * elements * bytes_per_element);
}

void copy(benchmark::State& state) {
  const int64_t n = state.range(0);
  const Buffer x(StorageType::kFloat32, n), y(StorageType::kFloat32, n);
  for (auto _ : state) {
    std::memcpy(y.data.get(), x.data.get(), static_cast<size_t>(n) * 4);
    benchmark::ClobberMemory();
  }
  count(state, n, 8);
}

void fake_quantize(benchmark::State& state, const KernelTable& kernels, StorageType storage, bool stream) {
  const int64_t n = state.range(0), size = size_of(storage);
  const Buffer x(storage, n), y(storage, n);
  const auto* from = static_cast<const char*>(x.data.get());
  auto* to = static_cast<char*>(y.data.get());
  for (auto _ : state) {
    for_blocks(n, [&](int64_t first, int64_t length) {
      kernels.fake_quantize(storage, from + first * size, to + first * size, length, kFourBits, stream);
    });
    benchmark::ClobberMemory();
  }
  count(state, n, 2 * size);
}

void fake_quantize_backward(benchmark::State& state, const KernelTable& kernels, StorageType storage,
                            mixbit::Gradient gradient) {
  const int64_t n = state.range(0), size = size_of(storage);
  const Buffer x(storage, n), g(storage, n), dx(storage, n);
  Quantizer quantizer = kFourBits;
  quantizer.gradient = gradient;
  double sum = 0.0;
  for (auto _ : state) {
    for_blocks(n, [&](int64_t first, int64_t length) {
      double part = 0.0;
      kernels.fake_quantize_backward(storage, static_cast<const char*>(g.data.get()) + first * size,
                                     static_cast<const char*>(x.data.get()) + first * size,
                                     static_cast<char*>(dx.data.get()) + first * size, length, quantizer, &part,
                                     nullptr, false);
      sum += part;
    });
    benchmark::DoNotOptimize(sum);
  }
  count(state, n, 3 * size);
}

// Two, four and eight bits over one range, with gates or learned scales; `steps`: with the sums of the scales'
// gradient.
struct Grids {
  std::vector<Quantizer> quantizers;
  const float weights[3] = {0.3f, 0.42f, 0.28f};
  mixbit::MixtureForm form;

  explicit Grids(mixbit::MixtureForm given) : form(given) {
    for (const int bits : {2, 4, 8}) {
      quantizers.push_back(
          {mixbit::gated_step(3.0f, bits, false), 0.0f, mixbit::quant_range(bits, false, false), Rounding::kHalfEven});
    }
  }
  mixbit::kernels::cpu::Mixture mixture() const { return {quantizers.data(), weights, 3, form}; }
};

void mixture(benchmark::State& state, const KernelTable& kernels, StorageType storage) {
  const int64_t n = state.range(0), size = size_of(storage);
  const Buffer x(storage, n), y(storage, n);
  const Grids grids(mixbit::MixtureForm::kGated);
  for (auto _ : state) {
    for_blocks(n, [&](int64_t first, int64_t length) {
      kernels.mixture(storage, static_cast<const char*>(x.data.get()) + first * size,
                      static_cast<char*>(y.data.get()) + first * size, length, grids.mixture(), false);
    });
    benchmark::ClobberMemory();
  }
  count(state, n, 2 * size);
}

void mixture_backward(benchmark::State& state, const KernelTable& kernels, StorageType storage,
                      mixbit::MixtureForm form, bool with_steps) {
  const int64_t n = state.range(0), size = size_of(storage);
  const Buffer x(storage, n), g(storage, n), dx(storage, n);
  const Grids grids(form);
  double levels[3] = {}, steps[3] = {};
  for (auto _ : state) {
    for_blocks(n, [&](int64_t first, int64_t length) {
      kernels.mixture_backward(storage, static_cast<const char*>(g.data.get()) + first * size,
                               static_cast<const char*>(x.data.get()) + first * size,
                               static_cast<char*>(dx.data.get()) + first * size, length, grids.mixture(), levels,
                               with_steps ? steps : nullptr, false);
    });
    benchmark::DoNotOptimize(levels);
  }
  count(state, n, 3 * size);
}

void quantization_noise(benchmark::State& state, const KernelTable& kernels, StorageType storage) {
  const int64_t n = state.range(0), size = size_of(storage);
  const Buffer x(storage, n);
  std::vector<Quantizer> grids;
  for (const int bits : {2, 3, 4, 5, 6, 7, 8, 16}) {
    const auto high = static_cast<float>((1 << (bits - 1)) - 1);
    grids.push_back({3.0f / high, 0.0f, {-high, high}, Rounding::kHalfEven});
  }
  std::vector<double> noise(grids.size());
  double signal = 0.0;
  for (auto _ : state) {
    for_blocks(n, [&](int64_t first, int64_t length) {
      kernels.quantization_noise(storage, static_cast<const char*>(x.data.get()) + first * size, length, grids.data(),
                                 static_cast<int64_t>(grids.size()), &signal, noise.data());
    });
    benchmark::DoNotOptimize(signal);
  }
  count(state, n, size);
}

}  // namespace

int main(int argc, char** argv) {
  const auto sizes = [](benchmark::internal::Benchmark* b) { b->Arg(1 << 12)->Arg(1 << 18)->Arg(1 << 23); };
  benchmark::RegisterBenchmark("copy/float32", copy)->Apply(sizes);
  const std::pair<const char*, StorageType> storages[] = {
      {"float32", StorageType::kFloat32}, {"bfloat16", StorageType::kBFloat16}, {"float16", StorageType::kFloat16}};
  const std::pair<const char*, Isa> isas[] = {{"scalar", Isa::kScalar}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}};
  for (const auto& [isa_name, isa] : isas) {
    const KernelTable& kernels = mixbit::kernels::cpu::kernels(isa);
    if (kernels.isa != isa || isa > mixbit::kernels::cpu::detected_isa()) {
      continue;  // not on this machine
    }
    for (const auto& [storage_name, storage] : storages) {
      const auto name = [&](const char* kernel) { return std::string(kernel) + '/' + storage_name + '/' + isa_name; };
      const StorageType type = storage;
      const auto add = [&](const char* kernel, auto run) {
        benchmark::RegisterBenchmark(name(kernel).c_str(), run)->Apply(sizes);
      };
      add("fake_quantize", [&kernels, type](benchmark::State& s) { fake_quantize(s, kernels, type, false); });
      add("fake_quantize_stream", [&kernels, type](benchmark::State& s) { fake_quantize(s, kernels, type, true); });
      add("fake_quantize_backward", [&kernels, type](benchmark::State& s) {
        fake_quantize_backward(s, kernels, type, mixbit::Gradient::kLearnedStep);
      });
      add("fake_quantize_backward_clip",
          [&kernels, type](benchmark::State& s) { fake_quantize_backward(s, kernels, type, mixbit::Gradient::kClip); });
      add("mixture", [&kernels, type](benchmark::State& s) { mixture(s, kernels, type); });
      add("gated_backward", [&kernels, type](benchmark::State& s) {
        mixture_backward(s, kernels, type, mixbit::MixtureForm::kGated, false);
      });
      add("mixture_backward", [&kernels, type](benchmark::State& s) {
        mixture_backward(s, kernels, type, mixbit::MixtureForm::kMixture, true);
      });
      add("quantization_noise", [&kernels, type](benchmark::State& s) { quantization_noise(s, kernels, type); });
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
