#include <mixbit/runtime/network.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>

#include <mixbit/common/packing.h>
#include <mixbit/runtime/kernels.h>

#include "text.h"
#include "threads.h"

namespace mixbit::runtime {
namespace {

constexpr int kMaxThreads = 1024;
// Images are taken together while their values stay within a core's cache.
constexpr int64_t kBytesInFlight = int64_t{2} << 20;
constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool same_grid(const CodeGrid& a, const CodeGrid& b) {
  return a.scale == b.scale && a.zero_point == b.zero_point && a.low == b.low && a.high == b.high;
}

// What relu or relu6 leaves of a grid's codes.
CodeGrid rectified(CodeGrid grid, Op op) {
  if (op == Op::kRelu6) {
    const float steps = 6.0f / grid.scale;
    // Beyond 2^20 steps no code of a byte is cut.
    const int32_t six = static_cast<int32_t>(round_half_even(std::min(steps, 1048576.0f))) + grid.zero_point;
    grid.high = std::min(grid.high, six);
  }
  grid.low = std::max(grid.low, grid.zero_point);
  return grid;
}

int64_t elements(const Shape& shape) {
  int64_t all = 1;
  for (const int64_t size : shape) all *= size;
  return all;
}

// Values with three sizes are images: channels, height, width, stored as height, width, channels. Everything else is
// stored row by row.
Shape strides_of(const Shape& shape, bool rows) {
  Shape strides(shape.size(), 1);
  if (shape.size() == 3 && !rows) return {1, shape[2] * shape[0], shape[0]};
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  return strides;
}
bool stored_row_by_row(const Shape& shape) {
  return shape.size() != 3 || shape[0] == 1 || (shape[1] == 1 && shape[2] == 1);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

// Zeroed on first use by the system: memory that is not touched costs nothing. Large pieces ask for large pages, which
// the system hands out at once instead of 4 kB at a time.
Memory allocate(int64_t bytes, const char* what) {
  constexpr int64_t kLargePage = int64_t{2} << 20;
  const int64_t align = bytes >= kLargePage ? kLargePage : kAlign;
  const int64_t size = std::max<int64_t>((bytes + align - 1) / align * align, align);
  void* memory = std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(size));
  if (memory == nullptr) fail("out of memory: the network needs ", bytes, " bytes for ", what);
#ifdef MADV_HUGEPAGE
  if (align == kLargePage) ::madvise(memory, static_cast<size_t>(bytes / align * align), MADV_HUGEPAGE);
#endif
  return Memory(static_cast<uint8_t*>(memory));
}

enum class Kernel : uint8_t {
  kQuantize,
  kConvolve,
  kAdd,
  kMultiply,
  kLookup,
  kSoftmax,
  kAveragePool,
  kMaxPool,
  kCopy,
  kDequantize
};
constexpr std::array<const char*, 10> kKernelNames = {"quantize", "convolve",     "add",      "multiply", "lookup",
                                                      "softmax",  "average_pool", "max_pool", "copy",     "dequantize"};

// Elements of one image from one layout to another.
struct Copy {
  Shape sizes, from, to;  // sizes and strides of the loops
  int64_t from_start = 0, to_start = 0;
  int64_t from_image = 0, to_image = 0;  // elements of an image
  int fill = -1;                         // byte that the image is filled with before
};

void copy_loop(const Copy& copy, size_t axis, const uint8_t* x, uint8_t* y) {
  const int64_t n = copy.sizes[axis], from = copy.from[axis], to = copy.to[axis];
  if (axis + 1 < copy.sizes.size()) {
    for (int64_t i = 0; i < n; ++i) copy_loop(copy, axis + 1, x + i * from, y + i * to);
  } else if (from == 1 && to == 1) {
    std::memcpy(y, x, static_cast<size_t>(n));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i * to] = x[i * from];
  }
}

// f(offset of the first element) for every line along `axis` of one image.
template <typename F>
void for_lines(const Shape& sizes, const Shape& strides, size_t axis, size_t from, int64_t at, const F& f) {
  if (from == sizes.size()) {
    f(at);
    return;
  }
  const int64_t n = from == axis ? 1 : sizes[from];
  for (int64_t i = 0; i < n; ++i) for_lines(sizes, strides, axis, from + 1, at + i * strides[from], f);
}

// Loops with the smallest steps of the target innermost; those that go on where the next inner one ends are one loop.
void sort_loops(Copy* copy) {
  std::vector<size_t> order(copy->sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return copy->to[a] > copy->to[b]; });
  Copy sorted = *copy;
  for (size_t i = 0; i < order.size(); ++i) {
    sorted.sizes[i] = copy->sizes[order[i]];
    sorted.from[i] = copy->from[order[i]];
    sorted.to[i] = copy->to[order[i]];
  }
  for (size_t i = sorted.sizes.size() - 1; i-- > 0;) {
    const int64_t inner = sorted.sizes[i + 1];
    const bool goes_on = sorted.from[i] == inner * sorted.from[i + 1] && sorted.to[i] == inner * sorted.to[i + 1];
    if (!goes_on && inner != 1) continue;
    if (!goes_on) {  // a loop of one step: the outer one takes its place
      sorted.from[i + 1] = sorted.from[i];
      sorted.to[i + 1] = sorted.to[i];
    }
    sorted.sizes[i + 1] *= sorted.sizes[i];
    const auto at = static_cast<std::ptrdiff_t>(i);
    sorted.sizes.erase(sorted.sizes.begin() + at);
    sorted.from.erase(sorted.from.begin() + at);
    sorted.to.erase(sorted.to.begin() + at);
  }
  *copy = sorted;
}

