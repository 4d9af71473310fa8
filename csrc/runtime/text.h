#pragma once

// Sentences of errors.

#include <sstream>
#include <string>

#include <mixbit/runtime/package.h>

namespace mixbit::runtime {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(text(parts...));
}

// "[3, 32, 32]"
inline std::string shown(const Shape& shape) {
  std::string all = "[";
  for (size_t i = 0; i < shape.size(); ++i) all += (i ? ", " : "") + std::to_string(shape[i]);
  return all + "]";
}

}  // namespace mixbit::runtime
