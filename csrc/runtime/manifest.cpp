#include "manifest.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>

#include <mixbit/common/packing.h>

#include "text.h"

namespace mixbit::runtime {
namespace {

constexpr size_t kMaxNodes = size_t{1} << 14;
// Names of nodes and modules, and operands of all nodes together: each operand may become a step of the plan, which
// keeps the names of its node.
constexpr size_t kMaxNameBytes = 1024;
constexpr size_t kMaxOperands = size_t{1} << 16;
constexpr int kMaxRank = 6;
// Of strides, paddings and the like: sums and products of them stay far inside 64 bits.
constexpr int64_t kMaxStep = int64_t{1} << 20;

struct OpEntry {
  Op op;
  const char* name;
  int inputs;  // -1: two or more
  std::vector<std::string_view> keys;
};

const std::vector<OpEntry>& op_table() {
  static const std::vector<OpEntry> table = {
      {Op::kInput, "input", 0, {}},
      {Op::kConv2d, "conv2d", 1, {"act", "weight", "bias", "multiplier", "stride", "padding", "dilation", "groups"}},
      {Op::kLinear, "linear", 1, {"act", "weight", "bias", "multiplier"}},
      {Op::kAdd, "add", 2, {}},
      {Op::kCat, "cat", -1, {}},
      {Op::kAvgPool2d, "avg_pool2d", 1, {"kernel", "stride", "padding", "count_include_pad", "keepdim"}},
      {Op::kMaxPool2d, "max_pool2d", 1, {"kernel", "stride", "padding", "dilation", "ceil_mode"}},
      {Op::kRelu, "relu", 1, {}},
      {Op::kRelu6, "relu6", 1, {}},
      {Op::kReshape, "reshape", 1, {"to"}},
      {Op::kSlice, "slice", 1, {"dim", "start", "end", "step"}},
      {Op::kPad, "pad", 1, {"amounts"}},
      {Op::kRepeat, "repeat", 1, {"counts"}},
      {Op::kIdentity, "identity", 1, {}},
      {Op::kMul, "mul", 2, {}},
      {Op::kLookup, "lookup", 1, {"table"}},
      {Op::kSoftmax, "softmax", 1, {"table", "dim"}},
      {Op::kPermute, "permute", 1, {"dims"}},
      {Op::kPixelUnshuffle, "pixel_unshuffle", 1, {"factor"}},
  };
  return table;
}

constexpr std::array<std::string_view, 6> kNodeKeys = {"name", "op", "module", "inputs", "grid", "shape"};

const char* kind_name(json::Kind kind) {
  constexpr std::array<const char*, 7> kNames = {"null",     "true or false", "a whole number", "a number",
                                                 "a string", "a list",        "an object"};
  return kNames[static_cast<size_t>(kind)];
}

// An object of the document that knows what it is called in messages.
class Fields {
 public:
  Fields(const json::Value& value, std::string where) : value_(&value), where_(std::move(where)) {
    if (value.kind != json::Kind::kObject) fail(where_, " is ", kind_name(value.kind), ", expected an object");
  }

  const std::string& where() const { return where_; }
  const json::Value* find(std::string_view key) const { return value_->find(key); }

  const json::Value& get(std::string_view key, json::Kind kind) const {
    const json::Value* found = value_->find(key);
    if (found == nullptr) fail(where_, ": no ", key);
    if (found->kind != kind) fail(where_, ": ", key, " is ", kind_name(found->kind), ", expected ", kind_name(kind));
    return *found;
  }
  const std::string& string(std::string_view key) const { return get(key, json::Kind::kString).string; }
  bool boolean(std::string_view key) const { return get(key, json::Kind::kBool).boolean; }
  int64_t integer(std::string_view key, int64_t low, int64_t high) const {
    return bounded(get(key, json::Kind::kInteger), key, low, high);
  }
  std::vector<int64_t> integers(std::string_view key, int64_t low, int64_t high) const {
    std::vector<int64_t> out;
    for (const json::Value& item : get(key, json::Kind::kArray).items) {
      if (item.kind != json::Kind::kInteger) fail(where_, ": ", key, " holds ", kind_name(item.kind));
      out.push_back(bounded(item, key, low, high));
    }
    return out;
  }
  Pair pair(std::string_view key, int64_t low, Pair otherwise) const {
    return find(key) == nullptr ? otherwise : pair(key, low);
  }
  Pair pair(std::string_view key, int64_t low) const {
    const std::vector<int64_t> values = integers(key, low, kMaxStep);
    if (values.size() != 2) fail(where_, ": ", key, " has ", values.size(), " numbers, expected 2");
    return {values[0], values[1]};
  }
  CodeGrid grid(std::string_view key) const {
    const Fields fields(get(key, json::Kind::kObject), where_ + ": " + std::string(key));
    const json::Value* scale = fields.find("scale");
    if (scale == nullptr || (scale->kind != json::Kind::kNumber && scale->kind != json::Kind::kInteger)) {
      fail(fields.where(), ": no number scale");
    }
    return checked_grid(fields.where(), *scale, fields.integer("low", -128, 255), fields.integer("high", -128, 255),
                        fields.integer("zero_point", -256, 256));
  }
  static CodeGrid checked_grid(const std::string& where, const json::Value& scale, int64_t low, int64_t high,
                               int64_t zero_point) {
    CodeGrid grid{};
    grid.scale = static_cast<float>(scale.number);
    if (!(grid.scale > 0.0f) || !std::isfinite(grid.scale)) {
      fail(where, ": scale ", scale.number, ", expected a positive fp32 number");
    }
    const auto within = [&](const char* key, int64_t value, int64_t least, int64_t most) {
      if (value < least || value > most) fail(where, ": ", key, " is ", value, ", expected ", least, " to ", most);
      return static_cast<int32_t>(value);
    };
    grid.low = within("low", low, -128, 255);
    grid.high = within("high", high, low, low < 0 ? 127 : 255);
    grid.zero_point = within("zero_point", zero_point, low, high);
    grid.is_signed = grid.low < 0;
    return grid;
  }

