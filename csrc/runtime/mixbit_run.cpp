// mixbit-run: an integer package on a NumPy file, without torch or Python.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <mixbit/runtime/kernels.h>
#include <mixbit/runtime/network.h>

#include "json.h"
#include "npy.h"
#include "text.h"

namespace {

using namespace mixbit::runtime;
using Clock = std::chrono::steady_clock;

constexpr const char* kUsage =
    "usage: mixbit-run PACKAGE --input IN.npy --output OUT.npy [--threads N] [--bench N] [--profile OUT.json]\n"
    "                  [--max-memory MIB]\n"
    "\n"
    "Runs an integer package (mixbit.export.integer writes them) on a batch of inputs.\n"
    "\n"
    "  --input IN.npy      float32 [batch, sizes of the input]; with --bench or --profile it may be left out: one "
    "input\n"
    "                      of zeros\n"
    "  --output OUT.npy    float32 [batch, sizes of the output]; of several outputs OUT.0.npy, OUT.1.npy, ...; with\n"
    "                      --bench or --profile it may be left out\n"
    "  --threads N         threads that work on the batch (default 1)\n"
    "  --bench N           runs N times more and prints the times\n"
    "  --profile OUT.json  writes the time of every step, the least of the runs of --bench (default 10), with its\n"
    "                      shares of this machine's peak products and memory bandwidth; --bench prints them\n"
    "  --max-memory MIB    what a package may ask for (default 1024)\n"
    "\n"
    "MIXBIT_CPU_ISA=scalar|avx2|avx512|vnni|amx caps the instruction set; results do not depend on it.\n";

struct Arguments {
  std::string package;
  std::optional<std::string> input, output, profile;
  int threads = 1;
  int bench = 0;
  int max_memory = 1024;
};

int whole_number(std::string_view option, std::string_view text, int low, int high) {
  int value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size() || value < low || value > high) {
    fail(option, " is '", text, "', expected a whole number from ", low, " to ", high);
  }
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments out;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option.substr(0, 1) != "-") {
      if (!out.package.empty()) fail("two packages: '", out.package, "' and '", option, "', expected one");
      out.package = option;
      continue;
    }
    const bool known = option == "--input" || option == "--output" || option == "--threads" || option == "--bench" ||
                       option == "--profile" || option == "--max-memory";
    if (!known) {
      fail("unknown option '", option, "', expected --input, --output, --threads, --bench, --profile or --max-memory");
    }
    if (++i == argc) fail(option, ": no value follows");
    const std::string value = argv[i];
    if (option == "--input") out.input = value;
    if (option == "--output") out.output = value;
    if (option == "--profile") out.profile = value;
    if (option == "--threads") out.threads = whole_number(option, value, 1, 1024);
    if (option == "--max-memory") out.max_memory = whole_number(option, value, 1, 1 << 24);
    if (option == "--bench") out.bench = whole_number(option, value, 1, 1000000);
  }
  if (out.package.empty()) fail("no package given; mixbit-run --help shows the usage");
  const bool measures = out.bench > 0 || out.profile;
  if (!out.input && !measures) fail("no --input given");
  if (!out.output && !measures) fail("no --output given");
  return out;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The most memory that this process has had in use so far, kilobytes (of Linux's own account); 0 where it is not told.
int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtoll(line.c_str() + 6, nullptr, 10);
  }
  return 0;
}

// OUT.npy, or OUT.0.npy, OUT.1.npy, ...
std::string output_path(const std::string& path, size_t i, size_t count) {
  if (count == 1) return path;
  const bool suffix = path.size() > 4 && path.compare(path.size() - 4, 4, ".npy") == 0;
  return (suffix ? path.substr(0, path.size() - 4) : path) + "." + std::to_string(i) + ".npy";
}

json::Value object() {
  json::Value value;
  value.kind = json::Kind::kObject;
  return value;
}

// What a run found out.
struct Times {
  int runs = 0;
  double load = 0, first = 0, best = 0;  // seconds; `first`: from opening the package to the first answer
  int64_t memory = 0;                    // kilobytes, after the first answer
  std::vector<double> steps;             // the least of each
  Peaks peaks;
};

