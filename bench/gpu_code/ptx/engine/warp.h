// The state of a warp, and what handlers of instructions share.

#pragma once

#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>

#include "kernel.h"
#include "memory.h"

namespace ptx {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
};

// What a GPU could count of a launch.
struct Counts {
  uint64_t warps = 0, instructions = 0;
  uint64_t load_bytes = 0, store_bytes = 0;      // of global memory, distinct ones of each instruction of a warp
  uint64_t load_sectors = 0, store_sectors = 0;  // of 32 bytes, that each instruction touches
  uint64_t wavefronts = 0, conflicts = 0;        // of shared memory, and those that free banks would save
  uint64_t by_category[static_cast<int>(Category::COUNT)] = {};
};

struct Launch {
  const Kernel* kernel = nullptr;
  Dim grid, block;
  std::vector<uint8_t> parameters;
  uint32_t dynamic_shared = 0, dynamic_start = 0;
  GlobalMemory* memory = nullptr;
  Counts counts;
  std::vector<Event>* trace = nullptr;             // of shared memory, if it is wanted
  std::vector<std::pair<uint64_t, int>> barriers;  // (block, instruction) in the order that each block passes them
};

struct Block {
  Launch* launch = nullptr;
  uint32_t index = 0, epoch = 0;
  Dim at;
  std::unique_ptr<SharedMemory> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

// Lanes that stand at one instruction.
struct Fragment {
  int pc = 0;
  uint32_t lanes = 0;
  bool waiting = false;
};

// An asynchronous copy that has not landed.
struct Copy {
  uint64_t to = 0;
  int size = 0;
  uint8_t bytes[16] = {};
};

using Row = uint64_t[LANES];

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;  // in its block
  std::vector<uint64_t> registers;
  std::vector<uint32_t> predicates;
  std::vector<std::vector<uint8_t>> local;
  uint32_t live = 0;
  std::vector<Fragment> fragments;
  bool at_barrier = false;
  uint64_t barrier = 0;
  std::vector<Copy> copies;  // not yet of a group
  std::deque<std::vector<Copy>> groups;

  uint64_t* row(int r) { return registers.data() + static_cast<size_t>(r) * LANES; }
  Launch& launch() const { return *block->launch; }
  Actor actor() const { return {block->index, index, block->epoch}; }
  bool done() const { return live == 0; }
};

template <class F>
void each(uint32_t lanes, const F& f) {
  if (lanes == ALL) {
    for (int i = 0; i < LANES; ++i) f(i);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

template <class T>
T get(const uint64_t* row, int lane) {
  T x;
  std::memcpy(&x, row + lane, sizeof x);
  return x;
}

template <class T>
void put(uint64_t* row, int lane, T x) {
  static_assert(sizeof x <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  row[lane] = bits;
}

// A handler of an instruction with so many operands.
struct Form {
  Handler run;
  size_t operands;
};

template <class F, class To, class... From, size_t... I>
void run_lanewise(Warp& w, const Instr& in, uint32_t lanes, std::index_sequence<I...>) {
  uint64_t* const d = w.row(in.v[0]);
  const uint64_t* const operands[] = {w.row(in.v[1 + I])...};
  each(lanes, [&](int i) { put<To>(d, i, F{}(get<From>(operands[I], i)...)); });
}

// An instruction that computes, lane by lane, a To from operands of the types From, by a function without state.
template <class To, class... From, class F>
Form lanewise(F) {
  return {[](Warp& w, const Instr& in, uint32_t lanes) {
            run_lanewise<F, To, From...>(w, in, lanes, std::index_sequence_for<From...>{});
          },
          1 + sizeof...(From)};
}

using Table = std::unordered_map<std::string, Opcode>;

inline void add_opcode(Table& table, const std::string& name, Form form, Category category) {
  Opcode& opcode = table[name];
  opcode.run = form.run;
  opcode.category = category;
  opcode.operands = form.operands;
}

// Opcodes whose spellings are listed one by one.
void add_integers(Table& table);
void add_floats(Table& table);
void add_conversions(Table& table);
void add_warp_operations(Table& table);
void add_matrices(Table& table);
// Opcodes with many modifiers; null for any other.
Opcode memory_opcode(const std::string& spelling);

}  // namespace ptx