 private:
  int64_t bounded(const json::Value& value, std::string_view key, int64_t low, int64_t high) const {
    if (value.integer < low || value.integer > high) {
      fail(where_, ": ", key, " is ", value.integer, ", expected ", low, " to ", high);
    }
    return value.integer;
  }

  const json::Value* value_;
  std::string where_;
};

int64_t product(const Shape& shape) {
  int64_t all = 1;
  for (const int64_t size : shape) all *= size;  // sizes are checked to stay below kMaxElements
  return all;
}

void check_shape(const Shape& shape, const std::string& where) {
  if (shape.empty() || shape.size() > kMaxRank) {
    fail(where, ": shape ", shown(shape), ", expected 1 to ", kMaxRank, " sizes beside the batch");
  }
  int64_t all = 1;
  for (const int64_t size : shape) {
    if (size < 1) fail(where, ": shape ", shown(shape), " has a size below 1");
    if (size > kMaxElements / all) fail(where, ": shape ", shown(shape), " has more than ", kMaxElements, " elements");
    all *= size;
  }
}

class Reader {
 public:
  Reader(Manifest* manifest, int64_t version) : out_(*manifest), version_(version) {}

  // Each grid: scale, zero point, low, high.
  void read_grids(const json::Value* list) {
    if (list == nullptr) return;
    for (const json::Value& item : list->items) {
      const std::string where = text("grid ", grids_.size());
      bool whole = item.kind == json::Kind::kArray && item.items.size() == 4;
      for (size_t i = 1; whole && i < 4; ++i) whole = item.items[i].kind == json::Kind::kInteger;
      const auto number = [](json::Kind kind) { return kind == json::Kind::kNumber || kind == json::Kind::kInteger; };
      if (!whole || !number(item.items[0].kind)) fail(where, ": expected scale, zero point, low and high");
      const auto& v = item.items;
      grids_.push_back(Fields::checked_grid(where, v[0], v[2].integer, v[3].integer, v[1].integer));
    }
  }

  void read_tensors(const json::Value& list) {
    uint64_t at = 0;
    for (const json::Value& item : list.items) {
      if (item.kind == json::Kind::kArray) {
        Tensor tensor = short_tensor(item, text("tensor ", out_.tensors.size()));
        tensor.offset = aligned(at, tensor);
        at = tensor.offset + tensor.bytes;
        out_.tensors.push_back(std::move(tensor));
        continue;
      }
      const Fields fields(item, text("tensor ", out_.tensors.size()));
      Tensor tensor;
      tensor.name = fields.string("name");
      const Fields named(item, "tensor '" + tensor.name + "'");
      const std::string& type = named.string("dtype");
      if (type == "packed") {
        tensor.bits = static_cast<int>(named.integer("bits", 1, 8));
        tensor.is_signed = named.boolean("signed");
      } else if (type == "int32" || type == "float32" || type == "uint8") {
        tensor.type = type == "int32"     ? TensorType::kInt32
                      : type == "float32" ? TensorType::kFloat32
                                          : TensorType::kUint8;
        tensor.bits = tensor.type == TensorType::kUint8 ? 8 : 32;
      } else {
        fail(named.where(), ": dtype '", type, "', expected packed, int32, float32 or uint8");
      }
      tensor.shape = named.integers("shape", 1, kMaxElements);
      check_shape(tensor.shape, named.where());
      constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
      tensor.offset = static_cast<uint64_t>(named.integer("offset", 0, kLargest));
      tensor.bytes = static_cast<uint64_t>(named.integer("bytes", 0, kLargest));
      tensor.crc32 = static_cast<uint32_t>(named.integer("crc32", 0, std::numeric_limits<uint32_t>::max()));
      if (tensor.bytes != stored_bytes(tensor)) {
        fail(named.where(), ": ", tensor.bytes, " bytes, expected ", stored_bytes(tensor), " for ",
             shown(tensor.shape));
      }
      if (tensor.offset != aligned(at, tensor)) {
        fail(named.where(), ": offset ", tensor.offset, ", expected ", aligned(at, tensor),
             " (tensors follow each other without overlap or holes)");
      }
      // At most 2^20 values of a manifest times 2^32 bytes: no overflow.
      at = tensor.offset + tensor.bytes;
      add(std::move(tensor));
    }
  }

  void add(Tensor tensor) {
    const int index = static_cast<int>(out_.tensors.size());
    if (!tensors_.emplace(tensor.name, index).second) fail("tensor '", tensor.name, "' comes twice");
    out_.tensors.push_back(std::move(tensor));
  }

  void read_nodes(const json::Value& list) {
    if (list.items.empty()) fail("the package has no nodes");
    if (list.items.size() > kMaxNodes)
      fail("the package has ", list.items.size(), " nodes, expected at most ", kMaxNodes);
    for (const json::Value& item : list.items) read_node(item);
  }

