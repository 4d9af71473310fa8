#include "npy.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string_view>

#include "text.h"

namespace mixbit::runtime {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr size_t kMaxHeader = size_t{1} << 16;
constexpr size_t kMaxRank = 16;

// The header is the text of a Python dict: {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
class HeaderReader {
 public:
  HeaderReader(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  Shape shape() {
    Shape shape;
    bool has_type = false, has_order = false, has_shape = false;
    expect('{');
    while (!take('}')) {
      const std::string_view key = quoted();
      expect(':');
      if (key == "descr" && !has_type) {
        has_type = true;
        skip();
        if (at_ < text_.size() && text_[at_] == '[') fail("'", path_, "' holds a structured array, expected float32");
        const std::string_view type = quoted();
        if (type != "<f4") fail("'", path_, "' holds dtype '", type, "', expected float32 ('<f4')");
      } else if (key == "fortran_order" && !has_order) {
        has_order = true;
        skip();
        if (word("True")) fail("'", path_, "' is in Fortran order, expected C order");
        if (!word("False")) bad();
      } else if (key == "shape" && !has_shape) {
        has_shape = true;
        shape = sizes();
      } else {
        bad();
      }
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    skip();
    if (at_ != text_.size() || !has_type || !has_order || !has_shape) bad();
    return shape;
  }

 private:
  [[noreturn]] void bad() const { fail("'", path_, "' is a damaged .npy file: its header cannot be read"); }
  void skip() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool take(char c) {
    skip();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) bad();
  }
  bool word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }
  std::string_view quoted() {
    skip();
    if (at_ >= text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) bad();
    const char quote = text_[at_++];
    const size_t end = text_.find(quote, at_);
    if (end == std::string_view::npos) bad();
    const std::string_view found = text_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }
  Shape sizes() {
    Shape shape;
    expect('(');
    while (!take(')')) {
      int64_t size = 0;
      skip();
      const char* first = text_.data() + at_;
      const auto result = std::from_chars(first, text_.data() + text_.size(), size);
      if (result.ec != std::errc() || size < 0 || shape.size() == kMaxRank) bad();
      at_ += static_cast<size_t>(result.ptr - first);
      take('L');  // of Python 2
      shape.push_back(size);
      if (!take(',')) {
        expect(')');
        break;
      }
    }
    return shape;
  }

  std::string_view text_;
  const std::string& path_;
  size_t at_ = 0;
};

// Writes a file beside `path` and renames it; `write` gets the stream.
template <typename F>
void write_renamed(const std::string& path, const F& write) {
  const std::string temporary = path + "." + std::to_string(::getpid()) + ".tmp";
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  if (!file) fail("cannot write '", path, "': ", std::strerror(errno));
  write(file);
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(temporary, path, error);
  if (!file || error) {
    const std::string reason = error ? error.message() : std::strerror(errno);
    std::filesystem::remove(temporary, error);
    fail("cannot write '", path, "': ", reason);
  }
}

}  // namespace

FloatArray read_npy(const std::string& path) {
  std::error_code error;
  const bool regular = std::filesystem::is_regular_file(path, error);
  if (error || !regular) fail("cannot read '", path, "': ", error ? error.message() : "it is no regular file");
  const uint64_t file_bytes = std::filesystem::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) fail("cannot read '", path, "': ", std::strerror(errno));
  std::array<unsigned char, 12> start{};
  file.read(reinterpret_cast<char*>(start.data()), 8);
  if (!file || std::memcmp(start.data(), kMagic.data(), kMagic.size()) != 0) fail("'", path, "' is no .npy file");
  const int version = start[6];
  if (version < 1 || version > 3) fail("'", path, "' has .npy version ", version, ", expected 1 to 3");
  const size_t length_bytes = version == 1 ? 2 : 4;
  file.read(reinterpret_cast<char*>(start.data()) + 8, static_cast<std::streamsize>(length_bytes));
  size_t length = start[8] | static_cast<size_t>(start[9]) << 8;
  if (version > 1) length |= static_cast<size_t>(start[10]) << 16 | static_cast<size_t>(start[11]) << 24;
  if (!file || length > kMaxHeader || length > file_bytes - 8 - length_bytes) {
    fail("'", path, "' is a damaged .npy file: its header is cut off or too long");
  }
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  FloatArray array;
  array.shape = HeaderReader(header, path).shape();
  const uint64_t stored = file_bytes - 8 - length_bytes - length;
  uint64_t elements = 1;
  bool fits = true;
  for (const int64_t size : array.shape) {
    // More elements than the file has bytes are never there; zero ends the growth.
    fits = fits && (size == 0 || elements <= stored / static_cast<uint64_t>(size));
    elements = fits ? elements * static_cast<uint64_t>(size) : elements;
    if (size == 0) {
      elements = 0;
      fits = true;
      break;
    }
  }
  if (!fits || elements * sizeof(float) != stored) {
    fail("'", path, "' holds ", stored, " bytes of data, which is not float32 ", shown(array.shape));
  }
  array.data.resize(elements);
  file.read(reinterpret_cast<char*>(array.data.data()), static_cast<std::streamsize>(stored));
  if (!file) fail("cannot read '", path, "' to its end");
  return array;
}

void write_npy(const std::string& path, const Shape& shape, const float* data) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  uint64_t elements = 1;
  for (const int64_t size : shape) {
    header += std::to_string(size) + ", ";
    elements *= static_cast<uint64_t>(size);
  }
  if (shape.size() > 1) header.resize(header.size() - 2);
  header += "), }";
  // The data starts at a multiple of 64, as NumPy has it.
  header.append(63 - (10 + header.size()) % 64, ' ');
  header.push_back('\n');
  write_renamed(path, [&](std::ofstream& file) {
    file << kMagic << '\x01' << '\0';
    file.put(static_cast<char>(header.size() & 0xFF));
    file.put(static_cast<char>(header.size() >> 8));
    file << header;
    file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(elements * sizeof(float)));
  });
}

void write_file(const std::string& path, const std::string& text) {
  write_renamed(path, [&](std::ofstream& file) { file << text; });
}

}  // namespace mixbit::runtime
