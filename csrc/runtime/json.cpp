#include "json.h"

#include <charconv>
#include <cmath>
#include <type_traits>
#include <unordered_set>
#include <utility>

#include "text.h"

namespace mixbit::runtime::json {
namespace {

constexpr int kMaxDepth = 16;
constexpr int64_t kMaxValues = int64_t{1} << 20;

// Bytes of the UTF-8 sequence at the start of `s`; 0 where it is none (overlong, surrogate, beyond U+10FFFF, cut off).
size_t utf8_length(std::string_view s) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t n = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || s.size() < n) return 0;
  for (size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  if (lead == 0xE0 && byte(1) < 0xA0) return 0;
  if (lead == 0xED && byte(1) > 0x9F) return 0;
  if (lead == 0xF0 && byte(1) < 0x90) return 0;
  if (lead == 0xF4 && byte(1) > 0x8F) return 0;
  return n;
}

void append_utf8(uint32_t code, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

class Parser {
 public:
  Parser(std::string_view text, std::string_view where) : text_(text), where_(where) {}

  Value whole() {
    Value value = next(0);
    skip();
    if (at_ != text_.size()) bad("something follows the document");
    return value;
  }

 private:
  [[noreturn]] void bad(const char* what) const { fail(where_, " is no valid JSON: ", what, " at byte ", at_); }

  void skip() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) {
      ++at_;
    }
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Value next(int depth) {
    if (depth > kMaxDepth) bad("too deep nesting");
    if (++values_ > kMaxValues) bad("too many values");
    skip();
    Value value;
    const char c = peek();
    if (c == '{') {
      object(depth, &value);
    } else if (c == '[') {
      ++at_;
      value.kind = Kind::kArray;
      skip();
      if (take(']')) return value;
      do {
        value.items.push_back(next(depth + 1));
        skip();
      } while (take(','));
      if (!take(']')) bad("expected , or ]");
    } else if (c == '"') {
      value.kind = Kind::kString;
      value.string = string();
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      number(&value);
    } else if (take_word("true") || take_word("false")) {
      value.kind = Kind::kBool;
      value.boolean = text_[at_ - 1] == 'e' && text_[at_ - 2] == 'u';
    } else if (!take_word("null")) {
      bad("expected a value");
    }
    return value;
  }

  void object(int depth, Value* value) {
    ++at_;
    value->kind = Kind::kObject;
    std::unordered_set<std::string> keys;
    skip();
    if (take('}')) return;
    do {
      skip();
      if (peek() != '"') bad("expected a key");
      std::string key = string();
      if (!keys.insert(key).second) bad("a key comes twice");
      skip();
      if (!take(':')) bad("expected :");
      value->members.push_back({std::move(key), next(depth + 1)});
      skip();
    } while (take(','));
    if (!take('}')) bad("expected , or }");
  }

  void number(Value* value) {
    const size_t start = at_;
    bool whole = true;
    take('-');
    if (!take('0') && !digits()) bad("expected a digit");
    if (take('.')) {
      whole = false;
      if (!digits()) bad("expected a digit");
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (!take('+')) take('-');
      if (!digits()) bad("expected a digit");
    }
    const char* first = text_.data() + start;
    const char* last = text_.data() + at_;
    if (whole) {
      value->kind = Kind::kInteger;
      if (std::from_chars(first, last, value->integer).ec != std::errc()) bad("a number beyond 64 bits");
      value->number = static_cast<double>(value->integer);
    } else {
      value->kind = Kind::kNumber;
      if (std::from_chars(first, last, value->number).ec != std::errc()) bad("a number out of range");
    }
  }
  bool digits() {
    const size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > start;
  }

  uint32_t hex4() {
    uint32_t code = 0;
    if (text_.size() - at_ < 4) bad("a cut-off escape");
    const char* first = text_.data() + at_;
    const auto result = std::from_chars(first, first + 4, code, 16);
    if (result.ec != std::errc() || result.ptr != first + 4) bad("an escape that is none");
    at_ += 4;
    return code;
  }

  std::string string() {
    ++at_;
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) bad("a string without end");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (static_cast<unsigned char>(c) < 0x20) bad("a control character");
      if (c != '\\') {
        const size_t n = utf8_length(text_.substr(at_));
        if (n == 0) bad("bytes that are no UTF-8");
        out.append(text_.substr(at_, n));
        at_ += n;
        continue;
      }
      ++at_;
      const char escape = peek();
      ++at_;
      switch (escape) {
        case '"':
        case '\\':
        case '/':
          out.push_back(escape);
          break;
        case 'b':
          out.push_back('\b');
          break;
        case 'f':
          out.push_back('\f');
          break;
        case 'n':
          out.push_back('\n');
          break;
        case 'r':
          out.push_back('\r');
          break;
        case 't':
          out.push_back('\t');
          break;
        case 'u': {
          uint32_t code = hex4();
          if (code >= 0xD800 && code < 0xDC00) {
            if (!take_word("\\u")) bad("half a surrogate pair");
            const uint32_t low = hex4();
            if (low < 0xDC00 || low > 0xDFFF) bad("half a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
          } else if (code >= 0xDC00 && code <= 0xDFFF) {
            bad("half a surrogate pair");
          }
          append_utf8(code, &out);
          break;
        }
        default:
          bad("an unknown escape");
      }
    }
  }