  void read_outputs(const json::Value& list) {
    if (list.items.empty()) fail("the package has no outputs");
    if (list.items.size() > kMaxNodes) {
      fail("the package has ", list.items.size(), " outputs, expected at most ", kMaxNodes);
    }
    for (const json::Value& item : list.items) {
      if (item.kind != json::Kind::kString && item.kind != json::Kind::kInteger) {
        fail("outputs: ", kind_name(item.kind), ", expected names or numbers of nodes");
      }
      out_.outputs.push_back(index_of(item, "outputs"));
    }
  }

 private:
  uint64_t aligned(uint64_t at, const Tensor& tensor) const {
    const auto step = static_cast<uint64_t>(alignment(tensor, version_));
    return (at + step - 1) / step * step;
  }

  // Type, shape, checksum; it is named after the first node that reads it.
  static Tensor short_tensor(const json::Value& item, const std::string& where) {
    const auto& v = item.items;
    if (v.size() != 3 || v[0].kind != json::Kind::kString || v[1].kind != json::Kind::kArray ||
        v[2].kind != json::Kind::kInteger) {
      fail(where, ": expected a type, a shape and a checksum");
    }
    Tensor tensor;
    const std::string& type = v[0].string;
    if (type.size() == 4 && type.starts_with("int") && type[3] >= '1' && type[3] <= '8') {
      tensor.bits = type[3] - '0';
    } else if (type == "int32" || type == "float32") {
      tensor.type = type == "int32" ? TensorType::kInt32 : TensorType::kFloat32;
      tensor.bits = 32;
    } else if (type == "uint8") {
      tensor.type = TensorType::kUint8;
    } else {
      fail(where, ": type '", type, "', expected int1 to int8, int32, float32 or uint8");
    }
    for (const json::Value& size : v[1].items) {
      if (size.kind != json::Kind::kInteger) fail(where, ": its shape holds ", kind_name(size.kind));
      tensor.shape.push_back(size.integer);
    }
    check_shape(tensor.shape, where);
    tensor.bytes = stored_bytes(tensor);
    if (v[2].integer < 0 || v[2].integer > std::numeric_limits<uint32_t>::max()) {
      fail(where, ": crc32 is ", v[2].integer);
    }
    tensor.crc32 = static_cast<uint32_t>(v[2].integer);
    return tensor;
  }

  // A node by name or by number.
  int index_of(const json::Value& value, const std::string& where) const {
    if (value.kind != json::Kind::kInteger) return index_of(value.string, where);
    const auto known = static_cast<int64_t>(out_.nodes.size());
    if (value.integer < 0 || value.integer >= known) {
      fail(where, ": ", value.integer, " is no node before it, expected 0 to ", known - 1);
    }
    return static_cast<int>(value.integer);
  }
  int index_of(const std::string& name, const std::string& where) const {
    const auto found = nodes_.find(name);
    if (found == nodes_.end()) fail(where, ": '", name, "' is no node before it");
    return found->second;
  }

  // A tensor by name or by number; number `otherwise` where the key is left out.
  int tensor_of(const Fields& fields, std::string_view key, TensorType type, const char* expected,
                const std::string& owner, int otherwise = -1) {
    const json::Value* given = fields.find(key);
    int64_t index = otherwise;
    if (given == nullptr ? otherwise < 0 : given->kind != json::Kind::kInteger) {
      const std::string& name = fields.string(key);
      const auto found = tensors_.find(name);
      if (found == tensors_.end()) fail(fields.where(), ": ", key, " '", name, "' is no tensor of the package");
      index = found->second;
    } else if (given != nullptr) {
      index = given->integer;
    }
    const auto count = static_cast<int64_t>(out_.tensors.size());
    if (index < 0 || index >= count) {
      fail(fields.where(), ": ", key, " ", index, " is no tensor of the package, which has ", count);
    }
    Tensor& tensor = out_.tensors[static_cast<size_t>(index)];
    if (tensor.name.empty()) tensor.name = owner + "." + std::string(key);
    if (tensor.type != type) fail(fields.where(), ": ", key, " '", tensor.name, "' is not ", expected);
    return static_cast<int>(index);
  }

  // A grid by number or spelled out; without the key that of the first operand.
  CodeGrid grid_of(const Fields& fields, std::string_view key, const Node& node) const {
    const json::Value* given = fields.find(key);
    if (given == nullptr && version_ > 1 && key == "grid" && !node.inputs.empty()) {
      return out_.nodes[static_cast<size_t>(node.inputs[0])].grid;
    }
    if (given == nullptr || given->kind != json::Kind::kInteger) return fields.grid(key);
    const auto count = static_cast<int64_t>(grids_.size());
    return grids_[static_cast<size_t>(fields.integer(key, 0, count - 1))];
  }

  static const std::string& short_name(const Fields& fields, std::string_view key) {
    const std::string& name = fields.string(key);
    if (name.size() > kMaxNameBytes) {
      fail(fields.where(), ": ", key, " has ", name.size(), " bytes, expected at most ", kMaxNameBytes);
    }
    return name;
  }