struct Step {
  explicit Step(Kernel k) : kernel(k) {}

  Kernel kernel;
  int a = -1, b = -1, y = -1;  // buffers
  CodeGrid a_grid{}, b_grid{}, y_grid{};
  Convolution convolution{};
  const void* packed = nullptr;
  Pool pool{};
  Copy copy;  // softmax: sizes and strides of an image
  std::array<uint8_t, 256> table{};
  std::vector<int32_t> powers;  // softmax: by distance
  size_t axis = 0;
  int64_t elements = 0;  // of one image
  int64_t channels = 0;  // quantize: of an image; 0: values without order
  int output = -1;       // dequantize
};

struct Buffer {
  int64_t bytes = 0;  // of one image, a multiple of kAlign
  int first = 0, last = 0;
  int64_t offset = 0;
};

// Offsets such that buffers that live at the same time do not overlap: the largest first, each at the lowest place that
// is free while it lives (greedy by size, as arXiv 2001.03288 has it). Returns the bytes of one image.
int64_t place(std::vector<Buffer>* buffers) {
  std::vector<size_t> order(buffers->size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return (*buffers)[a].bytes > (*buffers)[b].bytes; });
  std::vector<const Buffer*> placed;  // by offset
  int64_t total = 0;
  for (const size_t index : order) {
    Buffer& buffer = (*buffers)[index];
    int64_t at = 0;
    for (const Buffer* other : placed) {
      if (other->last < buffer.first || other->first > buffer.last) continue;
      if (at + buffer.bytes <= other->offset) break;
      at = std::max(at, other->offset + other->bytes);
    }
    buffer.offset = at;
    total = std::max(total, at + buffer.bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), at,
                                   [](int64_t value, const Buffer* other) { return value < other->offset; }),
                  &buffer);
  }
  return total;
}

}  // namespace

class Network::Plan {
 public:
  Plan(Package package, const Options& options)
      : package_(std::move(package)),
        keep_(options.keep_values),
        max_memory_(options.max_memory),
        kernels_(kernels(std::min(options.isa, detected_isa()))),
        threads_(checked_threads(options.threads)) {
    readers_.resize(nodes().size());
    for (size_t i = 0; i < nodes().size(); ++i) {
      for (const int input : nodes()[i].inputs) readers_[static_cast<size_t>(input)].push_back(static_cast<int>(i));
    }
    is_output_.resize(nodes().size());
    for (const int output : package_.outputs()) is_output_[static_cast<size_t>(output)] = true;
    buffer_of_.assign(nodes().size(), -1);
    fused_.resize(nodes().size());
    moved_.resize(nodes().size());
    for (size_t i = 0; i < nodes().size(); ++i) plan_node(static_cast<int>(i));
    for (size_t i = 0; i < package_.outputs().size(); ++i) plan_output(static_cast<int>(i));
    if (keep_) {
      for (Buffer& buffer : buffers_) buffer = {buffer.bytes, 0, static_cast<int>(steps_.size()), 0};
    }
    arena_bytes_ = place(&buffers_);
    check_memory();
    pack_weights();
  }

  const Package& package() const { return package_; }
  Isa isa() const { return kernels_.isa; }
  int threads() const { return threads_.count(); }
  int64_t arena_bytes() const { return arena_bytes_; }
  int64_t weight_bytes() const { return weight_bytes_; }
  const std::vector<StepInfo>& infos() const { return infos_; }

  void run(const float* x, int64_t batch, std::span<float* const> outputs, std::span<double> seconds) {
    if (batch < 0) fail("batch is ", batch, ", expected at least 0");
    if (outputs.size() != package_.outputs().size()) {
      fail(outputs.size(), " outputs given, expected ", package_.outputs().size());
    }
    if (!seconds.empty() && seconds.size() != steps_.size()) {
      fail(seconds.size(), " times given, expected ", steps_.size());
    }
    const std::lock_guard lock(mutex_);
    const int64_t most = std::clamp<int64_t>(kBytesInFlight / std::max<int64_t>(arena_bytes_, 1), 1, 1 << 16);
    std::vector<float*> at(outputs.begin(), outputs.end());
    for (int64_t done = 0; done < batch;) {
      const int64_t images = std::min(most, batch - done);
      run_images(x + done * elements(package_.input_shape()), images, at, seconds);
      for (size_t i = 0; i < at.size(); ++i) at[i] += images * elements(output_shape(i));
      done += images;
    }
  }

  std::vector<std::vector<int16_t>> values(const float* x, int64_t batch) {
    if (!keep_) fail("values need a network that keeps them (Options::keep_values)");
    if (batch < 0) fail("batch is ", batch, ", expected at least 0");
    const std::lock_guard lock(mutex_);
    std::vector<std::vector<int16_t>> all(nodes().size());
    std::vector<std::vector<float>> rooms;
    std::vector<float*> at;
    for (size_t i = 0; i < package_.outputs().size(); ++i) {
      rooms.emplace_back(static_cast<size_t>(elements(output_shape(i))));
      at.push_back(rooms.back().data());
    }
    for (int64_t image = 0; image < batch; ++image) {
      run_images(x + image * elements(package_.input_shape()), 1, at, {});
      for (size_t i = 0; i < nodes().size(); ++i) append_rows(nodes()[i], buffer_of_[i], &all[i]);
    }
    return all;
  }

