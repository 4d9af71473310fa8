#pragma once

// The network and the list of tensors as JSON, and the shapes that follow from the operations.

#include <vector>

#include <mixbit/runtime/package.h>

#include "json.h"

namespace mixbit::runtime {

struct Manifest {
  std::vector<Node> nodes;
  std::vector<Tensor> tensors;
  std::vector<int> outputs;
};

// Reads a document, computes every shape and checks that all of it fits together. A shape that the document states must
// be the one computed.
// `version`: of the file.
Manifest read_manifest(const json::Value& document, int64_t version);

// The same for a document without its list of tensors: they are given. Adds shapes to its nodes.
Manifest complete_manifest(json::Value* document, std::vector<Tensor> tensors);

json::Value tensor_entry(const Tensor& tensor);

// Bytes of a tensor's data in the file.
uint64_t stored_bytes(const Tensor& tensor);

}  // namespace mixbit::runtime