  void read_node(const json::Value& item) {
    Node node;
    const int index = static_cast<int>(out_.nodes.size());
    node.name = short_name(Fields(item, text("node ", index)), "name");
    const Fields fields(item, "node '" + node.name + "'");
    const std::string& op = fields.string("op");
    const auto& table = op_table();
    const auto entry = std::find_if(table.begin(), table.end(), [&](const OpEntry& e) { return op == e.name; });
    if (entry == table.end()) {
      fail(fields.where(), ": operation '", op, "' is unknown to this mixbit; a newer one may have made the package");
    }
    node.op = entry->op;
    if ((index == 0) != (node.op == Op::kInput)) fail(fields.where(), ": the first node, and no other, is the input");
    for (const auto& member : item.members) {
      const auto known = [&](const auto& keys) {
        return std::find(keys.begin(), keys.end(), member.key) != keys.end();
      };
      if (!known(kNodeKeys) && !known(entry->keys)) fail(fields.where(), ": unknown key '", member.key, "'");
    }
    if (fields.find("module") != nullptr) node.module = short_name(fields, "module");
    if (node.op != Op::kInput && version_ > 1 && fields.find("inputs") == nullptr) {
      node.inputs.push_back(index - 1);
    } else if (node.op != Op::kInput) {
      for (const json::Value& input : fields.get("inputs", json::Kind::kArray).items) {
        if (input.kind != json::Kind::kString && input.kind != json::Kind::kInteger) {
          fail(fields.where(), ": inputs holds ", kind_name(input.kind));
        }
        node.inputs.push_back(index_of(input, fields.where()));
      }
    }
    if (node.op != Op::kInput) {
      const auto count = static_cast<int>(node.inputs.size());
      if (entry->inputs >= 0 ? count != entry->inputs : count < 1) {
        fail(fields.where(), ": ", count, " inputs, expected ", entry->inputs < 0 ? "at least 1" : text(entry->inputs));
      }
      operands_ += node.inputs.size();
      if (operands_ > kMaxOperands) {
        fail(fields.where(), ": nodes have more than ", kMaxOperands, " inputs together");
      }
    }
    node.grid = grid_of(fields, "grid", node);
    infer(fields, &node);
    check_shape(node.shape, fields.where());
    if (node.op != Op::kInput && fields.find("shape") != nullptr) {
      const Shape stated = fields.integers("shape", 1, kMaxElements);
      if (stated != node.shape) {
        fail(fields.where(), ": states shape ", shown(stated), ", but its operation makes ", shown(node.shape));
      }
    }
    if (!nodes_.emplace(node.name, index).second) fail("node '", node.name, "' comes twice");
    out_.nodes.push_back(std::move(node));
  }

  const Shape& input_shape(const Node& node, size_t i = 0) const {
    return out_.nodes[static_cast<size_t>(node.inputs[i])].shape;
  }
  const Shape& image(const Fields& fields, const Node& node) const {
    const Shape& x = input_shape(node);
    if (x.size() != 3) fail(fields.where(), ": its input has shape ", shown(x), ", expected channels, height, width");
    return x;
  }

  // Shape and options of a node.
  void infer(const Fields& fields, Node* node) {
    switch (node->op) {
      case Op::kInput:
        node->shape = fields.integers("shape", 1, kMaxElements);
        break;
      case Op::kConv2d:
        conv2d(fields, node);
        break;
      case Op::kLinear:
        linear(fields, node);
        break;
      case Op::kAdd:
      case Op::kMul:
        broadcast(fields, node);
        break;
      case Op::kCat:
        cat(fields, node);
        break;
      case Op::kAvgPool2d:
      case Op::kMaxPool2d:
        pool(fields, node);
        break;
      case Op::kReshape:
        reshape(fields, node);
        break;
      case Op::kSlice:
        slice(fields, node);
        break;
      case Op::kPad:
        pad(fields, node);
        break;
      case Op::kRepeat:
        node->repeats = fields.pair("counts", 1);
        node->shape = image(fields, *node);
        node->shape[1] *= node->repeats.h;
        node->shape[2] *= node->repeats.w;
        break;
      case Op::kRelu:
      case Op::kRelu6:
      case Op::kIdentity:
        node->shape = input_shape(*node);
        break;
      case Op::kLookup:
        node->shape = input_shape(*node);
        table(fields, node, TensorType::kUint8, "uint8");
        break;
      case Op::kSoftmax:
        node->shape = input_shape(*node);
        node->axis = axis_of(fields, *node);
        table(fields, node, TensorType::kInt32, "int32");
        break;
      case Op::kPermute:
        permute(fields, node);
        break;
      case Op::kPixelUnshuffle: {
        const Shape x = image(fields, *node);
        node->factor = fields.integer("factor", 1, kMaxStep);
        const int64_t f = node->factor;
        if (x[1] % f != 0 || x[2] % f != 0) fail(fields.where(), ": factor ", f, " does not divide ", shown(x));
        node->shape = {x[0] * f * f, x[1] / f, x[2] / f};
        break;
      }
    }
  }

  // Operands of equal rank; where one has the size 1 along an axis, its elements are repeated.
  void broadcast(const Fields& fields, Node* node) {
    const Shape &a = input_shape(*node), &b = input_shape(*node, 1);
    node->shape = a;
    bool fits = a.size() == b.size();
    for (size_t i = 0; fits && i < a.size(); ++i) {
      fits = a[i] == b[i] || a[i] == 1 || b[i] == 1;
      node->shape[i] = std::max(a[i], b[i]);
    }
    if (!fits) {
      fail(fields.where(), ": its operands have shapes ", shown(a), " and ", shown(b),
           ", expected equal ones but for sizes of 1");
    }
  }

  // An entry for every code of the input's grid.
  void table(const Fields& fields, Node* node, TensorType type, const char* expected) {
    node->table = tensor_of(fields, "table", type, expected, node->name);
    const CodeGrid& grid = out_.nodes[static_cast<size_t>(node->inputs[0])].grid;
    const Tensor& tensor = out_.tensors[static_cast<size_t>(node->table)];
    if (tensor.shape != Shape{grid.high - grid.low + 1}) {
      fail(fields.where(), ": table '", tensor.name, "' has shape ", shown(tensor.shape), ", expected ",
           shown({grid.high - grid.low + 1}));
    }
  }

