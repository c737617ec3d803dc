// The text of a PTX module to one of its kernels.

#include <cctype>
#include <cstdlib>
#include <map>
#include <set>

#include "kernel.h"

namespace ptx {
namespace {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

std::string strip(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

// Comments to blanks, so that lines keep their numbers.
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

// The operands between commas that stand outside of braces and brackets.
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

// ".align 8 .b8 name[128]", as of a parameter or a variable.
struct Declared {
  std::string name;
  int size = 0, align = 1;

  explicit Declared(const std::string& text) {
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
};

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : text_(without_comments(text)) { kernel_.name = name; }

  Kernel kernel() {
    while (skip(), at_ < text_.size()) top_level();
    if (kernel_.code.empty()) throw Fault{"no kernel " + kernel_.name};
    for (auto& [instruction, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault{"no label " + label};
      kernel_.code[instruction].target = found->second;
    }
    for (size_t i = 0; i < sources_.size(); ++i) {  // a file may be named behind the kernel
      const auto file = files_.find(sources_[i].first);
      if (file != files_.end()) kernel_.code[i].place += ", " + file->second + ":" + sources_[i].second;
    }
    kernel_.rows = static_cast<int>(next_row_);
    kernel_.predicates = static_cast<int>(next_predicate_);
    return std::move(kernel_);
  }

 private:
  struct Register {
    bool predicate = false;
    int index = 0;
  };

  void skip() {
    for (; at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])); ++at_) {
      if (text_[at_] == '\n') ++line_;
    }
  }

  std::string take_until(size_t end) {
    std::string taken = text_.substr(at_, end - at_);
    for (const char c : taken) line_ += c == '\n';
    at_ = end;
    return taken;
  }

  std::string take_line() { return take_until(std::min(text_.find('\n', at_), text_.size())); }

  std::string take_statement() {
    const size_t end = text_.find(';', at_);
    if (end == std::string::npos) throw Fault{"statement without end, line " + std::to_string(line_)};
    std::string taken = take_until(end);
    ++at_;
    return taken;
  }

  void skip_braces() {
    int depth = 0;
    size_t end = at_;
    do {
      if (end >= text_.size()) throw Fault{"brace without end"};
      depth += text_[end] == '{' ? 1 : text_[end] == '}' ? -1 : 0;
      ++end;
    } while (depth > 0);
    take_until(end);
  }

  // Directives that end with their line.
  bool line_directive() {
    for (const char* name : {".version", ".target", ".address_size", ".file", ".loc"}) {
      if (text_.compare(at_, std::char_traits<char>::length(name), name) != 0) continue;
      const std::vector<std::string> parts = words(take_line());
      if (parts[0] == ".file" && parts.size() > 2) files_[parts[1]] = base_name(parts.back());
      if (parts[0] == ".loc" && parts.size() > 2) file_ = parts[1], source_line_ = parts[2];
      return true;
    }
    return false;
  }

  static std::string base_name(const std::string& quoted) {
    std::string path = quoted;
    while (!path.empty() && path.back() == '"') path.pop_back();
    return path.substr(path.find_last_of("/\"") + 1);
  }

  void top_level() {
    if (line_directive()) return;
    if (text_.compare(at_, 8, ".section") == 0) {
      take_until(text_.find('{', at_));
      return skip_braces();
    }
    const size_t end = text_.find_first_of(";{", at_);
    if (end == std::string::npos) throw Fault{"cannot read line " + std::to_string(line_)};
    const std::string head = text_.substr(at_, end - at_);
    if (head.find(".entry") != std::string::npos) return entry(take_until(end));
    if (head.find(".func") != std::string::npos) {  // a call of one is an opcode that is not known
      take_until(end);
      if (text_[at_] == ';') {
        ++at_;
      } else {
        skip_braces();
      }
      return;
    }
    const std::string statement = take_statement();
    if (head.find(".shared") != std::string::npos) shared(head);
    // Constants and variables of the module have no address: to name one is an error.
  }

  void shared(const std::string& text) {
    const Declared variable(text);
    if (text.find(".extern") != std::string::npos) {
      dynamic_.insert(variable.name);
    } else {
      const int start = (kernel_.static_shared + variable.align - 1) / variable.align * variable.align;
      kernel_.static_shared = start + variable.size;
      symbols_[variable.name] = start;
    }
  }