// Shares of the peaks that a step reached. Values in a cache move faster than memory: the second may exceed 1.
double mac_share(const StepInfo& info, int64_t batch, double seconds, const Peaks& peaks) {
  return static_cast<double>(info.macs * batch) / std::max(seconds, 1e-9) / peaks.macs_per_second;
}
double bandwidth_share(const StepInfo& info, int64_t batch, double seconds, const Peaks& peaks) {
  const auto bytes = static_cast<double>(info.value_bytes * batch + info.weight_bytes);
  return bytes / std::max(seconds, 1e-9) / peaks.bytes_per_second;
}

void print_steps(const Network& network, int64_t batch, const Times& times) {
  double total = 0;
  for (const double seconds : times.steps) total += seconds;
  std::printf("peak: %.1f GMAC/s, %.2f GB/s from memory\n", times.peaks.macs_per_second * 1e-9,
              times.peaks.bytes_per_second * 1e-9);
  std::printf("%10s %6s %6s %6s %4s %4s  %s\n", "us", "time", "MACs", "bytes", "act", "w", "step (shares in %)");
  for (size_t i = 0; i < times.steps.size(); ++i) {
    const StepInfo& info = network.steps()[i];
    const double seconds = times.steps[i];
    std::printf("%10.2f %6.1f %6.1f %6.1f %4d %4d  %s %s\n", seconds * 1e6, 100 * seconds / total,
                100 * mac_share(info, batch, seconds, times.peaks),
                100 * bandwidth_share(info, batch, seconds, times.peaks), info.act_bits, info.weight_bits,
                info.kernel.c_str(), (info.module.empty() ? info.node : info.module).c_str());
  }
}

json::Value profile_of(const Network& network, const Arguments& arguments, int64_t batch, const Times& times) {
  const auto text_of = [](const std::string& s) { return json::Value::of(std::string_view(s)); };
  json::Value out = object();
  out.set("package", text_of(arguments.package));
  out.set("isa", json::Value::of(std::string_view(mixbit::isa_name(network.isa()))));
  out.set("threads", json::Value::of(int64_t{network.threads()}));
  out.set("batch", json::Value::of(batch));
  out.set("runs", json::Value::of(int64_t{times.runs}));
  out.set("load_ms", json::Value::of(times.load * 1e3));
  out.set("first_answer_ms", json::Value::of(times.first * 1e3));
  out.set("run_ms", json::Value::of(times.best * 1e3));
  out.set("peak_memory_kb", json::Value::of(times.memory));
  out.set("peak_macs_per_second", json::Value::of(times.peaks.macs_per_second));
  out.set("peak_bytes_per_second", json::Value::of(times.peaks.bytes_per_second));
  out.set("arena_bytes", json::Value::of(network.arena_bytes()));
  out.set("weight_bytes", json::Value::of(network.weight_bytes()));
  json::Value list = json::Value::array({});
  for (size_t i = 0; i < times.steps.size(); ++i) {
    const StepInfo& info = network.steps()[i];
    json::Value step = object();
    step.set("node", text_of(info.node));
    step.set("module", text_of(info.module));
    step.set("op", text_of(info.op));
    step.set("kernel", text_of(info.kernel));
    step.set("act_bits", json::Value::of(int64_t{info.act_bits}));
    step.set("weight_bits", json::Value::of(int64_t{info.weight_bits}));
    step.set("macs", json::Value::of(info.macs));
    step.set("value_bytes", json::Value::of(info.value_bytes));
    step.set("weight_bytes", json::Value::of(info.weight_bytes));
    step.set("ms", json::Value::of(times.steps[i] * 1e3));
    step.set("mac_share", json::Value::of(mac_share(info, batch, times.steps[i], times.peaks)));
    step.set("bandwidth_share", json::Value::of(bandwidth_share(info, batch, times.steps[i], times.peaks)));
    list.items.push_back(std::move(step));
  }
  out.set("steps", std::move(list));
  return out;
}