  // A dimension counted with the batch, as the axis without it.
  static int axis_of(const Fields& fields, const Node& node) {
    const auto rank = static_cast<int64_t>(node.shape.size());
    int64_t dim = fields.integer("dim", -rank, rank);
    if (dim < 0) dim += rank + 1;
    if (dim < 1) fail(fields.where(), ": dim 0 is the batch");
    return static_cast<int>(dim - 1);
  }

  void permute(const Fields& fields, Node* node) {
    const Shape x = input_shape(*node);
    const auto rank = static_cast<int64_t>(x.size());
    const std::vector<int64_t> dims = fields.integers("dims", 0, rank);
    std::vector<bool> seen(x.size() + 1, false);
    for (const int64_t dim : dims) seen[static_cast<size_t>(dim)] = true;
    const bool all = std::find(seen.begin(), seen.end(), false) == seen.end();
    if (dims.size() != x.size() + 1 || !all || dims[0] != 0) {
      fail(fields.where(), ": dims ", shown(dims), ", expected 0 and an order of 1 to ", rank);
    }
    for (size_t i = 1; i < dims.size(); ++i) {
      node->order.push_back(static_cast<int>(dims[i] - 1));
      node->shape.push_back(x[static_cast<size_t>(dims[i] - 1)]);
    }
  }

  void layer_tensors(const Fields& fields, Node* node, size_t rank) {
    node->act = grid_of(fields, "act", *node);
    node->act_bits =
        std::max(1, static_cast<int>(std::bit_width(static_cast<unsigned>(node->act.high - node->act.low))));
    const std::string& owner = node->module.empty() ? node->name : node->module;
    node->weight = tensor_of(fields, "weight", TensorType::kPacked, "packed", owner);
    const int next = version_ > 1 ? node->weight + 1 : -1;
    node->bias = tensor_of(fields, "bias", TensorType::kInt32, "int32", owner, next);
    node->multiplier =
        tensor_of(fields, "multiplier", TensorType::kFloat32, "float32", node->name, next < 0 ? -1 : next + 1);
    const Tensor& weight = out_.tensors[static_cast<size_t>(node->weight)];
    if (!weight.is_signed) fail(fields.where(), ": weight '", weight.name, "' is unsigned, expected signed codes");
    if (weight.shape.size() != rank) {
      fail(fields.where(), ": weight '", weight.name, "' has shape ", shown(weight.shape), ", expected ", rank,
           " sizes");
    }
    for (const int index : {node->bias, node->multiplier}) {
      const Tensor& tensor = out_.tensors[static_cast<size_t>(index)];
      if (tensor.shape != Shape{weight.shape[0]}) {
        fail(fields.where(), ": '", tensor.name, "' has shape ", shown(tensor.shape), ", expected ",
             shown({weight.shape[0]}));
      }
    }
  }

  // Outputs along an axis; below 1 where the window does not fit.
  static int64_t windows(int64_t size, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }

  void conv2d(const Fields& fields, Node* node) {
    const Shape x = image(fields, *node);
    // The weight's last two sizes are one row: packed rows are output channels.
    layer_tensors(fields, node, 4);
    const Shape& w = out_.tensors[static_cast<size_t>(node->weight)].shape;
    node->kernel = {w[2], w[3]};
    if (version_ > 1) {
      node->stride = fields.pair("stride", 1, {1, 1});
      node->padding = fields.pair("padding", 0, {0, 0});
      node->dilation = fields.pair("dilation", 1, {1, 1});
      node->groups = fields.find("groups") == nullptr ? 1 : fields.integer("groups", 1, kMaxStep);
    } else {
      node->stride = fields.pair("stride", 1);
      node->padding = fields.pair("padding", 0);
      node->dilation = fields.pair("dilation", 1);
      node->groups = fields.integer("groups", 1, kMaxStep);
    }
    if (x[0] % node->groups != 0 || w[0] % node->groups != 0 || w[1] != x[0] / node->groups) {
      fail(fields.where(), ": ", x[0], " channels in ", node->groups, " groups and a weight of shape ", shown(w),
           " do not fit");
    }
    if (w[2] > kMaxStep || w[3] > kMaxStep) fail(fields.where(), ": kernel of ", w[2], " x ", w[3]);
    node->shape = {w[0], windows(x[1], node->padding.h, w[2], node->stride.h, node->dilation.h),
                   windows(x[2], node->padding.w, w[3], node->stride.w, node->dilation.w)};
  }

  void linear(const Fields& fields, Node* node) {
    layer_tensors(fields, node, 2);
    node->shape = input_shape(*node);
    const Shape& w = out_.tensors[static_cast<size_t>(node->weight)].shape;
    if (node->shape.back() != w[1]) {
      fail(fields.where(), ": its input has ", node->shape.back(), " features, its weight ", w[1]);
    }
    node->shape.back() = w[0];
  }

  void cat(const Fields& fields, Node* node) {
    node->shape = input_shape(*node);
    for (size_t i = 1; i < node->inputs.size(); ++i) {
      Shape other = input_shape(*node, i);
      const int64_t channels = other[0];
      other[0] = node->shape[0];
      if (other != node->shape) {
        other[0] = channels;
        fail(fields.where(), ": operands of shapes ", shown(node->shape), " and ", shown(other), " do not fit");
      }
      node->shape[0] += channels;
      check_shape(node->shape, fields.where());
    }
  }

