// mixbit-run: an integer package on a NumPy file, without torch or Python.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
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
    "  --profile OUT.json  writes the time of every step, the least of the runs of --bench (default 10)\n"
    "\n"
    "MIXBIT_CPU_ISA=scalar|avx2|avx512|vnni|amx caps the instruction set; results do not depend on it.\n";

struct Arguments {
  std::string package;
  std::optional<std::string> input, output, profile;
  int threads = 1;
  int bench = 0;
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
                       option == "--profile";
    if (!known) fail("unknown option '", option, "', expected --input, --output, --threads, --bench or --profile");
    if (++i == argc) fail(option, ": no value follows");
    const std::string value = argv[i];
    if (option == "--input") out.input = value;
    if (option == "--output") out.output = value;
    if (option == "--profile") out.profile = value;
    if (option == "--threads") out.threads = whole_number(option, value, 1, 1024);
    if (option == "--bench") out.bench = whole_number(option, value, 1, 1000000);
  }
  if (out.package.empty()) fail("no package given; mixbit-run --help shows the usage");
  const bool measures = out.bench > 0 || out.profile;
  if (!out.input && !measures) fail("no --input given");
  if (!out.output && !measures) fail("no --output given");
  return out;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

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

json::Value profile_of(const Network& network, const Arguments& arguments, int64_t batch, int runs, double load,
                       double best, const std::vector<double>& seconds) {
  const auto text_of = [](const std::string& s) { return json::Value::of(std::string_view(s)); };
  json::Value out = object();
  out.set("package", text_of(arguments.package));
  out.set("isa", json::Value::of(std::string_view(mixbit::isa_name(network.isa()))));
  out.set("threads", json::Value::of(int64_t{network.threads()}));
  out.set("batch", json::Value::of(batch));
  out.set("runs", json::Value::of(int64_t{runs}));
  out.set("load_ms", json::Value::of(load * 1e3));
  out.set("run_ms", json::Value::of(best * 1e3));
  out.set("arena_bytes", json::Value::of(network.arena_bytes()));
  out.set("weight_bytes", json::Value::of(network.weight_bytes()));
  json::Value list = json::Value::array({});
  for (size_t i = 0; i < seconds.size(); ++i) {
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
    step.set("ms", json::Value::of(seconds[i] * 1e3));
    list.items.push_back(std::move(step));
  }
  out.set("steps", std::move(list));
  return out;
}

void run(const Arguments& arguments) {
  const auto start = Clock::now();
  Options options;
  options.threads = arguments.threads;
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
  network.run(x.data.data(), batch, rooms);
  if (arguments.output) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      write_npy(output_path(*arguments.output, i, outputs.size()), outputs[i].shape, outputs[i].data.data());
    }
  }
  if (arguments.bench == 0 && !arguments.profile) return;

  const int runs = arguments.bench > 0 ? arguments.bench : 10;
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    network.run(x.data.data(), batch, rooms);
    times.push_back(seconds_since(begin));
  }
  std::sort(times.begin(), times.end());
  const double best = times.front(), median = times[times.size() / 2];
  if (arguments.bench > 0) {
    std::printf(
        "%d runs of %lld inputs, %d threads, %s kernels: min %.4f ms, median %.4f ms, max %.4f ms; %.1f inputs/s; "
        "loaded "
        "in %.2f ms; values %lld bytes an input, weights %lld bytes\n",
        runs, static_cast<long long>(batch), network.threads(), mixbit::isa_name(network.isa()), best * 1e3,
        median * 1e3, times.back() * 1e3, static_cast<double>(batch) / best, load * 1e3,
        static_cast<long long>(network.arena_bytes()), static_cast<long long>(network.weight_bytes()));
  }
  if (arguments.profile) {
    std::vector<double> least(network.steps().size(), std::numeric_limits<double>::infinity());
    for (int i = 0; i < runs; ++i) {
      std::vector<double> seconds(least.size());
      network.run(x.data.data(), batch, rooms, seconds);
      for (size_t k = 0; k < least.size(); ++k) least[k] = std::min(least[k], seconds[k]);
    }
    write_file(*arguments.profile, json::dump(profile_of(network, arguments, batch, runs, load, best, least)) + "\n");
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
