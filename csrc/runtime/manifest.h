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

// The same for a document without its list of tensors: they are given.
Manifest complete_manifest(const json::Value& document, std::vector<Tensor> tensors);

// The document in few bytes: grids in a list, tensors as lists, what a reader assumes anyway left out.
json::Value short_manifest(const json::Value& document, const Manifest& manifest);

// The document with everything spelled out: names, grids, shapes, tensors.
json::Value long_manifest(const json::Value& document, const Manifest& manifest);

// Of a tensor in a file of a version.
int64_t alignment(const Tensor& tensor, int64_t version);

// Bytes of a tensor's data in the file.
uint64_t stored_bytes(const Tensor& tensor);

}  // namespace mixbit::runtime