  std::string_view text_;
  std::string_view where_;
  size_t at_ = 0;
  int64_t values_ = 0;
};

void dump_string(const std::string& value, std::string* out) {
  out->push_back('"');
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      constexpr char kHex[] = "0123456789abcdef";
      *out += "\\u00";
      out->push_back(kHex[c >> 4]);
      out->push_back(kHex[c & 15]);
    } else {
      out->push_back(c);
    }
  }
  out->push_back('"');
}

template <typename T>
void dump_number(T value, std::string* out) {
  char buffer[40];
  const auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  std::string_view text(buffer, static_cast<size_t>(result.ptr - buffer));
  *out += text;
  // A whole number stays one that is not an integer: the kind reads back as it was.
  if (std::is_floating_point_v<T> && text.find_first_of(".e") == std::string_view::npos) *out += ".0";
}

void dump_to(const Value& value, std::string* out) {
  switch (value.kind) {
    case Kind::kNull:
      *out += "null";
      break;
    case Kind::kBool:
      *out += value.boolean ? "true" : "false";
      break;
    case Kind::kInteger:
      dump_number(value.integer, out);
      break;
    case Kind::kNumber:
      if (!std::isfinite(value.number)) fail("JSON holds no number ", value.number);
      dump_number(value.number, out);
      break;
    case Kind::kString:
      dump_string(value.string, out);
      break;
    case Kind::kArray:
      out->push_back('[');
      for (size_t i = 0; i < value.items.size(); ++i) {
        if (i) out->push_back(',');
        dump_to(value.items[i], out);
      }
      out->push_back(']');
      break;
    case Kind::kObject:
      out->push_back('{');
      for (size_t i = 0; i < value.members.size(); ++i) {
        if (i) out->push_back(',');
        dump_string(value.members[i].key, out);
        out->push_back(':');
        dump_to(value.members[i].value, out);
      }
      out->push_back('}');
      break;
  }
}

}  // namespace

Value Value::of(int64_t value) {
  Value v;
  v.kind = Kind::kInteger;
  v.integer = value;
  v.number = static_cast<double>(value);
  return v;
}
Value Value::of(double value) {
  Value v;
  v.kind = Kind::kNumber;
  v.number = value;
  return v;
}
Value Value::of(std::string_view value) {
  Value v;
  v.kind = Kind::kString;
  v.string = value;
  return v;
}
Value Value::of(bool value) {
  Value v;
  v.kind = Kind::kBool;
  v.boolean = value;
  return v;
}
Value Value::array(const std::vector<int64_t>& values) {
  Value v;
  v.kind = Kind::kArray;
  for (const int64_t value : values) v.items.push_back(of(value));
  return v;
}

const Value* Value::find(std::string_view key) const {
  for (const auto& member : members) {
    if (member.key == key) return &member.value;
  }
  return nullptr;
}

void Value::set(std::string_view key, Value value) {
  for (auto& member : members) {
    if (member.key == key) {
      member.value = std::move(value);
      return;
    }
  }
  members.push_back({std::string(key), std::move(value)});
}

void Value::remove(std::string_view key) {
  std::erase_if(members, [&](const Member& member) { return member.key == key; });
}

Value parse(std::string_view text, std::string_view where) { return Parser(text, where).whole(); }

std::string dump(const Value& value) {
  std::string out;
  dump_to(value, &out);
  return out;
}

}  // namespace mixbit::runtime::json
