#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>

#include <mixbit/common/crc32.h>
#include <mixbit/common/packing.h>
#include <mixbit/runtime/package.h>

#include "json.h"
#include "manifest.h"
#include "text.h"

namespace mixbit::runtime {
namespace {

static_assert(std::endian::native == std::endian::little, "packages are mapped as they are: little end first");

// exp(0) in the tables of a softmax.
constexpr int32_t kUnitPower = 65536;

// The first byte is no text, and the line ends would not survive a transfer as text (as PNG has it).
constexpr std::array<uint8_t, 8> kMagic = {0x89, 'M', 'X', 'B', '\r', '\n', 0x1A, '\n'};

struct Header {
  std::array<uint8_t, 8> magic;
  uint32_t version;
  uint32_t manifest_crc32;
  uint64_t manifest_bytes;
  uint64_t file_bytes;
};
static_assert(sizeof(Header) == 32);

uint64_t aligned(uint64_t at) { return (at + kFileAlignment - 1) / kFileAlignment * kFileAlignment; }

class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    // Without waiting for the other end of a pipe, which is refused below.
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) fail("cannot open '", path, "': ", std::strerror(errno));
    struct stat status {};
    if (::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(file);
      fail("cannot read '", path, "': it is no regular file");
    }
    size_ = static_cast<size_t>(status.st_size);
    if (size_ > 0) {
      address_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int error = errno;
    ::close(file);
    if (address_ == MAP_FAILED) {
      address_ = nullptr;
      fail("cannot map '", path, "': ", std::strerror(error));
    }
  }
  ~Mapping() {
    if (address_ != nullptr) ::munmap(address_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const uint8_t> bytes() const { return {static_cast<const uint8_t*>(address_), size_}; }

  // Pages that lie wholly in a part of the file leave this process's memory; a later read brings them back.
  void release(std::span<const uint8_t> part) const {
    static const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const auto start = static_cast<size_t>(part.data() - bytes().data());
    const size_t first = (start + page - 1) / page * page, last = (start + part.size()) / page * page;
    if (first < last) ::madvise(static_cast<uint8_t*>(address_) + first, last - first, MADV_DONTNEED);
  }

 private:
  void* address_ = nullptr;
  size_t size_ = 0;
};

void check_zero(std::span<const uint8_t> padding) {
  if (std::any_of(padding.begin(), padding.end(), [](uint8_t byte) { return byte != 0; })) {
    fail("the package has bytes other than 0 between its parts");
  }
}

template <typename T>
std::vector<T> copied(std::span<const uint8_t> bytes) {
  std::vector<T> out(bytes.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

}  // namespace

Package Package::open(const std::string& path) {
  const auto mapping = std::make_shared<Mapping>(path);
  try {
    Package package = parse(mapping->bytes());
    package.memory_ = mapping;
    package.mapped_ = true;
    return package;
  } catch (const Error& error) {
    fail("'", path, "': ", error.what());
  }
}

Package Package::own(std::vector<uint8_t> bytes) {
  const auto memory = std::make_shared<const std::vector<uint8_t>>(std::move(bytes));
  Package package = parse(*memory);
  package.memory_ = memory;
  return package;
}

Package Package::parse(std::span<const uint8_t> bytes) {
  Header header;
  if (bytes.size() < sizeof(header) || !std::equal(kMagic.begin(), kMagic.end(), bytes.begin())) {
    fail("no mixbit package: it does not start as one");
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.version == 0 || header.version > kFormatVersion) {
    fail("the package has format version ", header.version, ", this mixbit reads 1 to ", kFormatVersion,
         "; upgrade mixbit or export the package again");
  }
  if (header.file_bytes != bytes.size()) {
    fail("the package has ", bytes.size(), " bytes, expected ", header.file_bytes, ": it was cut or added to");
  }
  if (header.manifest_bytes > kMaxManifestBytes || header.manifest_bytes > bytes.size() - sizeof(header)) {
    fail("the package's manifest has ", header.manifest_bytes, " bytes, expected at most ",
         std::min<uint64_t>(kMaxManifestBytes, bytes.size() - sizeof(header)));
  }
  const auto manifest = bytes.subspan(sizeof(header), header.manifest_bytes);
  if (crc32(manifest) != header.manifest_crc32) fail("the package's manifest is damaged: its checksum differs");

  Package package;
  package.bytes_ = bytes;
  package.manifest_ = {reinterpret_cast<const char*>(manifest.data()), manifest.size()};
  Manifest read = read_manifest(json::parse(package.manifest_, "the manifest"), header.version);
  package.nodes_ = std::move(read.nodes);
  package.tensors_ = std::move(read.tensors);
  package.outputs_ = std::move(read.outputs);

  // Offsets follow each other (the manifest's reader checks it), so that exact sizes leave nothing out.
  uint64_t at = sizeof(header) + header.manifest_bytes;
  package.data_start_ = aligned(at);
  for (size_t i = 0; i < package.tensors_.size(); ++i) {
    Tensor& tensor = package.tensors_[i];
    if (tensor.name.empty()) tensor.name = text("number ", i);  // nobody reads it
    const uint64_t start = package.data_start_ + tensor.offset;
    if (start > bytes.size() || tensor.bytes > bytes.size() - start) {
      fail("tensor '", tensor.name, "' ends beyond the package's ", bytes.size(), " bytes");
    }
    check_zero(bytes.subspan(at, start - at));
    at = start + tensor.bytes;
    if (crc32(package.data(static_cast<int>(i))) != tensor.crc32) {
      fail("tensor '", tensor.name, "' is damaged: its checksum differs");
    }
  }
  if (at != bytes.size()) {
    fail("the package's tensors end at byte ", at, ", expected ", bytes.size());
  }
  return package;
}

std::string Package::manifest() const {
  const json::Value document = json::parse(manifest_, "the manifest");
  return json::dump(long_manifest(document, {nodes_, tensors_, outputs_}));
}

std::span<const uint8_t> Package::data(int tensor) const {
  const Tensor& entry = tensors_.at(static_cast<size_t>(tensor));
  return bytes_.subspan(data_start_ + entry.offset, entry.bytes);
}

void Package::release(int tensor) const {
  if (mapped_) std::static_pointer_cast<const Mapping>(memory_)->release(data(tensor));
}

std::vector<int8_t> Package::codes(int tensor) const {
  const Tensor& entry = tensors_.at(static_cast<size_t>(tensor));
  if (entry.type != TensorType::kPacked) fail("tensor '", entry.name, "' is not packed");
  if (entry.bits == 8) return copied<int8_t>(data(tensor));
  std::vector<int8_t> out(static_cast<size_t>(entry.elements()));
  const int64_t rows = entry.shape[0];
  const int64_t n = entry.elements() / rows;
  const int64_t stride = packed_bytes(n, entry.bits);
  const uint8_t* packed = data(tensor).data();
  for (int64_t row = 0; row < rows; ++row) {
    unpack_row(packed + row * stride, entry.bits, entry.is_signed, 0, n, out.data() + row * n);
  }
  return out;
}

void Package::check_layer(const Node& layer) const {
  const Tensor& weight = tensors_.at(static_cast<size_t>(layer.weight));
  const std::vector<int32_t> bias = int32s(layer.bias);
  const int64_t largest = std::max(layer.act.high - layer.act.zero_point, layer.act.zero_point - layer.act.low);
  const auto rows = static_cast<int64_t>(bias.size());
  const int64_t n = weight.elements() / rows;
  const int64_t stride = packed_bytes(n, weight.bits);
  std::vector<int8_t> row(static_cast<size_t>(n));
  const uint8_t* packed = data(layer.weight).data();
  // What no code of this width exceeds; nearly always it fits, and no weight need be read.
  const int64_t bound = n * (int64_t{1} << (weight.bits - 1)) * largest;
  for (int64_t channel = 0; channel < rows; ++channel) {
    const int64_t own_bias = std::abs(int64_t{bias[static_cast<size_t>(channel)]});
    if (bound + own_bias <= std::numeric_limits<int32_t>::max()) continue;
    unpack_row(packed + channel * stride, weight.bits, weight.is_signed, 0, n, row.data());
    int64_t sum = 0;
    for (const int8_t code : row) sum += std::abs(int{code});
    // A tensor has at most 2^30 elements: sum * largest stays below 2^46.
    const int64_t reach = sum * largest + own_bias;
    if (reach > std::numeric_limits<int32_t>::max()) {
      fail("node '", layer.name, "': its accumulator can exceed 32 bits (up to ", reach, ")");
    }
  }
}

void Package::check_table(const Node& node) const {
  if (node.op == Op::kLookup) {
    for (const uint8_t byte : data(node.table)) {
      const int32_t code = node.grid.is_signed ? static_cast<int8_t>(byte) : byte;
      if (code < node.grid.low || code > node.grid.high) {
        fail("node '", node.name, "': its table holds the code ", code, ", expected ", node.grid.low, " to ",
             node.grid.high);
      }
    }
    return;
  }
  // The largest code of a line has the distance 0: no sum is 0.
  const std::vector<int32_t> powers = int32s(node.table);
  for (const int32_t power : powers) {
    if (powers[0] != kUnitPower || power < 0 || power > kUnitPower) {
      fail("node '", node.name, "': its table begins with ", powers[0], " and holds ", power, ", expected ", kUnitPower,
           " and numbers from 0 to it");
    }
  }
}

std::vector<int32_t> Package::int32s(int tensor) const {
  const Tensor& entry = tensors_.at(static_cast<size_t>(tensor));
  if (entry.type != TensorType::kInt32) fail("tensor '", entry.name, "' is not int32");
  return copied<int32_t>(data(tensor));
}

std::vector<float> Package::floats(int tensor) const {
  const Tensor& entry = tensors_.at(static_cast<size_t>(tensor));
  if (entry.type != TensorType::kFloat32) fail("tensor '", entry.name, "' is not float32");
  std::vector<float> out = copied<float>(data(tensor));
  for (const float value : out) {
    if (!std::isfinite(value)) fail("tensor '", entry.name, "' holds ", value, ", expected finite numbers");
  }
  return out;
}

std::vector<uint8_t> Package::bytes(int tensor) const {
  const Tensor& entry = tensors_.at(static_cast<size_t>(tensor));
  if (entry.type != TensorType::kUint8) fail("tensor '", entry.name, "' is not uint8");
  return copied<uint8_t>(data(tensor));
}

std::vector<uint8_t> make_package(std::string_view manifest, std::span<const Array> arrays) {
  json::Value document = json::parse(manifest, "the manifest");
  std::vector<Tensor> tensors;
  for (const Array& array : arrays) {
    const bool packed = array.type == TensorType::kPacked;
    if (packed && (array.bits < 1 || array.bits > 8)) {
      fail("tensor '", array.name, "': ", array.bits, " bits, expected 1 to 8");
    }
    Tensor tensor;
    tensor.name = array.name;
    tensor.type = array.type;
    tensor.bits = packed ? array.bits : array.type == TensorType::kUint8 ? 8 : 32;
    tensor.shape = array.shape;
    tensors.push_back(std::move(tensor));
  }
  Manifest complete = complete_manifest(document, tensors);

  std::vector<uint8_t> data;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor& tensor = tensors[i];
    const auto step = static_cast<uint64_t>(alignment(tensor, kFormatVersion));
    data.resize((data.size() + step - 1) / step * step);
    tensor.offset = data.size();
    tensor.bytes = stored_bytes(tensor);
    data.resize(tensor.offset + tensor.bytes);
    uint8_t* out = data.data() + tensor.offset;
    if (tensor.type == TensorType::kPacked) {
      const auto* codes = static_cast<const int8_t*>(arrays[i].data);
      const int64_t rows = tensor.shape[0];
      const int64_t n = tensor.elements() / rows;
      const int64_t stride = packed_bytes(n, tensor.bits);
      const int half = 1 << (tensor.bits - 1);
      for (int64_t k = 0; k < rows * n; ++k) {
        if (codes[k] < -half || codes[k] >= half) {
          fail("tensor '", tensor.name, "' holds the code ", int{codes[k]}, ", expected ", -half, " to ", half - 1);
        }
      }
      for (int64_t row = 0; row < rows; ++row) pack_row(codes + row * n, n, tensor.bits, 0, stride, out + row * stride);
    } else {
      std::memcpy(out, arrays[i].data, tensor.bytes);
    }
    tensor.crc32 = crc32({out, tensor.bytes});
  }
  complete.tensors = tensors;
  const std::string text = json::dump(short_manifest(document, complete));
  Header header{};
  header.magic = kMagic;
  header.version = kFormatVersion;
  header.manifest_bytes = text.size();
  header.manifest_crc32 = crc32({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  const uint64_t data_start = aligned(sizeof(header) + text.size());
  std::vector<uint8_t> bytes(data_start + data.size());
  if (data.empty()) bytes.resize(sizeof(header) + text.size());
  header.file_bytes = bytes.size();
  std::memcpy(bytes.data(), &header, sizeof(header));
  std::memcpy(bytes.data() + sizeof(header), text.data(), text.size());
  if (!data.empty()) std::memcpy(bytes.data() + data_start, data.data(), data.size());

  // What was written is what will be read.
  const Package package = Package::parse(bytes);
  for (const Node& node : package.nodes()) {
    if (node.table >= 0) package.check_table(node);
    if (node.weight < 0) continue;
    package.check_layer(node);
    package.floats(node.multiplier);
  }
  return bytes;
}

}  // namespace mixbit::runtime
