// The words of a PTX module: its text without comments, cut into parts.

#pragma once

#include <string>
#include <vector>

namespace ptx {

bool is_word(char c);

std::string strip(const std::string& s);

bool starts_with(const std::string& s, const char* prefix);

// Comments to blanks, so that lines keep their numbers.
std::string without_comments(std::string s);

// The operands between commas that stand outside of braces and brackets.
std::vector<std::string> split(const std::string& s);

// The parts between blanks.
std::vector<std::string> words(const std::string& s);

// The text within the braces or brackets around s.
std::string within(const std::string& s);

// The bytes of a type such as ".b32".
int size_of_type(const std::string& type);

// ".align 8 .b8 name[128]", as of a parameter or a variable.
struct Declared {
  std::string name;
  int size = 0, align = 1;

  explicit Declared(const std::string& text);

  // The first aligned byte at or behind end.
  int behind(int end) const { return (end + align - 1) / align * align; }
};

}  // namespace ptx
