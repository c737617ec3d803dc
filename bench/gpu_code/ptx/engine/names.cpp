#include "names.h"

#include <cctype>
#include <cstdlib>

#include "text.h"

namespace ptx {
namespace {

bool is_special(const std::string& name) {
  static const std::set<std::string> names{"%laneid",      "%warpid",      "%lanemask_lt", "%lanemask_le",
                                           "%lanemask_gt", "%lanemask_ge", "%lanemask_eq", "%nwarpid"};
  for (const char* prefix : {"%tid.", "%ntid.", "%ctaid.", "%nctaid."}) {
    if (starts_with(name, prefix)) return true;
  }
  return names.count(name) != 0;
}

}  // namespace

// Rows are given to registers when they are first named: a declaration has more than are used.
int Names::register_of(const std::string& name) {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->find(name);
    if (found == scope->end()) continue;
    Register& r = found->second;
    if (r.index < 0) r.index = static_cast<int>(r.predicate ? next_predicate_++ : next_row_++);
    return r.index;
  }
  throw Fault{"unknown register " + name};
}

int Names::constant(uint64_t bits) {
  const auto [found, fresh] = constants_.emplace(bits, static_cast<int>(next_row_));
  if (fresh) {
    kernel_.constants.emplace_back(found->second, bits);
    ++next_row_;
  }
  return found->second;
}

int Names::constant_predicate(bool value) {
  kernel_.constant_predicates.emplace_back(static_cast<int>(next_predicate_), value ? ALL : 0);
  return static_cast<int>(next_predicate_++);
}

int Names::special(const std::string& name) {
  const auto [found, fresh] = specials_.emplace(name, static_cast<int>(next_row_));
  if (fresh) {
    kernel_.specials.emplace_back(found->second, name);
    ++next_row_;
  }
  return found->second;
}

uint64_t Names::immediate(const std::string& text) {
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

int Names::value(const std::string& text, bool predicates) {
  if (text[0] == '-' || std::isdigit(static_cast<unsigned char>(text[0]))) {
    return predicates ? constant_predicate(immediate(text) != 0) : constant(immediate(text));
  }
  if (text == "_") return predicates ? unused_predicate() : static_cast<int>(next_row_++);
  if (is_special(text)) return special(text);
  if (symbols_.count(text)) return constant(symbols_[text]);
  if (dynamic_.count(text)) return special("dynamic shared memory");
  return register_of(text);
}

}  // namespace ptx
