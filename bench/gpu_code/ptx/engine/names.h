// The names of a kernel's operands and their rows: registers, constants, special registers, symbols.

#pragma once

#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel.h"

namespace ptx {

class Names {
 public:
  // The kernel receives the constants and special registers that are named.
  explicit Names(Kernel& kernel) : kernel_(kernel) {}

  // Registers belong to the block in braces that declares them.
  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  bool within_kernel() const { return !scopes_.empty(); }

  void declare(const std::string& name, bool predicate) { scopes_.back()[name] = {predicate, -1}; }

  // Parameters and variables: the byte at which they start.
  void place(const std::string& name, int start) { symbols_[name] = start; }

  // Shared memory whose size is given at the launch.
  void place_dynamic(const std::string& name) { dynamic_.insert(name); }

  // The row of a value, or the number of a predicate.
  int value(const std::string& text, bool predicates);

  int register_of(const std::string& name);

  // A predicate that nothing reads.
  int unused_predicate() { return static_cast<int>(next_predicate_++); }

  int rows() const { return static_cast<int>(next_row_); }
  int predicates() const { return static_cast<int>(next_predicate_); }

  static uint64_t immediate(const std::string& text);

 private:
  struct Register {
    bool predicate = false;
    int index = 0;
  };

  int constant(uint64_t bits);
  int constant_predicate(bool value);
  int special(const std::string& name);

  Kernel& kernel_;
  size_t next_row_ = 0, next_predicate_ = 0;
  std::unordered_map<std::string, int> symbols_;
  std::set<std::string> dynamic_;
  std::vector<std::unordered_map<std::string, Register>> scopes_;
  std::unordered_map<uint64_t, int> constants_;
  std::unordered_map<std::string, int> specials_;
};

}  // namespace ptx