  void pool(const Fields& fields, Node* node) {
    const Shape x = image(fields, *node);
    const bool average = node->op == Op::kAvgPool2d;
    if (average && fields.find("kernel") == nullptr) {
      if (x[1] * x[2] > kMaxStep) fail(fields.where(), ": an image of more than ", kMaxStep, " elements");
      node->global = true;
      node->kernel = node->stride = {x[1], x[2]};
      node->shape = {x[0]};
      if (fields.boolean("keepdim")) node->shape = {x[0], 1, 1};
      return;
    }
    node->kernel = fields.pair("kernel", 1);
    node->stride = fields.pair("stride", 1);
    node->padding = fields.pair("padding", 0);
    if (average) {
      node->count_include_pad = fields.boolean("count_include_pad");
    } else {
      node->dilation = fields.pair("dilation", 1);
      node->ceil_mode = fields.boolean("ceil_mode");
    }
    if (node->kernel.h * node->kernel.w > kMaxStep)
      fail(fields.where(), ": window of more than ", kMaxStep, " elements");
    node->shape = {x[0], pooled(fields, *node, x[1], node->kernel.h, node->stride.h, node->padding.h, node->dilation.h),
                   pooled(fields, *node, x[2], node->kernel.w, node->stride.w, node->padding.w, node->dilation.w)};
  }

  static int64_t pooled(const Fields& fields, const Node& node, int64_t size, int64_t kernel, int64_t stride,
                        int64_t pad, int64_t dilation) {
    if (2 * pad > kernel) fail(fields.where(), ": padding ", pad, " is more than half of the window ", kernel);
    int64_t count = windows(size, pad, kernel, stride, dilation);
    if (node.ceil_mode) {
      const int64_t span = dilation * (kernel - 1) + 1;
      const int64_t room = std::max<int64_t>(0, size + 2 * pad - span);
      count = (room + stride - 1) / stride + 1;
      // A window must start inside the input or its left padding.
      if (count > 1 && (count - 1) * stride >= size + pad) --count;
    }
    // Each window reads an element: its first inside is the first multiple of the dilation past the padding.
    for (const int64_t window : {int64_t{0}, count - 1}) {
      const int64_t start = window * stride - pad;
      const int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
      if (count < 1 || skipped >= kernel || start + skipped * dilation >= size) {
        fail(fields.where(), ": a window of ", kernel, " holds no element of the input's ", size);
      }
    }
    return count;
  }

  void reshape(const Fields& fields, Node* node) {
    const int64_t all = product(input_shape(*node));
    node->shape = fields.integers("to", -1, kMaxElements);
    if (node->shape.size() > kMaxRank) fail(fields.where(), ": more than ", kMaxRank, " sizes");
    int64_t known = 1;
    int64_t* open = nullptr;
    for (int64_t& size : node->shape) {
      if (size == -1 && open == nullptr) {
        open = &size;
      } else if (size < 1 || size > kMaxElements / known) {
        fail(fields.where(), ": sizes ", shown(node->shape));
      } else {
        known *= size;
      }
    }
    if (open != nullptr && all % known == 0) *open = all / known;
    if (open == nullptr ? known != all : all % known != 0) {
      fail(fields.where(), ": ", all, " elements do not become ", shown(node->shape));
    }
  }