  Peaks measure_peaks() {
    const std::lock_guard lock(mutex_);
    return {peak_macs(), peak_bytes()};
  }

 private:
  // ---------------------------------------------------------------------------------------------------------- planning

  static int checked_threads(int threads) {
    if (threads < 1 || threads > kMaxThreads) fail("threads is ", threads, ", expected 1 to ", kMaxThreads);
    return threads;
  }

  const std::vector<Node>& nodes() const { return package_.nodes(); }
  const Node& node(int i) const { return nodes()[static_cast<size_t>(i)]; }
  const Shape& output_shape(size_t i) const { return node(package_.outputs()[i]).shape; }

  int new_buffer(int64_t bytes) {
    Buffer buffer;
    buffer.bytes = aligned(bytes);
    buffer.first = buffer.last = static_cast<int>(steps_.size());
    buffers_.push_back(buffer);
    return static_cast<int>(buffers_.size()) - 1;
  }

  // Appends a step and lengthens the lives of what it reads.
  void add_step(Step step, const Node& owner, StepInfo info = {}) {
    for (const int buffer : {step.a, step.b, step.y}) {
      if (buffer >= 0) buffers_[static_cast<size_t>(buffer)].last = static_cast<int>(steps_.size());
    }
    info.node = owner.name;
    info.module = owner.module;
    info.op = op_name(owner.op);
    info.kernel = kKernelNames[static_cast<size_t>(step.kernel)];
    infos_.push_back(std::move(info));
    steps_.push_back(std::move(step));
  }

  static StepInfo bytes(int64_t moved) {
    StepInfo info;
    info.value_bytes = moved;
    return info;
  }

  int add_lookup(int from, const CodeGrid& x, const CodeGrid& y, const Node& owner, int64_t n) {
    Step step(Kernel::kLookup);
    step.a = from;
    step.y = new_buffer(n);
    step.elements = n;
    move_table(x, y, step.table.data());
    const int made = step.y;
    add_step(std::move(step), owner, bytes(2 * n));
    return made;
  }

  // Buffer with a value's codes on a grid; moved there once for all who ask.
  int on_grid(int value, const CodeGrid& grid, const Node& owner) {
    const Node& source = node(value);
    const int buffer = buffer_of_[static_cast<size_t>(value)];
    if (same_grid(source.grid, grid)) return buffer;
    std::vector<Moved>& known = moved_[static_cast<size_t>(value)];
    for (const Moved& moved : known) {
      if (same_grid(moved.grid, grid)) return moved.buffer;
    }
    const int made = add_lookup(buffer, source.grid, grid, owner, elements(source.shape));
    known.push_back({grid, made});
    return made;
  }

  // The value row by row, or as an image from a buffer of rows.
  int reordered(int buffer, const Shape& shape, bool to_rows, const Node& owner) {
    if (stored_row_by_row(shape)) return buffer;
    Copy copy;
    copy.sizes = shape;
    copy.from = strides_of(shape, !to_rows);
    copy.to = strides_of(shape, to_rows);
    return add_copy(buffer, new_buffer(elements(shape)), copy, elements(shape), elements(shape), owner);
  }

  int add_copy(int from, int to, Copy copy, int64_t from_image, int64_t to_image, const Node& owner) {
    copy.from_image = from_image;
    copy.to_image = to_image;
    sort_loops(&copy);
    Step step(Kernel::kCopy);
    step.a = from;
    step.y = to;
    const int64_t moved = elements(copy.sizes);
    step.copy = std::move(copy);
    add_step(std::move(step), owner, bytes(2 * moved));
    return to;
  }

  // The relu or relu6 that alone reads a value and keeps its grid: the kernel that makes the value can clamp for it.
  int fusible_activation(int i) const {
    const auto& readers = readers_[static_cast<size_t>(i)];
    if (keep_ || is_output_[static_cast<size_t>(i)] || readers.size() != 1) return -1;
    const Node& reader = node(readers[0]);
    const bool activation = reader.op == Op::kRelu || reader.op == Op::kRelu6;
    return activation && same_grid(reader.grid, node(i).grid) ? readers[0] : -1;
  }

  // A padding along height and width that only convolutions read is theirs: they add the same code of 0 themselves.
  // (With another grid than its operand's it would round the operand's codes.)
  bool padded_by_readers(int i) const {
    const Node& n = node(i);
    if (keep_ || n.op != Op::kPad || n.shape.size() != 3 || is_output_[static_cast<size_t>(i)]) return false;
    if (n.before[0] != 0 || n.after[0] != 0 || !same_grid(n.grid, node(n.inputs[0]).grid)) return false;
    const auto& readers = readers_[static_cast<size_t>(i)];
    return std::all_of(readers.begin(), readers.end(), [&](int reader) { return node(reader).op == Op::kConv2d; });
  }

