// A kernel as parsed: a list of instructions over numbered rows of registers, one value a lane.
//
// Every operand is a row: constants and special registers have rows of their own, filled when a warp starts. Predicates
// are bits, a word of 32 lanes each.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffff;
constexpr uint64_t SHARED_WINDOW = 0xffff000000000000;  // generic addresses from here on are of shared memory

struct Instr;
struct Warp;

// Executes an instruction for the lanes whose bits are set.
using Handler = void (*)(Warp&, const Instr&, uint32_t lanes);

enum class Kind : uint8_t {
  PLAIN,
  BRANCH,
  EXIT,
  BARRIER,
  TOGETHER,  // lanes exchange something: those of the member mask have to arrive at it
};

enum class Category : uint8_t {
  INTEGER,
  FLOAT,
  SPECIAL,  // exponentials, logarithms, reciprocals, division
  CONVERT,
  SELECT,  // predicates and selection
  MOVE,
  MATRIX,
  SHUFFLE,
  BARRIER,
  CONTROL,
  GLOBAL_LOAD,
  GLOBAL_STORE,
  SHARED_LOAD,
  SHARED_STORE,
  ATOMIC,
  OTHER,
  COUNT,
};

enum class Space : uint8_t { GENERIC, GLOBAL, SHARED, PARAM, LOCAL };

// What the spelling of a load, store or atomic says.
struct Access {
  Space space = Space::GENERIC;
  uint8_t size = 0;   // bytes of an element
  uint8_t count = 1;  // elements of a vector
  bool sign = false;  // loaded with its sign extended
  bool release = false, acquire = false;
};

struct Opcode {
  Handler run = nullptr;
  Kind kind = Kind::PLAIN;
  Category category = Category::OTHER;
  bool masked = false;  // TOGETHER: the last operand is the member mask; otherwise every lane is a member
  Access access = {};
  uint8_t variant = 0;
  size_t operands = 0;  // how many there have to be; 0 where that varies
};

struct Instr {
  Opcode op;
  int guard = -1;
  bool negated = false;         // the guard
  std::vector<int> v;           // rows, or predicates, destinations first; vectors flattened
  std::vector<int64_t> offset;  // of each address among the operands
  int target = -1;              // of a branch
  std::string text, place;      // as written, and where
};

struct Parameter {
  int offset = 0, size = 0;
};

struct Kernel {
  std::string name;
  std::vector<Instr> code;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0, static_shared = 0, local_bytes = 0;
  int rows = 0, predicates = 0;
  std::vector<std::pair<int, uint64_t>> constants;
  std::vector<std::pair<int, uint32_t>> constant_predicates;
  std::vector<std::pair<int, std::string>> specials;
};

// An error of parsing or executing. A lane of -1 stands for the whole warp.
struct Fault {
  std::string what;
  int lane = -1;
};

// Finds an opcode by its full spelling; a spelling that is not known is a Fault.
Opcode find_opcode(const std::string& spelling);

Kernel parse(const std::string& text, const std::string& name);

}  // namespace ptx
