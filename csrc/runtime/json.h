#pragma once

// A small JSON reader and writer. Text from strangers: depth and number of values are bounded, UTF-8 is checked, a key
// comes once.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mixbit::runtime::json {

enum class Kind : uint8_t { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };

struct Member;

struct Value {
  Kind kind = Kind::kNull;
  bool boolean = false;
  int64_t integer = 0;
  double number = 0.0;
  std::string string;
  std::vector<Value> items;
  std::vector<Member> members;

  static Value of(int64_t value);
  static Value of(double value);
  static Value of(std::string_view value);
  static Value of(bool value);
  static Value array(const std::vector<int64_t>& values);

  const Value* find(std::string_view key) const;
  void set(std::string_view key, Value value);  // adds or replaces
  void remove(std::string_view key);
};

struct Member {
  std::string key;
  Value value;
};

// Throws Error; `where` names the text in it.
Value parse(std::string_view text, std::string_view where);
// Without spaces; numbers read back as they were.
std::string dump(const Value& value);

}  // namespace mixbit::runtime::json