  void entry(const std::string& head) {
    const size_t open = head.find('('), close = head.find(')');
    const std::string name = words(head.substr(head.find(".entry") + 6, open - head.find(".entry") - 6)).at(0);
    if (name != kernel_.name) return skip_braces();
    for (const std::string& text : split(head.substr(open + 1, close - open - 1))) {
      const Declared parameter(text);
      const int start = (kernel_.parameter_bytes + parameter.align - 1) / parameter.align * parameter.align;
      kernel_.parameters.push_back({start, parameter.size});
      kernel_.parameter_bytes = start + parameter.size;
      symbols_[parameter.name] = start;
    }
    ++at_;
    scopes_.emplace_back();
    while (!scopes_.empty()) {
      skip();
      body_statement();
    }
    sources_.emplace_back();
    Instr end;  // a kernel may end without ret
    end.op.kind = Kind::EXIT;
    end.text = "}";
    kernel_.code.push_back(end);
  }

  void body_statement() {
    const char c = text_.at(at_);
    if (c == '{') {
      scopes_.emplace_back();
      ++at_;
    } else if (c == '}') {
      scopes_.pop_back();
      ++at_;
    } else if (c == ';') {
      ++at_;
    } else if (c == '.') {
      if (!line_directive()) directive(take_statement());
    } else {
      size_t end = at_;
      while (end < text_.size() && is_word(text_[end])) ++end;
      if (end > at_ && text_[end] == ':') {
        const std::string label = text_.substr(at_, end - at_);
        if (!labels_.emplace(label, static_cast<int>(kernel_.code.size())).second) throw Fault{"two labels " + label};
        at_ = end + 1;
      } else {
        const int line = line_;
        instruction(strip(take_statement()), line);
      }
    }
  }

  void directive(const std::string& text) {
    if (starts_with(text, ".reg")) {
      const size_t type_start = text.find('.', 4);
      const size_t type_end = text.find_first_of(" \t", type_start);
      const std::string type = text.substr(type_start, type_end - type_start);
      const bool predicate = type == ".pred";
      if (!predicate) size_of_type(type);
      for (const std::string& name : split(text.substr(type_end))) {
        const size_t bracket = name.find('<');
        if (bracket == std::string::npos) {
          declare(name, predicate);
        } else {
          const int count = std::atoi(name.c_str() + bracket + 1);
          for (int i = 0; i < count; ++i) declare(name.substr(0, bracket) + std::to_string(i), predicate);
        }
      }
    } else if (starts_with(text, ".shared")) {
      shared(text);
    } else if (starts_with(text, ".local")) {
      const Declared variable(text);
      const int start = (kernel_.local_bytes + variable.align - 1) / variable.align * variable.align;
      kernel_.local_bytes = start + variable.size;
      symbols_[variable.name] = start;
    } else if (!starts_with(text, ".pragma")) {
      throw Fault{"unknown directive " + text};
    }
  }

  void declare(const std::string& name, bool predicate) { scopes_.back()[name] = {predicate, -1}; }

