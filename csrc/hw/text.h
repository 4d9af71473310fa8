#pragma once

// Sentences of errors.

#include <sstream>
#include <stdexcept>
#include <string>

namespace mixbit::hw {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(text(parts...));
}

// "a, b, c"
template <typename Range>
std::string joined(const Range& range) {
  std::string all;
  for (const auto& item : range) all.append(all.empty() ? "" : ", ").append(item);
  return all;
}

}  // namespace mixbit::hw