void run(const Arguments& arguments) {
  const auto start = Clock::now();
  Options options;
  options.threads = arguments.threads;
  options.max_memory = int64_t{arguments.max_memory} << 20;
  Network network(Package::open(arguments.package), options);
  const double load = seconds_since(start);
  mixbit::Isa cap;
  const char* wanted = std::getenv("MIXBIT_CPU_ISA");
  if (wanted != nullptr && parse_isa(wanted, &cap) && cap > network.isa()) {
    std::fprintf(stderr, "mixbit-run: no %s kernels on this processor, %s ones run\n", wanted,
                 mixbit::isa_name(network.isa()));
  }

  const Package& package = network.package();
  Shape expected{1};
  expected.insert(expected.end(), package.input_shape().begin(), package.input_shape().end());
  FloatArray x;
  if (arguments.input) {
    x = read_npy(*arguments.input);
    if (!x.shape.empty()) expected[0] = x.shape[0];
    if (x.shape != expected) {
      const std::string sizes = shown(package.input_shape()).substr(1);
      fail("'", *arguments.input, "' has shape ", shown(x.shape), ", expected [batch, ", sizes);
    }
  } else {
    int64_t elements = 1;
    for (const int64_t size : expected) elements *= size;
    x.shape = expected;
    x.data.assign(static_cast<size_t>(elements), 0.0f);
  }
  const int64_t batch = x.shape[0];

  std::vector<FloatArray> outputs;
  std::vector<float*> rooms;
  for (const int i : package.outputs()) {
    FloatArray output;
    output.shape = package.nodes()[static_cast<size_t>(i)].shape;
    output.shape.insert(output.shape.begin(), batch);
    uint64_t elements = 1;
    for (const int64_t size : output.shape) elements *= static_cast<uint64_t>(size);
    output.data.resize(elements);
    outputs.push_back(std::move(output));
  }
  for (FloatArray& output : outputs) rooms.push_back(output.data.data());
  const auto before_first = Clock::now();
  network.run(x.data.data(), batch, rooms);
  const double first = load + seconds_since(before_first);
  const int64_t memory = peak_memory();
  if (arguments.output) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      write_npy(output_path(*arguments.output, i, outputs.size()), outputs[i].shape, outputs[i].data.data());
    }
  }
  if (arguments.bench == 0 && !arguments.profile) return;

  Times found;
  found.runs = arguments.bench > 0 ? arguments.bench : 10;
  found.load = load;
  found.first = first;
  found.memory = memory;
  std::vector<double> times;
  for (int i = 0; i < found.runs; ++i) {
    const auto begin = Clock::now();
    network.run(x.data.data(), batch, rooms);
    times.push_back(seconds_since(begin));
  }
  std::sort(times.begin(), times.end());
  found.best = times.front();
  found.steps.assign(network.steps().size(), std::numeric_limits<double>::infinity());
  for (int i = 0; i < found.runs; ++i) {
    std::vector<double> seconds(found.steps.size());
    network.run(x.data.data(), batch, rooms, seconds);
    for (size_t k = 0; k < seconds.size(); ++k) found.steps[k] = std::min(found.steps[k], seconds[k]);
  }
  found.peaks = network.measure_peaks();
  if (arguments.bench > 0) {
    std::printf(
        "%d runs of %lld inputs, %d threads, %s kernels: min %.4f ms, median %.4f ms, max %.4f ms; %.1f inputs/s; "
        "loaded in %.2f ms, first answer after %.2f ms; values %lld bytes an input, weights %lld bytes\n",
        found.runs, static_cast<long long>(batch), network.threads(), mixbit::isa_name(network.isa()), found.best * 1e3,
        times[times.size() / 2] * 1e3, times.back() * 1e3, static_cast<double>(batch) / found.best, load * 1e3,
        first * 1e3, static_cast<long long>(network.arena_bytes()), static_cast<long long>(network.weight_bytes()));
    std::printf("peak memory of the process by then: %lld kB\n", static_cast<long long>(memory));
    print_steps(network, batch, found);
  }
  if (arguments.profile) {
    write_file(*arguments.profile, json::dump(profile_of(network, arguments, batch, found)) + "\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0 || std::strcmp(argv[i], "-h") == 0) {
      std::fputs(kUsage, stdout);
      return 0;
    }
  }
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "mixbit-run: out of memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mixbit-run: %s\n", error.what());
  }
  return 2;
}
