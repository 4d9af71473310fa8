#pragma once

// Integer packages (docs/package_format.md): a network as a list of operations on integer tensors, its weights packed.
// Files are read as if a stranger had made them: everything is checked before it is used.

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <mixbit/common/integer.h>

namespace mixbit::runtime {

// Bad input: a package, a file or an argument; the message names it and what was expected.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

inline constexpr int kFormatVersion = 2;                   // older ones are read, too
inline constexpr int64_t kFileAlignment = 64;              // of packed tensors in the file
inline constexpr int64_t kMaxElements = int64_t{1} << 30;  // of one value of one image, and of one tensor
inline constexpr int64_t kMaxManifestBytes = int64_t{1} << 24;

enum class Op : uint8_t {
  kInput,
  kConv2d,
  kLinear,
  kAdd,
  kCat,
  kAvgPool2d,
  kMaxPool2d,
  kRelu,
  kRelu6,
  kReshape,
  kSlice,
  kPad,
  kRepeat,
  kIdentity,
  kMul,
  kLookup,
  kSoftmax,
  kPermute,
  kPixelUnshuffle,
};

const char* op_name(Op op);

// Sizes without the batch; an image is channels, height, width.
using Shape = std::vector<int64_t>;

struct Pair {
  int64_t h = 1, w = 1;
};

// One value of the network and the operation that makes it.
struct Node {
  std::string name;
  std::string module;  // path of the module in the float network; may be empty
  Op op = Op::kInput;
  std::vector<int> inputs;  // indices of earlier nodes
  CodeGrid grid{};          // of the value
  Shape shape;              // of the value, without the batch

  // conv2d, linear: the grid on which the layer reads its input, and its tensors in Package::tensors().
  CodeGrid act{};
  int act_bits = 8;
  int weight = -1, bias = -1, multiplier = -1;

  // conv2d and pools.
  Pair kernel, stride, padding{0, 0}, dilation;
  int64_t groups = 1;
  bool ceil_mode = false;
  bool count_include_pad = true;
  bool global = false;  // avg_pool2d over the whole image

  // lookup: codes for the codes of the input's grid. softmax: powers for the distances of two of them, along `axis`.
  int table = -1;
  // permute: which axis of the input becomes axis i. pixel_unshuffle: block size.
  std::vector<int> order;
  int64_t factor = 1;

  // slice: `count` elements along `axis` (of `shape`), every `step`-th from `start`.
  int axis = 0;
  int64_t start = 0, step = 1, count = 0;
  // pad: elements before and after each axis. repeat: times along height and width.
  Shape before, after;
  Pair repeats;
};

enum class TensorType : uint8_t { kPacked, kInt32, kFloat32, kUint8 };

// A tensor of the file. Packed: codes of 1 to 8 bits, little end first (mixbit/common/packing.h); what belongs to one
// index of the first dimension is a row and starts at a byte.
struct Tensor {
  std::string name;
  TensorType type = TensorType::kPacked;
  int bits = 8;
  bool is_signed = true;
  Shape shape;
  uint64_t offset = 0;  // from the start of the data
  uint64_t bytes = 0;
  uint32_t crc32 = 0;

  int64_t elements() const;
};

// A package whose structure, shapes, offsets and checksums were checked. The numbers of a layer are checked by
// check_layer, where they are needed.
class Package {
 public:
  // Maps the file. The bytes of a mapped file must not change while it is used.
  static Package open(const std::string& path);
  // Reads a package from memory that outlives it.
  static Package parse(std::span<const uint8_t> bytes);
  // Reads a package from memory that becomes its own.
  static Package own(std::vector<uint8_t> bytes);

  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  // Indices of nodes.
  const std::vector<int>& outputs() const { return outputs_; }
  const Shape& input_shape() const { return nodes_.front().shape; }
  // The manifest as JSON in which everything is spelled out.
  std::string manifest() const;
  uint64_t file_bytes() const { return bytes_.size(); }

  std::span<const uint8_t> data(int tensor) const;
  // Gives the memory of a tensor of a mapped file back to the system; data() stays valid and reads the file again.
  void release(int tensor) const;
  // Codes of a packed tensor, unpacked.
  std::vector<int8_t> codes(int tensor) const;
  // Throws unless the accumulators of a layer fit 32 bits for every possible input.
  void check_layer(const Node& layer) const;
  // Throws unless the table of a lookup holds codes of its grid, that of a softmax powers.
  void check_table(const Node& node) const;
  std::vector<int32_t> int32s(int tensor) const;
  std::vector<float> floats(int tensor) const;
  std::vector<uint8_t> bytes(int tensor) const;

 private:
  std::vector<Node> nodes_;
  std::vector<Tensor> tensors_;
  std::vector<int> outputs_;
  std::string_view manifest_;
  std::span<const uint8_t> bytes_;
  uint64_t data_start_ = 0;
  std::shared_ptr<const void> memory_;  // of the bytes: a mapped file, a vector, or another's
  bool mapped_ = false;
};

// What a tensor of a new package holds: int8 codes, int32, fp32 or bytes, row by row.
struct Array {
  std::string name;
  TensorType type = TensorType::kPacked;
  int bits = 8;  // of packed codes
  Shape shape;
  const void* data = nullptr;
};

// A package as bytes. `manifest` is JSON with "nodes" and "outputs" (and, if wanted, an object "made_by") as
// docs/package_format.md has them, without shapes, tensors and version, which are added here.
std::vector<uint8_t> make_package(std::string_view manifest, std::span<const Array> arrays);

}  // namespace mixbit::runtime
