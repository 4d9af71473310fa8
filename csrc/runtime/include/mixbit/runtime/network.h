#pragma once

// Runs an integer package: one plan, one arena, the kernels of the widest instruction set.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <mixbit/common/isa.h>
#include <mixbit/runtime/package.h>

namespace mixbit::runtime {

struct Options {
  int threads = 1;
  // The kernels of the widest instruction set up to this one and up to MIXBIT_CPU_ISA.
  Isa isa = Isa::kAmx;
  // Every value keeps its codes, nothing is fused: what values() needs.
  bool keep_values = false;
  // Bytes of values (of one image), weights and scratch together that a package may ask for: a small file can name
  // large images.
  int64_t max_memory = int64_t{1} << 30;
};

// What the machine gives to one network, measured: the roof of a roofline.
struct Peaks {
  double macs_per_second = 0;   // a large product of bytes within the caches, with the network's kernels and threads
  double bytes_per_second = 0;  // reading memory beyond the caches
};

// One step of the plan; several belong to a node where its operands are first moved to other grids or orders.
struct StepInfo {
  std::string node;
  std::string module;                 // may be empty
  std::string op;                     // of the node
  std::string kernel;                 // what the step runs: "convolve", "lookup", ...
  int act_bits = 0, weight_bits = 0;  // of layers
  int64_t macs = 0;                   // of one image
  int64_t value_bytes = 0;            // codes (or fp32 values) of one image read and written
  int64_t weight_bytes = 0;           // of the kernel's layout, read once a batch
};

class Network {
 public:
  // Throws Error where the package's numbers do not hold, threads is below 1, or memory is missing or not allowed.
  explicit Network(Package package, const Options& options = {});
  ~Network();
  Network(Network&&) noexcept;
  Network& operator=(Network&&) noexcept;

  const Package& package() const;
  Isa isa() const;
  int threads() const;
  // Bytes that one image needs beside weights; images in flight need as many each.
  int64_t arena_bytes() const;
  // Bytes of all weights, biases and multipliers in the layouts of the kernels.
  int64_t weight_bytes() const;
  const std::vector<StepInfo>& steps() const;
  // Measures for about a fifth of a second, with the kernels and threads of this network, and keeps nothing.
  Peaks measure_peaks();

  // x: float32 [batch, input shape], row by row; NaN counts as the lowest code. outputs[i]: room for float32
  // [batch, shape of output i]. `seconds`, if given, has one entry for each step, to which the step's time is added.
  // Calls from several threads wait for each other.
  void run(const float* x, int64_t batch, std::span<float* const> outputs, std::span<double> seconds = {});

  // Codes of every node for an input, row by row as the reference has them (int16 holds int8 and uint8). Needs
  // Options::keep_values.
  std::vector<std::vector<int16_t>> values(const float* x, int64_t batch);

 private:
  class Plan;
  std::unique_ptr<Plan> plan_;
};

// Throws Error if MIXBIT_CPU_ISA names no instruction set.
void check_isa_cap();

}  // namespace mixbit::runtime