  // The grid of a node's kernel, which a fused activation narrows.
  CodeGrid kernel_grid(int i) {
    const int activation = fusible_activation(i);
    if (activation < 0) return node(i).grid;
    fused_[static_cast<size_t>(activation)] = true;
    return rectified(node(i).grid, node(activation).op);
  }

  void plan_node(int i) {
    const Node& n = node(i);
    int& made = buffer_of_[static_cast<size_t>(i)];
    if (fused_[static_cast<size_t>(i)]) {
      made = buffer_of_[static_cast<size_t>(n.inputs[0])];
      return;
    }
    switch (n.op) {
      case Op::kInput:
        made = plan_input(n);
        break;
      case Op::kConv2d:
      case Op::kLinear:
        made = plan_layer(i);
        break;
      case Op::kAdd:
      case Op::kMul: {
        Step step(n.op == Op::kAdd ? Kernel::kAdd : Kernel::kMultiply);
        step.a = expanded(n.inputs[0], n);
        step.b = expanded(n.inputs[1], n);
        step.a_grid = node(n.inputs[0]).grid;
        step.b_grid = node(n.inputs[1]).grid;
        step.y_grid = kernel_grid(i);
        step.elements = elements(n.shape);
        made = step.y = new_buffer(step.elements);
        add_step(std::move(step), n, bytes(3 * elements(n.shape)));
        break;
      }
      case Op::kLookup:
      case Op::kSoftmax:
        made = plan_table(n);
        break;
      case Op::kAvgPool2d:
      case Op::kMaxPool2d:
        made = plan_pool(i);
        break;
      case Op::kRelu:
      case Op::kRelu6: {
        const CodeGrid grid = rectified(n.grid, n.op);
        const Node& source = node(n.inputs[0]);
        made = buffer_of_[static_cast<size_t>(n.inputs[0])];
        // On an unsigned grid the clamp of the kernel before has done it.
        if (!same_grid(source.grid, n.grid) || !same_grid(grid, n.grid)) {
          made = add_lookup(made, source.grid, grid, n, elements(n.shape));
        }
        break;
      }
      case Op::kIdentity:
        made = on_grid(n.inputs[0], n.grid, n);
        break;
      case Op::kReshape: {
        const int rows = reordered(on_grid(n.inputs[0], n.grid, n), node(n.inputs[0]).shape, true, n);
        made = reordered(rows, n.shape, false, n);
        break;
      }
      default:
        if (!padded_by_readers(i)) made = plan_moves(n);
    }
  }

  int plan_input(const Node& n) {
    Step step(Kernel::kQuantize);
    step.y_grid = n.grid;
    step.elements = elements(n.shape);
    step.channels = n.shape.size() == 3 ? n.shape[0] : 0;
    const int made = step.y = new_buffer(step.elements);
    add_step(std::move(step), n, bytes(5 * elements(n.shape)));
    return made;
  }

  int plan_layer(int i) {
    const Node& n = node(i);
    const Node& padding = node(n.inputs[0]);
    const bool pads = padded_by_readers(n.inputs[0]);
    const int source = pads ? padding.inputs[0] : n.inputs[0];
    const Shape& shape = node(source).shape;
    int x = on_grid(source, n.act, n);
    Step step(Kernel::kConvolve);
    Convolution& c = step.convolution;
    const Tensor& weight = package_.tensors()[static_cast<size_t>(n.weight)];
    c.weight_bits = weight.bits;
    c.x = n.act;
    c.y = kernel_grid(i);
    c.kernel_height = c.kernel_width = c.stride_height = c.stride_width = c.dilation_height = c.dilation_width = 1;
    c.in_width = c.out_width = c.in_height = c.out_height = c.groups = 1;
    c.batch = 1;
    c.out_channels = weight.shape[0];
    if (n.op == Op::kConv2d) {
      c.in_channels = shape[0];
      c.in_height = shape[1];
      c.in_width = shape[2];
      c.out_height = n.shape[1];
      c.out_width = n.shape[2];
      c.kernel_height = n.kernel.h;
      c.kernel_width = n.kernel.w;
      c.stride_height = n.stride.h;
      c.stride_width = n.stride.w;
      c.pad_top = n.padding.h + (pads ? padding.before[1] : 0);
      c.pad_left = n.padding.w + (pads ? padding.before[2] : 0);
      c.dilation_height = n.dilation.h;
      c.dilation_width = n.dilation.w;
      c.groups = n.groups;
    } else {
      // Rows of features side by side are the columns of an image.
      x = reordered(x, shape, true, n);
      c.in_channels = weight.shape[1];
      c.in_width = c.out_width = elements(shape) / weight.shape[1];
    }
    StepInfo info = bytes(elements(shape) + elements(n.shape));
    info.act_bits = n.act_bits;
    info.weight_bits = weight.bits;
    info.macs = elements(n.shape) * c.taps();
    step.a = x;
    int made = step.y = new_buffer(elements(n.shape));
    layers_.push_back({steps_.size(), i});
    add_step(std::move(step), n, std::move(info));
    if (n.op == Op::kLinear) made = reordered(made, n.shape, false, n);
    return made;
  }

