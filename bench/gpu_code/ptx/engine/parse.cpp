// The text of a PTX module to one of its kernels.

#include <cctype>
#include <cstdlib>
#include <map>

#include "kernel.h"
#include "names.h"
#include "text.h"

namespace ptx {
namespace {

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
    kernel_.rows = names_.rows();
    kernel_.predicates = names_.predicates();
    return std::move(kernel_);
  }

 private:
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
      names_.place_dynamic(variable.name);
    } else {
      const int start = variable.behind(kernel_.static_shared);
      kernel_.static_shared = start + variable.size;
      names_.place(variable.name, start);
    }
  }

  void entry(const std::string& head) {
    const size_t open = head.find('('), close = head.find(')');
    const std::string name = words(head.substr(head.find(".entry") + 6, open - head.find(".entry") - 6)).at(0);
    if (name != kernel_.name) return skip_braces();
    for (const std::string& text : split(head.substr(open + 1, close - open - 1))) {
      const Declared parameter(text);
      const int start = parameter.behind(kernel_.parameter_bytes);
      kernel_.parameters.push_back({start, parameter.size});
      kernel_.parameter_bytes = start + parameter.size;
      names_.place(parameter.name, start);
    }
    ++at_;
    names_.open_scope();
    while (names_.within_kernel()) {
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
      names_.open_scope();
      ++at_;
    } else if (c == '}') {
      names_.close_scope();
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
          names_.declare(name, predicate);
        } else {
          const int count = std::atoi(name.c_str() + bracket + 1);
          for (int i = 0; i < count; ++i) names_.declare(name.substr(0, bracket) + std::to_string(i), predicate);
        }
      }
    } else if (starts_with(text, ".shared")) {
      shared(text);
    } else if (starts_with(text, ".local")) {
      const Declared variable(text);
      const int start = variable.behind(kernel_.local_bytes);
      kernel_.local_bytes = start + variable.size;
      names_.place(variable.name, start);
    } else if (!starts_with(text, ".pragma")) {
      throw Fault{"unknown directive " + text};
    }
  }

  void operand(Instr& in, const std::string& text, bool predicates) {
    if (text[0] == '{') {
      for (const std::string& part : split(within(text))) operand(in, part, predicates);
    } else if (text[0] == '[') {
      const std::string address = strip(within(text));
      const size_t plus = address.find('+');
      in.v.push_back(names_.value(strip(address.substr(0, plus)), false));
      in.offset.push_back(
          plus == std::string::npos ? 0 : static_cast<int64_t>(Names::immediate(strip(address.substr(plus + 1)))));
    } else if (const size_t bar = text.find('|'); bar != std::string::npos) {
      in.v.push_back(names_.value(strip(text.substr(0, bar)), predicates));
      const std::string second = strip(text.substr(bar + 1));
      in.v.push_back(second == "_" ? names_.unused_predicate() : names_.register_of(second));
    } else {
      in.v.push_back(names_.value(text, predicates));
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
      in.guard = names_.register_of(rest.substr(start, end - start));
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
        if (mov && operands.at(0)[0] == '{') opcode += " unpack " + std::to_string(split(within(operands[0])).size());
        if (mov && operands.at(1)[0] == '{') opcode += " pack " + std::to_string(split(within(operands[1])).size());
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

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  std::string file_, source_line_;                            // of the last .loc
  std::vector<std::pair<std::string, std::string>> sources_;  // of each instruction
  std::map<std::string, std::string> files_;
  Kernel kernel_;
  Names names_{kernel_};
  std::unordered_map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

Kernel parse(const std::string& text, const std::string& name) { return Parser(text, name).kernel(); }

}  // namespace ptx
