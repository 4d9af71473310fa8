// The integer kernels on layers of MobileNetV1 and ResNets: MACs a second for each instruction set and weight width,
// and the element-wise kernels. Usage: bench_runtime_kernels [--benchmark_filter=REGEX] (Google Benchmark's options).

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "runtime_layers.h"

namespace {

using mixbit::CodeGrid;
using mixbit::Isa;
using mixbit::bench::LayerRun;
using mixbit::runtime::KernelTable;
using mixbit::runtime::Pool;

struct Shape {
  const char* name;
  int64_t size, inputs, outputs, kernel, stride, groups;
};

constexpr Shape kShapes[] = {
    {"first/224x3to32", 224, 3, 32, 3, 2, 1},         {"first/224x3to64", 224, 3, 64, 7, 2, 1},
    {"depthwise/112x32", 112, 32, 32, 3, 1, 32},      {"depthwise/112x64s2", 112, 64, 64, 3, 2, 64},
    {"depthwise/14x512", 14, 512, 512, 3, 1, 512},    {"depthwise/28x240k5", 28, 240, 240, 5, 1, 240},
    {"pointwise/112x32to64", 112, 32, 64, 1, 1, 1},   {"pointwise/56x128to128", 56, 128, 128, 1, 1, 1},
    {"pointwise/14x512to512", 14, 512, 512, 1, 1, 1}, {"pointwise/7x1024to1024", 7, 1024, 1024, 1, 1, 1},
    {"conv/56x64to64", 56, 64, 64, 3, 1, 1},          {"conv/28x128to128", 28, 128, 128, 3, 1, 1},
    {"conv/56x64to128s2", 56, 64, 128, 3, 2, 1},      {"conv/7x512to512", 7, 512, 512, 3, 1, 1},
    {"conv/32x16to16", 32, 16, 16, 3, 1, 1},          {"grouped/28x128g4", 28, 128, 128, 3, 1, 4},
    {"linear/1024to1000", 1, 1024, 1000, 1, 1, 1},    {"linear/4096to4096", 1, 4096, 4096, 1, 1, 1}};

void layer(benchmark::State& state, const KernelTable& table, const Shape& s, int32_t weight_bits) {
  LayerRun run(
      mixbit::bench::square_layer(s.size, s.inputs, s.outputs, s.kernel, s.stride, s.groups, 8, false, weight_bits),
      table);
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  state.counters["MAC/s"] = benchmark::Counter(run.macs(), benchmark::Counter::kIsIterationInvariantRate);
}

constexpr CodeGrid kUnsigned = {0.02f, 0, 0, 255, false}, kSigned = {0.03f, 0, -128, 127, true};

void add(benchmark::State& state, const KernelTable& table) {
  const int64_t n = 56 * 56 * 64;
  std::vector<uint8_t> a(n, 3), b(n, 200), y(n);
  for (auto _ : state) {
    table.add(a.data(), kSigned, b.data(), kUnsigned, y.data(), kUnsigned, n);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * n);
}

void lookup(benchmark::State& state, const KernelTable& table) {
  const int64_t n = 56 * 56 * 64;
  std::vector<uint8_t> x(n, 3), y(n);
  uint8_t codes[256];
  mixbit::runtime::move_table(kSigned, kUnsigned, codes);
  for (auto _ : state) {
    table.lookup(codes, x.data(), y.data(), n);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * n);
}

void quantize_image(benchmark::State& state, const KernelTable& table) {
  const int64_t pixels = 224 * 224;
  std::vector<float> x(3 * pixels, 0.3f);
  std::vector<uint8_t> y(3 * pixels);
  for (auto _ : state) {
    table.quantize_image(x.data(), y.data(), kSigned, 3, pixels);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * 3 * pixels);
}

void pool(benchmark::State& state, const KernelTable& table, bool maximum) {
  Pool p = {};
  p.batch = 1;
  p.in_height = p.in_width = maximum ? 112 : 7;
  p.channels = maximum ? 64 : 1024;
  p.out_height = p.out_width = maximum ? 56 : 1;
  p.kernel_height = p.kernel_width = maximum ? 3 : 7;
  p.stride_height = p.stride_width = maximum ? 2 : 7;
  p.pad_top = p.pad_left = maximum ? 1 : 0;
  p.dilation_height = p.dilation_width = 1;
  p.x = p.y = kUnsigned;
  const int64_t inputs = p.in_height * p.in_width * p.channels;
  std::vector<uint8_t> x(static_cast<size_t>(inputs), 7);
  std::vector<uint8_t> y(static_cast<size_t>(p.positions() * p.channels));
  for (auto _ : state) {
    (maximum ? table.max_pool : table.average_pool)(p, x.data(), y.data(), 0, p.positions());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * inputs);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kVnni, Isa::kAmx}) {
    const KernelTable& table = mixbit::runtime::kernels(isa);
    if (table.isa != isa || isa > mixbit::runtime::detected_isa()) {
      continue;  // not on this machine
    }
    const std::string end = std::string("/") + mixbit::isa_name(isa);
    for (const Shape& shape : kShapes) {
      for (const int32_t bits : {8, 4, 2}) {
        const std::string name = shape.name + ("/w" + std::to_string(bits)) + end;
        benchmark::RegisterBenchmark(name.c_str(),
                                     [&table, &shape, bits](benchmark::State& s) { layer(s, table, shape, bits); });
      }
    }
    benchmark::RegisterBenchmark(("add" + end).c_str(), [&table](benchmark::State& s) { add(s, table); });
    benchmark::RegisterBenchmark(("lookup" + end).c_str(), [&table](benchmark::State& s) { lookup(s, table); });
    benchmark::RegisterBenchmark(("quantize_image" + end).c_str(),
                                 [&table](benchmark::State& s) { quantize_image(s, table); });
    benchmark::RegisterBenchmark(("max_pool" + end).c_str(), [&table](benchmark::State& s) { pool(s, table, true); });
    benchmark::RegisterBenchmark(("average_pool" + end).c_str(),
                                 [&table](benchmark::State& s) { pool(s, table, false); });
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