  int plan_pool(int i) {
    const Node& n = node(i);
    const Shape& shape = node(n.inputs[0]).shape;
    const bool average = n.op == Op::kAvgPool2d;
    Step step(average ? Kernel::kAveragePool : Kernel::kMaxPool);
    step.a = average ? buffer_of_[static_cast<size_t>(n.inputs[0])] : on_grid(n.inputs[0], n.grid, n);
    Pool& pool = step.pool;
    pool.batch = 1;
    pool.channels = shape[0];
    pool.in_height = shape[1];
    pool.in_width = shape[2];
    pool.out_height = n.global ? 1 : n.shape[1];
    pool.out_width = n.global ? 1 : n.shape[2];
    pool.kernel_height = n.kernel.h;
    pool.kernel_width = n.kernel.w;
    pool.stride_height = n.stride.h;
    pool.stride_width = n.stride.w;
    pool.pad_top = n.padding.h;
    pool.pad_left = n.padding.w;
    pool.dilation_height = n.dilation.h;
    pool.dilation_width = n.dilation.w;
    pool.count_include_pad = n.count_include_pad;
    pool.x = average ? node(n.inputs[0]).grid : n.grid;
    pool.y = average ? kernel_grid(i) : n.grid;
    const int made = step.y = new_buffer(elements(n.shape));
    add_step(std::move(step), n, bytes(elements(shape) + elements(n.shape)));
    return made;
  }