  void slice(const Fields& fields, Node* node) {
    node->shape = input_shape(*node);
    node->axis = axis_of(fields, *node);
    int64_t& size = node->shape[static_cast<size_t>(node->axis)];
    // As Python has it: from the end where negative, cut to what is there.
    const auto place = [&](std::string_view key, int64_t otherwise) {
      const json::Value* given = fields.find(key);
      if (given == nullptr || given->kind == json::Kind::kNull) return otherwise;
      const int64_t at = fields.integer(key, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
      return at < 0 ? std::max<int64_t>(0, at + size) : std::min(at, size);
    };
    node->start = place("start", 0);
    const int64_t end = place("end", size);
    node->step = fields.integer("step", 1, kMaxElements);
    node->count = node->start < end ? (end - node->start - 1) / node->step + 1 : 0;
    size = node->count;
  }

  void pad(const Fields& fields, Node* node) {
    node->shape = input_shape(*node);
    const size_t rank = node->shape.size();
    const std::vector<int64_t> amounts = fields.integers("amounts", 0, kMaxStep);
    if (amounts.size() % 2 != 0 || amounts.size() / 2 > rank) {
      fail(fields.where(), ": ", amounts.size(), " amounts, expected pairs for at most ", rank, " dimensions");
    }
    node->before.assign(rank, 0);
    node->after.assign(rank, 0);
    for (size_t i = 0; i < amounts.size() / 2; ++i) {
      const size_t axis = rank - 1 - i;  // pairs from the last dimension backwards
      node->before[axis] = amounts[2 * i];
      node->after[axis] = amounts[2 * i + 1];
      node->shape[axis] += amounts[2 * i] + amounts[2 * i + 1];
    }
  }

  Manifest& out_;
  int64_t version_;
  size_t operands_ = 0;
  std::vector<CodeGrid> grids_;
  std::unordered_map<std::string, int> nodes_;
  std::unordered_map<std::string, int> tensors_;
};

}  // namespace

const char* op_name(Op op) {
  for (const OpEntry& entry : op_table()) {
    if (entry.op == op) return entry.name;
  }
  return "?";
}

int64_t Tensor::elements() const { return product(shape); }

uint64_t stored_bytes(const Tensor& tensor) {
  if (tensor.type == TensorType::kUint8) return static_cast<uint64_t>(tensor.elements());
  if (tensor.type != TensorType::kPacked) return static_cast<uint64_t>(tensor.elements()) * 4;
  const int64_t rows = tensor.shape[0];
  return static_cast<uint64_t>(rows * packed_bytes(tensor.elements() / rows, tensor.bits));
}

Manifest read_manifest(const json::Value& document, int64_t version) {
  const Fields fields(document, "the manifest");
  for (const auto& member : document.members) {
    constexpr std::array<std::string_view, 7> kKeys = {"format",  "version", "made_by", "nodes",
                                                       "outputs", "tensors", "grids"};
    if (std::find(kKeys.begin(), kKeys.end(), member.key) == kKeys.end()) {
      fail("the manifest: unknown key '", member.key, "'");
    }
  }
  if (fields.string("format") != "mixbit-package") fail("the manifest: format is no mixbit-package");
  if (fields.integer("version", 1, std::numeric_limits<int64_t>::max()) != version) {
    fail("the manifest: its version is not the file's");
  }
  Manifest manifest;
  Reader reader(&manifest, version);
  if (fields.find("grids") != nullptr) reader.read_grids(&fields.get("grids", json::Kind::kArray));
  reader.read_tensors(fields.get("tensors", json::Kind::kArray));
  reader.read_nodes(fields.get("nodes", json::Kind::kArray));
  reader.read_outputs(fields.get("outputs", json::Kind::kArray));
  return manifest;
}

Manifest complete_manifest(const json::Value& document, std::vector<Tensor> tensors) {
  const Fields fields(document, "the manifest");
  Manifest manifest;
  Reader reader(&manifest, kFormatVersion);
  for (Tensor& tensor : tensors) {
    check_shape(tensor.shape, "tensor '" + tensor.name + "'");
    reader.add(std::move(tensor));
  }
  reader.read_nodes(fields.get("nodes", json::Kind::kArray));
  reader.read_outputs(fields.get("outputs", json::Kind::kArray));
  return manifest;
}

int64_t alignment(const Tensor& tensor, int64_t version) {
  if (version == 1 || tensor.type == TensorType::kPacked) return kFileAlignment;
  return tensor.type == TensorType::kUint8 ? 1 : 4;
}

namespace {

// The double that prints as the shortest decimal which reads back as the fp32 number.
json::Value short_number(float value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  double number = value;
  std::from_chars(text.data(), end, number);
  return json::Value::of(static_cast<float>(number) == value ? number : static_cast<double>(value));
}

json::Value object() {
  json::Value value;
  value.kind = json::Kind::kObject;
  return value;
}

void copy_key(const json::Value& from, std::string_view key, json::Value* to) {
  if (const json::Value* found = from.find(key)) to->set(key, *found);
}

// The other keys of a node: options of its operation.
void copy_options(const json::Value& from, json::Value* to) {
  constexpr std::array<std::string_view, 11> kHandled = {"name",  "op",     "module", "inputs",     "grid", "act",
                                                         "shape", "weight", "bias",   "multiplier", "table"};
  for (const auto& member : from.members) {
    if (std::find(kHandled.begin(), kHandled.end(), member.key) == kHandled.end()) to->set(member.key, member.value);
  }
}

json::Value grid_entry(const CodeGrid& grid) {
  json::Value entry = object();
  entry.set("scale", json::Value::of(static_cast<double>(grid.scale)));
  entry.set("zero_point", json::Value::of(int64_t{grid.zero_point}));
  entry.set("low", json::Value::of(int64_t{grid.low}));
  entry.set("high", json::Value::of(int64_t{grid.high}));
  return entry;
}

json::Value tensor_entry(const Tensor& tensor) {
  json::Value entry;
  entry.kind = json::Kind::kObject;
  entry.set("name", json::Value::of(std::string_view(tensor.name)));
  if (tensor.type == TensorType::kPacked) {
    entry.set("dtype", json::Value::of(std::string_view("packed")));
    entry.set("bits", json::Value::of(int64_t{tensor.bits}));
    entry.set("signed", json::Value::of(tensor.is_signed));
  } else {
    const bool bytes = tensor.type == TensorType::kUint8;
    const char* words = tensor.type == TensorType::kInt32 ? "int32" : "float32";
    entry.set("dtype", json::Value::of(std::string_view(bytes ? "uint8" : words)));
  }
  entry.set("shape", json::Value::array(tensor.shape));
  entry.set("offset", json::Value::of(static_cast<int64_t>(tensor.offset)));
  entry.set("bytes", json::Value::of(static_cast<int64_t>(tensor.bytes)));
  entry.set("crc32", json::Value::of(int64_t{tensor.crc32}));
  return entry;
}

// Grids in the order in which they first appear.
class GridList {
 public:
  int64_t index(const CodeGrid& grid) {
    for (size_t i = 0; i < grids_.size(); ++i) {
      const CodeGrid& g = grids_[i];
      if (g.scale == grid.scale && g.zero_point == grid.zero_point && g.low == grid.low && g.high == grid.high) {
        return static_cast<int64_t>(i);
      }
    }
    grids_.push_back(grid);
    json::Value entry = json::Value::array({grid.zero_point, grid.low, grid.high});
    entry.items.insert(entry.items.begin(), short_number(grid.scale));
    list.items.push_back(std::move(entry));
    return static_cast<int64_t>(grids_.size()) - 1;
  }

  json::Value list = json::Value::array({});