  // Rows are given to registers when they are first named: a declaration has more than are used.
  Register& find(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found == scope->end()) continue;
      Register& r = found->second;
      if (r.index < 0) r.index = static_cast<int>(r.predicate ? next_predicate_++ : next_row_++);
      return r;
    }
    throw Fault{"unknown register " + name};
  }

  int constant(uint64_t bits) {
    const auto [found, fresh] = constants_.emplace(bits, static_cast<int>(next_row_));
    if (fresh) {
      kernel_.constants.emplace_back(found->second, bits);
      ++next_row_;
    }
    return found->second;
  }

  int constant_predicate(bool value) {
    kernel_.constant_predicates.emplace_back(static_cast<int>(next_predicate_), value ? ALL : 0);
    return static_cast<int>(next_predicate_++);
  }

  int special(const std::string& name) {
    const auto [found, fresh] = specials_.emplace(name, static_cast<int>(next_row_));
    if (fresh) {
      kernel_.specials.emplace_back(found->second, name);
      ++next_row_;
    }
    return found->second;
  }

  static uint64_t immediate(const std::string& text) {
    char* end = nullptr;
    const bool minus = text[0] == '-';
    const char* digits = text.c_str() + minus;
    uint64_t bits = 0;
    if (digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F' || digits[1] == 'd' || digits[1] == 'D') && !minus) {
      bits = std::strtoull(digits + 2, &end, 16);
    } else {
      bits = std::strtoull(digits, &end, 0);
    }
    if (*end == 'U') ++end;
    if (*end != '\0') throw Fault{"cannot read the number " + text};
    return minus ? -bits : bits;
  }

  static bool is_special(const std::string& name) {
    static const std::set<std::string> names{"%laneid",      "%warpid",      "%lanemask_lt", "%lanemask_le",
                                             "%lanemask_gt", "%lanemask_ge", "%lanemask_eq", "%nwarpid"};
    for (const char* prefix : {"%tid.", "%ntid.", "%ctaid.", "%nctaid."}) {
      if (starts_with(name, prefix)) return true;
    }
    return names.count(name) != 0;
  }

  // The row of a value, or the number of a predicate.
  int value(const std::string& text, bool predicates) {
    if (text[0] == '-' || std::isdigit(static_cast<unsigned char>(text[0]))) {
      return predicates ? constant_predicate(immediate(text) != 0) : constant(immediate(text));
    }
    if (text == "_") return predicates ? static_cast<int>(next_predicate_++) : static_cast<int>(next_row_++);
    if (is_special(text)) return special(text);
    if (symbols_.count(text)) return constant(symbols_[text]);
    if (dynamic_.count(text)) return special("dynamic shared memory");
    return find(text).index;
  }

  void operand(Instr& in, const std::string& text, bool predicates) {
    if (text[0] == '{') {
      for (const std::string& part : split(text.substr(1, text.rfind('}') - 1))) operand(in, part, predicates);
    } else if (text[0] == '[') {
      const std::string inner = strip(text.substr(1, text.rfind(']') - 1));
      const size_t plus = inner.find('+');
      in.v.push_back(value(strip(inner.substr(0, plus)), false));
      in.offset.push_back(plus == std::string::npos ? 0
                                                    : static_cast<int64_t>(immediate(strip(inner.substr(plus + 1)))));
    } else if (const size_t bar = text.find('|'); bar != std::string::npos) {
      in.v.push_back(value(strip(text.substr(0, bar)), predicates));
      const std::string second = strip(text.substr(bar + 1));
      in.v.push_back(second == "_" ? static_cast<int>(next_predicate_++) : find(second).index);
    } else {
      in.v.push_back(value(text, predicates));
    }
  }

  void instruction(const std::string& text, int line) {
    Instr in;
    in.text = text;
    in.place = "line " + std::to_string(line);
    sources_.emplace_back(file_, source_line_);
    std::string rest = text;
    if (rest[0] == '@') {
      in.negated = rest[1] == '!';
      const size_t start = in.negated ? 2 : 1, end = rest.find_first_of(" \t\n");
      in.guard = find(rest.substr(start, end - start)).index;
      rest = strip(rest.substr(end));
    }
    const size_t end = rest.find_first_of(" \t\n{[");
    std::string opcode = rest.substr(0, end);
    const std::vector<std::string> operands = split(end == std::string::npos ? "" : rest.substr(end));
    try {
      if (opcode == "bra" || opcode == "bra.uni") {
        branches_.emplace_back(kernel_.code.size(), operands.at(0));
      } else {
        const bool mov = starts_with(opcode, "mov.");
        if (mov && operands.at(0)[0] == '{') opcode += " unpack " + std::to_string(split(unbraced(operands[0])).size());
        if (mov && operands.at(1)[0] == '{') opcode += " pack " + std::to_string(split(unbraced(operands[1])).size());
        const bool extremum = starts_with(opcode, "min.") || starts_with(opcode, "max.");
        if (extremum && operands.size() == 4) opcode += " of 3";
        const bool predicates = opcode.size() > 5 && opcode.compare(opcode.size() - 5, 5, ".pred") == 0;
        for (const std::string& each : operands) operand(in, each, predicates);
      }
      in.op = find_opcode(opcode);
      if (in.op.operands != 0 && in.v.size() != in.op.operands) {
        throw Fault{"expected " + std::to_string(in.op.operands) + " operands, got " + std::to_string(in.v.size())};
      }
    } catch (const Fault& fault) {
      throw Fault{kernel_.name + ", " + in.place + ": " + fault.what + " in: " + text};
    }
    kernel_.code.push_back(std::move(in));
  }

  static std::string unbraced(const std::string& s) { return s.substr(1, s.rfind('}') - 1); }

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  std::string file_, source_line_;                            // of the last .loc
  std::vector<std::pair<std::string, std::string>> sources_;  // of each instruction
  std::map<std::string, std::string> files_;
  Kernel kernel_;
  size_t next_row_ = 0, next_predicate_ = 0;
  std::unordered_map<std::string, int> symbols_;
  std::set<std::string> dynamic_;
  std::vector<std::unordered_map<std::string, Register>> scopes_;
  std::unordered_map<uint64_t, int> constants_;
  std::unordered_map<std::string, int> specials_;
  std::unordered_map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

Kernel parse(const std::string& text, const std::string& name) { return Parser(text, name).kernel(); }

}  // namespace ptx
