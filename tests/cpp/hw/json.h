#pragma once

// Reads the JSON files of the tests. Throws std::runtime_error at the first character that it does not expect.

#include <cctype>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace mixbit::test {

struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value;

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value); }
  double number() const { return std::get<double>(value); }
  int64_t integer() const { return static_cast<int64_t>(number()); }
  const std::string& string() const { return std::get<std::string>(value); }
  const Array& array() const { return std::get<Array>(value); }
  const Object& object() const { return std::get<Object>(value); }
  const Json& operator[](const std::string& key) const { return object().at(key); }
  bool has(const std::string& key) const { return object().contains(key); }
};

class JsonReader {
 public:
  static Json file(const std::string& path) {
    std::ifstream in(path);
    if (!in) throw std::runtime_error("cannot read " + path);
    JsonReader reader{std::string(std::istreambuf_iterator<char>(in), {})};
    return reader.read();
  }

 private:
  explicit JsonReader(std::string text) : text_(std::move(text)) {}

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  void expect(char c) {
    if (peek() != c) throw std::runtime_error("expected " + std::string(1, c) + " at byte " + std::to_string(at_));
    ++at_;
  }
  bool take(char c) { return peek() == c && ++at_; }

  Json read() {
    switch (peek()) {
      case '{': {
        Json::Object object;
        expect('{');
        while (!take('}')) {
          const std::string key = read_string();
          expect(':');
          object[key] = read();
          if (peek() != '}') expect(',');
        }
        return {object};
      }
      case '[': {
        Json::Array array;
        expect('[');
        while (!take(']')) {
          array.push_back(read());
          if (peek() != ']') expect(',');
        }
        return {array};
      }
      case '"':
        return {read_string()};
      case 't':
        return word("true", {true});
      case 'f':
        return word("false", {false});
      case 'n':
        return word("null", {nullptr});
      default: {
        size_t length = 0;
        const double number = std::stod(text_.substr(at_, 40), &length);
        at_ += length;
        return {number};
      }
    }
  }

  Json word(const std::string& name, Json value) {
    if (text_.compare(at_, name.size(), name) != 0) throw std::runtime_error("expected " + name);
    at_ += name.size();
    return value;
  }

  std::string read_string() {
    expect('"');
    const size_t end = text_.find('"', at_);  // the files of the tests hold no escapes
    const std::string result = text_.substr(at_, end - at_);
    at_ = end + 1;
    return result;
  }

  std::string text_;
  size_t at_ = 0;
};

}  // namespace mixbit::test