  // An operand of an operation that may repeat it, in the shape of the result.
  int expanded(int value, const Node& n) {
    const Shape& shape = node(value).shape;
    const int buffer = buffer_of_[static_cast<size_t>(value)];
    if (shape == n.shape) return buffer;
    Copy copy;
    copy.sizes = n.shape;
    copy.from = strides_of(shape, false);
    copy.to = strides_of(n.shape, false);
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] != n.shape[axis]) copy.from[axis] = 0;
    }
    return add_copy(buffer, new_buffer(elements(n.shape)), std::move(copy), elements(shape), elements(n.shape), n);
  }

  // Functions of one code, and softmax.
  int plan_table(const Node& n) {
    package_.check_table(n);
    const CodeGrid& x = node(n.inputs[0]).grid;
    Step step(n.op == Op::kLookup ? Kernel::kLookup : Kernel::kSoftmax);
    step.a = buffer_of_[static_cast<size_t>(n.inputs[0])];
    step.a_grid = x;
    step.y_grid = n.grid;
    step.elements = elements(n.shape);
    if (n.op == Op::kLookup) {
      const std::vector<uint8_t> codes = package_.bytes(n.table);
      for (int32_t code = x.low; code <= x.high; ++code) {
        step.table[byte_of(code)] = codes[static_cast<size_t>(code - x.low)];
      }
    } else {
      step.powers = package_.int32s(n.table);
      step.copy.sizes = n.shape;
      step.copy.from = strides_of(n.shape, false);
      step.axis = static_cast<size_t>(n.axis);
    }
    const int made = step.y = new_buffer(step.elements);
    add_step(std::move(step), n, bytes(2 * elements(n.shape)));
    return made;
  }

  // Concatenation, slice, padding, upsampling and other orders: codes go to other places.
  int plan_moves(const Node& n) {
    const int64_t made_elements = elements(n.shape);
    const Shape to = strides_of(n.shape, false);
    if (n.op == Op::kCat) {
      std::vector<int> sources;
      for (const int input : n.inputs) sources.push_back(on_grid(input, n.grid, n));
      const int made = new_buffer(made_elements);
      int64_t channel = 0;
      for (size_t i = 0; i < sources.size(); ++i) {
        const Shape& shape = node(n.inputs[i]).shape;
        Copy copy;
        copy.sizes = shape;
        copy.from = strides_of(shape, false);
        copy.to = to;
        copy.to_start = channel * to[0];
        channel += shape[0];
        add_copy(sources[i], made, std::move(copy), elements(shape), made_elements, n);
      }
      return made;
    }
    const Shape& shape = node(n.inputs[0]).shape;
    const int source = on_grid(n.inputs[0], n.grid, n);
    const int made = new_buffer(made_elements);
    Copy copy;
    copy.sizes = shape;
    copy.from = strides_of(shape, false);
    copy.to = to;
    if (n.op == Op::kSlice) {
      const auto axis = static_cast<size_t>(n.axis);
      copy.sizes = n.shape;
      copy.from_start = n.start * copy.from[axis];
      copy.from[axis] *= n.step;
    } else if (n.op == Op::kPad) {
      copy.fill = static_cast<uint8_t>(n.grid.zero_point);
      for (size_t axis = 0; axis < to.size(); ++axis) copy.to_start += n.before[axis] * to[axis];
    } else if (n.op == Op::kPermute) {
      copy.sizes = n.shape;
      const Shape from = copy.from;
      for (size_t axis = 0; axis < n.order.size(); ++axis) copy.from[axis] = from[static_cast<size_t>(n.order[axis])];
    } else if (n.op == Op::kPixelUnshuffle) {  // channel, row and column in the block, row and column of the block
      const int64_t f = n.factor;
      const Shape from = copy.from;
      copy.sizes = {shape[0], f, f, shape[1] / f, shape[2] / f};
      copy.from = {from[0], from[1], from[2], from[1] * f, from[2] * f};
      copy.to = {to[0] * f * f, to[0] * f, to[0], to[1], to[2]};
    } else {  // repeat: two loops more that stand still in the source
      copy.to[1] *= n.repeats.h;
      copy.to[2] *= n.repeats.w;
      for (const auto& [times, stride] : {std::pair{n.repeats.h, to[1]}, std::pair{n.repeats.w, to[2]}}) {
        copy.sizes.push_back(times);
        copy.from.push_back(0);
        copy.to.push_back(stride);
      }
    }
    return add_copy(source, made, std::move(copy), elements(shape), made_elements, n);
  }

  void plan_output(int output) {
    const int i = package_.outputs()[static_cast<size_t>(output)];
    const Node& n = node(i);
    Step step(Kernel::kDequantize);
    step.a = reordered(buffer_of_[static_cast<size_t>(i)], n.shape, true, n);
    step.a_grid = n.grid;
    step.elements = elements(n.shape);
    step.output = output;
    add_step(std::move(step), n, bytes(5 * elements(n.shape)));
  }

  // Before anything of that size is allocated.
  void check_memory() {
    int64_t scratch = 0;
    for (const Layer& layer : layers_) {
      const Convolution& c = steps_[layer.step].convolution;
      infos_[layer.step].weight_bytes = aligned(kernels_.packed_bytes(c));
      weight_bytes_ += infos_[layer.step].weight_bytes;
      scratch = std::max(scratch, aligned(kernels_.scratch_bytes(c)));
    }
    const int64_t wanted = arena_bytes_ + weight_bytes_ + scratch * threads_.count();
    if (wanted > max_memory_) {
      fail("the network needs ", wanted, " bytes (", arena_bytes_, " for values, ", weight_bytes_,
           " for weights, the rest for ", threads_.count(), " threads), max_memory allows ", max_memory_);
    }
  }

  void pack_weights() {
    weights_ = allocate(weight_bytes_ + kReadSlack, "weights");
    uint8_t* at = weights_.get();
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Node& n = node(layers_[i].node);
      package_.check_layer(n);
      const Tensor& tensor = package_.tensors()[static_cast<size_t>(n.weight)];
      const std::vector<int32_t> bias = package_.int32s(n.bias);
      const std::vector<float> multiplier = package_.floats(n.multiplier);
      Step& step = steps_[layers_[i].step];
      const Weights weights{package_.data(n.weight).data(), tensor.bits,
                            packed_bytes(step.convolution.taps(), tensor.bits), bias.data(), multiplier.data()};
      kernels_.pack(step.convolution, weights, at);
      package_.release(n.weight);  // the kernels read their own layout
      step.packed = at;
      at += infos_[layers_[i].step].weight_bytes;
    }
  }

  // ----------------------------------------------------------------------------------------------------------- running

  uint8_t* at(int buffer, int64_t images) const {
    return arena_.get() + buffers_[static_cast<size_t>(buffer)].offset * images;
  }

  void run_images(const float* x, int64_t images, const std::vector<float*>& outputs, std::span<double> seconds) {
    reserve(images);
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (seconds.empty()) {
        run_step(&steps_[i], images, x, outputs);
        continue;
      }
      const auto start = std::chrono::steady_clock::now();
      run_step(&steps_[i], images, x, outputs);
      seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }

  // Room for so many images: the arena, and scratch for the kernels.
  void reserve(int64_t images) {
    if (images > arena_images_) {
      arena_.reset();
      arena_images_ = 0;
      arena_ = allocate(arena_bytes_ * images + kReadSlack, "values");
      // Kernels may read (and drop) bytes that nobody has written.
      std::memset(arena_.get(), 0, static_cast<size_t>(arena_bytes_ * images + kReadSlack));
      arena_images_ = images;
    }
    int64_t most = 0;
    for (const Layer& layer : layers_) {
      Convolution& c = steps_[layer.step].convolution;
      c.batch = images;
      most = std::max(most, aligned(kernels_.scratch_bytes(c)));
    }
    if (most > scratch_bytes_) {
      scratch_ = allocate(most * threads_.count(), "scratch");
      scratch_bytes_ = most;
    }
  }

  // f(first, last) over parts of n elements, at least `least` in a part.
  template <typename F>
  void split(int64_t n, int64_t least, const F& f) {
    const int64_t parts = std::clamp<int64_t>(n / least, 1, threads_.count());
    const int64_t size = (n + parts - 1) / parts;
    threads_.run(parts, [&](int, int64_t part) {
      const int64_t first = std::min(n, part * size), last = std::min(n, first + size);
      if (first < last) f(first, last);
    });
  }

  void run_step(Step* step, int64_t images, const float* x, const std::vector<float*>& outputs) {
    constexpr int64_t kLeastBytes = 16384;  // smaller parts are not worth waking a thread
    const uint8_t* a = step->a >= 0 ? at(step->a, images) : nullptr;
    const uint8_t* b = step->b >= 0 ? at(step->b, images) : nullptr;
    uint8_t* y = step->y >= 0 ? at(step->y, images) : nullptr;
    const int64_t n = step->elements * images;
    switch (step->kernel) {
      case Kernel::kQuantize:
        if (step->channels == 0) {
          split(n, kLeastBytes, [&](int64_t first, int64_t last) {
            kernels_.quantize(x + first, y + first, step->y_grid, last - first);
          });
        } else {
          const int64_t size = step->elements;
          threads_.run(images, [&](int, int64_t image) {
            kernels_.quantize_image(x + image * size, y + image * size, step->y_grid, step->channels,
                                    size / step->channels);
          });
        }
        break;
      case Kernel::kConvolve:
        convolve(*step, a, y);
        break;
      case Kernel::kAdd:
        split(n, kLeastBytes, [&](int64_t first, int64_t last) {
          kernels_.add(a + first, step->a_grid, b + first, step->b_grid, y + first, step->y_grid, last - first);
        });
        break;
      case Kernel::kMultiply:
        split(n, kLeastBytes, [&](int64_t first, int64_t last) {
          multiply(a + first, step->a_grid, b + first, step->b_grid, y + first, step->y_grid, last - first);
        });
        break;
      case Kernel::kSoftmax: {
        const Shape &sizes = step->copy.sizes, &strides = step->copy.from;
        threads_.run(images, [&](int, int64_t image) {
          for_lines(sizes, strides, step->axis, 0, image * step->elements, [&](int64_t at) {
            softmax(step->powers.data(), a + at, step->a_grid, y + at, step->y_grid, sizes[step->axis],
                    strides[step->axis]);
          });
        });
        break;
      }
      case Kernel::kLookup:
        split(n, kLeastBytes, [&](int64_t first, int64_t last) {
          kernels_.lookup(step->table.data(), a + first, y + first, last - first);
        });
        break;
      case Kernel::kAveragePool:
      case Kernel::kMaxPool: {
        step->pool.batch = images;
        const auto pool = step->kernel == Kernel::kMaxPool ? kernels_.max_pool : kernels_.average_pool;
        const Pool& p = step->pool;
        const int64_t each = p.channels * p.kernel_height * p.kernel_width;
        split(p.positions(), std::max<int64_t>(1, kLeastBytes / each),
              [&](int64_t first, int64_t last) { pool(p, a, y, first, last); });
        break;
      }
      case Kernel::kCopy: {
        const Copy& copy = step->copy;
        threads_.run(images, [&](int, int64_t image) {
          uint8_t* target = y + image * copy.to_image;
          if (copy.fill >= 0) std::memset(target, copy.fill, static_cast<size_t>(copy.to_image));
          copy_loop(copy, 0, a + image * copy.from_image + copy.from_start, target + copy.to_start);
        });
        break;
      }
      case Kernel::kDequantize: {
        float* out = outputs[static_cast<size_t>(step->output)];
        split(n, kLeastBytes, [&](int64_t first, int64_t last) {
          kernels_.dequantize(a + first, step->a_grid, out + first, last - first);
        });
        break;
      }
    }
  }

  // Parts of positions where there are enough of them, else parts of channels.
  void convolve(const Step& step, const uint8_t* x, uint8_t* y) {
    constexpr int64_t kLeastMacs = 65536;
    const Convolution& c = step.convolution;
    const int64_t positions = c.positions();
    const int64_t macs = positions * c.out_channels * c.taps();
    const int64_t wanted = std::clamp<int64_t>(macs / kLeastMacs, 1, threads_.count());
    constexpr int64_t kRows = 16;  // of a tile
    int64_t position_size = positions, channel_size = c.out_channels;
    if (wanted > 1 && positions >= wanted * kRows) {
      position_size = ((positions + wanted - 1) / wanted + kRows - 1) / kRows * kRows;
    } else if (wanted > 1) {
      const int64_t unit = channel_step(c);
      channel_size = ((c.out_channels + wanted - 1) / wanted + unit - 1) / unit * unit;
    }
    const int64_t columns = (c.out_channels + channel_size - 1) / channel_size;
    const int64_t rows = (positions + position_size - 1) / position_size;
    threads_.run(rows * columns, [&](int thread, int64_t part) {
      const int64_t row = part / columns, column = part % columns;
      const Part piece{row * position_size, std::min(positions, (row + 1) * position_size), column * channel_size,
                       std::min(c.out_channels, (column + 1) * channel_size)};
      kernels_.convolve(c, step.packed, x, y, piece, scratch_.get() + thread * scratch_bytes_);
    });
  }

  // f() again and again for a tenth of a second, at least three times: seconds of the fastest.
  template <typename F>
  static double fastest(const F& f) {
    using Clock = std::chrono::steady_clock;
    double least = std::numeric_limits<double>::infinity();
    const auto start = Clock::now();
    for (int i = 0; i < 3 || Clock::now() - start < std::chrono::milliseconds(100); ++i) {
      const auto begin = Clock::now();
      f();
      least = std::min(least, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return least;
  }

  double peak_macs() {
    // Weights and values of a thread fit a second-level cache; less for scalar kernels, which take as long for it.
    const int64_t channels = kernels_.isa == Isa::kScalar ? 64 : 512;
    Convolution c{};
    c.batch = c.in_height = c.out_height = c.kernel_height = c.kernel_width = c.groups = 1;
    c.stride_height = c.stride_width = c.dilation_height = c.dilation_width = 1;
    c.in_channels = c.out_channels = channels;
    c.in_width = c.out_width = 256 * threads_.count();
    c.weight_bits = 8;
    c.x = c.y = CodeGrid{1.0f, 0, 0, 255, false};
    const auto n = static_cast<size_t>(channels * c.in_width);
    const std::vector<uint8_t> codes(static_cast<size_t>(channels * channels), 1);
    const std::vector<float> multiplier(static_cast<size_t>(channels), 1.0f / 512.0f);
    std::vector<uint8_t> x(n + kReadSlack, 1), y(n + kReadSlack);
    const Memory packed = allocate(kernels_.packed_bytes(c) + kReadSlack, "peaks");
    const int64_t each = aligned(kernels_.scratch_bytes(c));
    const Memory scratch = allocate(each * threads_.count(), "peaks");
    kernels_.pack(c, {codes.data(), 8, channels, nullptr, multiplier.data()}, packed.get());
    const double seconds = fastest([&] {
      threads_.run(threads_.count(), [&](int thread, int64_t part) {
        kernels_.convolve(c, packed.get(), x.data(), y.data(), {part * 256, (part + 1) * 256, 0, channels},
                          scratch.get() + thread * each);
      });
    });
    return static_cast<double>(c.positions() * channels * channels) / seconds;
  }

  double peak_bytes() {
    // Pieces of a buffer that no second-level cache holds, in turn: short enough to be read between two interruptions.
    constexpr size_t kWords = size_t{64} << 20 >> 3, kPiece = size_t{4} << 20 >> 3;
    const std::vector<uint64_t> words(kWords, 1);
    std::vector<uint64_t> sums(static_cast<size_t>(threads_.count()));
    const size_t size = kPiece / sums.size();
    size_t piece = 0;
    const double seconds = fastest([&] {
      threads_.run(threads_.count(), [&](int, int64_t part) {
        const uint64_t* at = words.data() + piece + static_cast<size_t>(part) * size;
        std::array<uint64_t, 8> lanes{};
        for (size_t i = 0; i + 8 <= size; i += 8) {
          for (size_t k = 0; k < 8; ++k) lanes[k] += at[i + k];
        }
        for (const uint64_t lane : lanes) sums[static_cast<size_t>(part)] += lane;
      });
      piece = (piece + kPiece) % kWords;
    });
    // The sums are looked at, so that the loops stay.
    if (sums.front() == 0) fail("peaks: a sum of ones is 0");
    return static_cast<double>(size * sums.size() * sizeof(uint64_t)) / seconds;
  }

  void append_rows(const Node& n, int buffer, std::vector<int16_t>* out) const {
    const uint8_t* codes = at(buffer, 1);
    const Shape strides = strides_of(n.shape, false);
    std::vector<int64_t> index(n.shape.size(), 0);
    for (int64_t k = elements(n.shape); k > 0; --k) {
      int64_t place = 0;
      for (size_t i = 0; i < index.size(); ++i) place += index[i] * strides[i];
      out->push_back(static_cast<int16_t>(code_at(codes + place, n.grid.is_signed)));
      for (size_t i = index.size(); i-- > 0 && ++index[i] == n.shape[i];) index[i] = 0;
    }
  }

  struct Moved {
    CodeGrid grid;
    int buffer;
  };
  struct Layer {
    size_t step;
    int node;
  };

  Package package_;
  bool keep_;
  int64_t max_memory_;
  const KernelTable& kernels_;
  Threads threads_;
  std::mutex mutex_;
  std::vector<std::vector<int>> readers_;
  std::vector<bool> is_output_;
  std::vector<int> buffer_of_;
  std::vector<bool> fused_;                // activations that the kernel before does
  std::vector<std::vector<Moved>> moved_;  // of each value
  std::vector<Buffer> buffers_;
  std::vector<Step> steps_;
  std::vector<StepInfo> infos_;
  std::vector<Layer> layers_;
  Memory weights_, arena_, scratch_;
  int64_t weight_bytes_ = 0, arena_bytes_ = 0, arena_images_ = 0, scratch_bytes_ = 0;
};

Network::Network(Package package, const Options& options) {
  check_isa_cap();
  try {
    plan_ = std::make_unique<Plan>(std::move(package), options);
  } catch (const std::bad_alloc&) {
    fail("out of memory while the network is planned");
  } catch (const std::system_error& error) {
    fail("threads: ", options.threads, " cannot be started: ", error.what());
  }
}
Network::~Network() = default;
Network::Network(Network&&) noexcept = default;
Network& Network::operator=(Network&&) noexcept = default;

const Package& Network::package() const { return plan_->package(); }
Isa Network::isa() const { return plan_->isa(); }
int Network::threads() const { return plan_->threads(); }
int64_t Network::arena_bytes() const { return plan_->arena_bytes(); }
int64_t Network::weight_bytes() const { return plan_->weight_bytes(); }
const std::vector<StepInfo>& Network::steps() const { return plan_->infos(); }

void Network::run(const float* x, int64_t batch, std::span<float* const> outputs, std::span<double> seconds) {
  plan_->run(x, batch, outputs, seconds);
}

Peaks Network::measure_peaks() { return plan_->measure_peaks(); }

std::vector<std::vector<int16_t>> Network::values(const float* x, int64_t batch) { return plan_->values(x, batch); }

void check_isa_cap() {
  const char* text = std::getenv("MIXBIT_CPU_ISA");
  Isa cap;
  if (text != nullptr && !parse_isa(text, &cap)) {
    fail("MIXBIT_CPU_ISA=", text, " is not known: expected scalar, avx2, avx512, vnni or amx");
  }
}

}  // namespace mixbit::runtime
