#include <algorithm>
#include <cstring>
#include <exception>
#include <span>
#include <string>

#include <mixbit/runtime/c.h>
#include <mixbit/runtime/network.h>

struct mixbit_network {
  mixbit::runtime::Network network;
};

namespace {

using mixbit::runtime::Node;
using mixbit::runtime::Shape;

void say(const char* message, char* error, size_t error_size) {
  if (error_size == 0) return;
  const size_t n = std::min(std::strlen(message), error_size - 1);
  std::memcpy(error, message, n);
  error[n] = '\0';
}

const Node* output_node(const mixbit_network* network, int output) {
  const auto& package = network->network.package();
  if (output < 0 || output >= static_cast<int>(package.outputs().size())) return nullptr;
  return &package.nodes()[static_cast<size_t>(package.outputs()[static_cast<size_t>(output)])];
}

const Shape* shape_of(const mixbit_network* network, int output) {
  if (output < 0) return &network->network.package().input_shape();
  const Node* node = output_node(network, output);
  return node == nullptr ? nullptr : &node->shape;
}

}  // namespace

extern "C" {

mixbit_network* mixbit_open(const char* path, int threads, char* error, size_t error_size) {
  try {
    mixbit::runtime::Options options;
    options.threads = threads;
    return new mixbit_network{mixbit::runtime::Network(mixbit::runtime::Package::open(path), options)};
  } catch (const std::exception& problem) {
    say(problem.what(), error, error_size);
    return nullptr;
  }
}

void mixbit_close(mixbit_network* network) { delete network; }

int mixbit_outputs(const mixbit_network* network) {
  return static_cast<int>(network->network.package().outputs().size());
}

int mixbit_rank(const mixbit_network* network, int output) {
  const Shape* shape = shape_of(network, output);
  return shape == nullptr ? -1 : static_cast<int>(shape->size());
}

int64_t mixbit_size(const mixbit_network* network, int output, int axis) {
  const Shape* shape = shape_of(network, output);
  if (shape == nullptr || axis < 0 || axis >= static_cast<int>(shape->size())) return -1;
  return (*shape)[static_cast<size_t>(axis)];
}

const char* mixbit_output_name(const mixbit_network* network, int output) {
  const Node* node = output_node(network, output);
  return node == nullptr ? nullptr : node->name.c_str();
}

const char* mixbit_isa(const mixbit_network* network) { return mixbit::isa_name(network->network.isa()); }

int mixbit_run(mixbit_network* network, const float* x, int64_t batch, float* const* outputs, char* error,
               size_t error_size) {
  try {
    network->network.run(x, batch, std::span<float* const>(outputs, static_cast<size_t>(mixbit_outputs(network))));
    return 0;
  } catch (const std::exception& problem) {
    say(problem.what(), error, error_size);
    return -1;
  }
}

}  // extern "C"
