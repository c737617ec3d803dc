#include "text.h"

#include <cctype>
#include <cstdlib>
#include <map>

#include "kernel.h"

namespace ptx {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

std::string strip(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

std::string without_comments(std::string s) {
  for (size_t i = 0; i + 1 < s.size(); ++i) {
    if (s[i] == '/' && s[i + 1] == '/') {
      while (i < s.size() && s[i] != '\n') s[i++] = ' ';
    } else if (s[i] == '/' && s[i + 1] == '*') {
      const size_t end = s.find("*/", i + 2);
      for (const size_t stop = end == std::string::npos ? s.size() : end + 2; i < stop; ++i) {
        if (s[i] != '\n') s[i] = ' ';
      }
    }
  }
  return s;
}

int size_of_type(const std::string& type) {
  static const std::map<std::string, int> sizes{{".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2}, {".u16", 2},
                                                {".s16", 2}, {".f16", 2}, {".b32", 4}, {".u32", 4}, {".s32", 4},
                                                {".f32", 4}, {".b64", 8}, {".u64", 8}, {".s64", 8}, {".f64", 8}};
  const auto found = sizes.find(type);
  if (found == sizes.end()) throw Fault{"unknown type " + type};
  return found->second;
}

std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t start = 0;
  for (size_t i = 0; i <= s.size(); ++i) {
    if (i == s.size() || (s[i] == ',' && depth == 0)) {
      const std::string part = strip(s.substr(start, i - start));
      if (!part.empty()) parts.push_back(part);
      start = i + 1;
    } else if (s[i] == '{' || s[i] == '[' || s[i] == '(') {
      ++depth;
    } else if (s[i] == '}' || s[i] == ']' || s[i] == ')') {
      --depth;
    }
  }
  return parts;
}

std::vector<std::string> words(const std::string& s) {
  std::vector<std::string> found;
  for (size_t i = 0; i < s.size();) {
    while (i < s.size() && std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    const size_t start = i;
    while (i < s.size() && !std::isspace(static_cast<unsigned char>(s[i]))) ++i;
    if (i > start) found.push_back(s.substr(start, i - start));
  }
  return found;
}

std::string within(const std::string& s) { return s.substr(1, s.find_last_of("}]") - 1); }

Declared::Declared(const std::string& text) {
  int element = 0, count = 1;
  const std::vector<std::string> parts = words(text);
  bool aligned = false, pointer = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string& part = parts[i];
    if (part == ".align") {
      // Behind .ptr it is of what the parameter points to.
      const int value = std::atoi(parts.at(++i).c_str());
      if (!pointer) align = value, aligned = true;
    } else if (part == ".ptr") {
      pointer = true;
    } else if (part[0] != '.') {
      name = part.substr(0, part.find('['));
      const size_t bracket = part.find('[');
      if (bracket != std::string::npos) count = std::atoi(part.c_str() + bracket + 1);
      break;
    } else if (part != ".param" && part != ".extern" && part != ".shared" && part != ".global" && part != ".local" &&
               part != ".visible" && part != ".const" && part != ".weak") {
      element = size_of_type(part);
    }
  }
  size = element * count;
  if (!aligned) align = element;
}

}  // namespace ptx