 private:
  std::vector<CodeGrid> grids_;
};

bool same_grid(const CodeGrid& a, const CodeGrid& b) {
  return a.scale == b.scale && a.zero_point == b.zero_point && a.low == b.low && a.high == b.high;
}

}  // namespace

json::Value short_manifest(const json::Value& document, const Manifest& manifest) {
  GridList grids;
  json::Value nodes = json::Value::array({});
  const std::vector<json::Value>& given = document.find("nodes")->items;
  for (size_t i = 0; i < manifest.nodes.size(); ++i) {
    const Node& node = manifest.nodes[i];
    json::Value entry = object();
    copy_key(given[i], "name", &entry);
    copy_key(given[i], "op", &entry);
    if (!node.module.empty()) copy_key(given[i], "module", &entry);
    const bool follows = node.inputs.size() == 1 && node.inputs[0] == static_cast<int>(i) - 1;
    if (node.op == Op::kInput) {
      copy_key(given[i], "shape", &entry);
    } else if (!follows) {
      entry.set("inputs", json::Value::array({node.inputs.begin(), node.inputs.end()}));
    }
    if (node.inputs.empty() || !same_grid(node.grid, manifest.nodes[static_cast<size_t>(node.inputs[0])].grid)) {
      entry.set("grid", json::Value::of(grids.index(node.grid)));
    }
    if (node.weight >= 0) {
      entry.set("act", json::Value::of(grids.index(node.act)));
      entry.set("weight", json::Value::of(int64_t{node.weight}));
      if (node.bias != node.weight + 1) entry.set("bias", json::Value::of(int64_t{node.bias}));
      if (node.multiplier != node.weight + 2) entry.set("multiplier", json::Value::of(int64_t{node.multiplier}));
    }
    if (node.table >= 0) entry.set("table", json::Value::of(int64_t{node.table}));
    copy_options(given[i], &entry);
    if (node.op == Op::kConv2d) {
      const auto usual = [&](std::string_view key, const Pair& value, int64_t otherwise) {
        if (value.h == otherwise && value.w == otherwise) entry.remove(key);
      };
      usual("stride", node.stride, 1);
      usual("padding", node.padding, 0);
      usual("dilation", node.dilation, 1);
      usual("groups", {node.groups, node.groups}, 1);
    }
    nodes.items.push_back(std::move(entry));
  }
  json::Value tensors = json::Value::array({});
  for (const Tensor& tensor : manifest.tensors) {
    std::string type = tensor.type == TensorType::kInt32     ? "int32"
                       : tensor.type == TensorType::kFloat32 ? "float32"
                       : tensor.type == TensorType::kUint8   ? "uint8"
                                                             : "int" + std::to_string(tensor.bits);
    json::Value entry = json::Value::array({});
    entry.items = {json::Value::of(std::string_view(type)), json::Value::array(tensor.shape),
                   json::Value::of(int64_t{tensor.crc32})};
    tensors.items.push_back(std::move(entry));
  }
  json::Value out = object();
  out.set("format", json::Value::of(std::string_view("mixbit-package")));
  out.set("version", json::Value::of(int64_t{kFormatVersion}));
  copy_key(document, "made_by", &out);
  out.set("grids", std::move(grids.list));
  out.set("nodes", std::move(nodes));
  out.set("outputs", json::Value::array({manifest.outputs.begin(), manifest.outputs.end()}));
  out.set("tensors", std::move(tensors));
  return out;
}

json::Value long_manifest(const json::Value& document, const Manifest& manifest) {
  const auto name_of = [&](int node) {
    return json::Value::of(std::string_view(manifest.nodes[static_cast<size_t>(node)].name));
  };
  const auto tensor_name = [&](int tensor) {
    return json::Value::of(std::string_view(manifest.tensors[static_cast<size_t>(tensor)].name));
  };
  const auto names_of = [&](const std::vector<int>& indices) {
    json::Value names = json::Value::array({});
    for (const int index : indices) names.items.push_back(name_of(index));
    return names;
  };
  json::Value nodes = json::Value::array({});
  const std::vector<json::Value>& given = document.find("nodes")->items;
  for (size_t i = 0; i < manifest.nodes.size(); ++i) {
    const Node& node = manifest.nodes[i];
    json::Value entry = object();
    copy_key(given[i], "name", &entry);
    copy_key(given[i], "op", &entry);
    copy_key(given[i], "module", &entry);
    if (node.op != Op::kInput) entry.set("inputs", names_of(node.inputs));
    entry.set("shape", json::Value::array(node.shape));
    entry.set("grid", grid_entry(node.grid));
    if (node.weight >= 0) {
      entry.set("act", grid_entry(node.act));
      entry.set("weight", tensor_name(node.weight));
      entry.set("bias", tensor_name(node.bias));
      entry.set("multiplier", tensor_name(node.multiplier));
    }
    if (node.table >= 0) entry.set("table", tensor_name(node.table));
    if (node.op == Op::kConv2d) {
      entry.set("stride", json::Value::array({node.stride.h, node.stride.w}));
      entry.set("padding", json::Value::array({node.padding.h, node.padding.w}));
      entry.set("dilation", json::Value::array({node.dilation.h, node.dilation.w}));
      entry.set("groups", json::Value::of(node.groups));
    }
    copy_options(given[i], &entry);
    nodes.items.push_back(std::move(entry));
  }
  json::Value tensors = json::Value::array({});
  for (const Tensor& tensor : manifest.tensors) tensors.items.push_back(tensor_entry(tensor));
  json::Value out = object();
  for (const std::string_view key : {"format", "version", "made_by"}) copy_key(document, key, &out);
  out.set("nodes", std::move(nodes));
  out.set("outputs", names_of(manifest.outputs));
  out.set("tensors", std::move(tensors));
  return out;
}

}  // namespace mixbit::runtime
