// The functions that Python calls, and the table of opcodes. One that fails returns null or false and writes the error.

#include <algorithm>
#include <cstdio>

#include "execute.h"

namespace ptx {

Opcode find_opcode(const std::string& spelling) {
  static const Table table = [] {
    Table t;
    add_integers(t);
    add_floats(t);
    add_conversions(t);
    add_warp_operations(t);
    add_matrices(t);
    return t;
  }();
  const auto found = table.find(spelling);
  const Opcode opcode = found != table.end() ? found->second : memory_opcode(spelling);
  if (opcode.run == nullptr && opcode.kind != Kind::BRANCH && opcode.kind != Kind::EXIT) {
    throw Fault{"unknown opcode " + spelling};
  }
  return opcode;
}

namespace {

constexpr int COUNTS = 8;

// Of the last launch of this thread that was traced.
thread_local std::vector<Event> events;
thread_local std::vector<uint64_t> barriers;

template <class F>
bool guarded(char* error, int size, const F& f) {
  try {
    f();
    return true;
  } catch (const Fault& fault) {
    std::snprintf(error, size, "%s", fault.what.c_str());
  } catch (const std::exception& exception) {
    std::snprintf(error, size, "%s", exception.what());
  }
  return false;
}

}  // namespace
}  // namespace ptx

extern "C" {

void* ptx_parse(const char* text, const char* name, char* error, int size) {
  ptx::Kernel* kernel = nullptr;
  ptx::guarded(error, size, [&] { kernel = new ptx::Kernel(ptx::parse(text, name)); });
  return kernel;
}

void ptx_free(void* kernel) { delete static_cast<ptx::Kernel*>(kernel); }

// Writes the sizes of the parameters, as far as there is room; returns how many there are.
int ptx_parameters(const void* kernel, int* sizes, int room) {
  const auto& parameters = static_cast<const ptx::Kernel*>(kernel)->parameters;
  for (int i = 0; i < std::min<int>(room, parameters.size()); ++i) sizes[i] = parameters[i].size;
  return static_cast<int>(parameters.size());
}

// geometry: grid and block, three each. arguments: one pointer a parameter. ranges: address, size and flags of each.
// counts: of memory and shared memory, then one a category.
bool ptx_launch(const void* kernel, const uint32_t* geometry, uint32_t shared, const void* const* arguments,
                const uint64_t* ranges, int n_ranges, uint64_t seed, uint64_t most_instructions, bool races, bool trace,
                uint64_t* counts, char* error, int size) {
  using namespace ptx;
  return guarded(error, size, [&] {
    const Kernel& k = *static_cast<const Kernel*>(kernel);
    Launch launch;
    launch.kernel = &k;
    launch.grid = {geometry[0], geometry[1], geometry[2]};
    launch.block = {geometry[3], geometry[4], geometry[5]};
    launch.dynamic_shared = shared;
    launch.dynamic_start = (k.static_shared + 15) / 16 * 16;
    launch.parameters.resize(k.parameter_bytes);
    for (size_t i = 0; i < k.parameters.size(); ++i) {
      std::memcpy(launch.parameters.data() + k.parameters[i].offset, arguments[i], k.parameters[i].size);
    }
    std::vector<Range> tensors;
    for (int i = 0; i < n_ranges; ++i) {
      tensors.push_back({ranges[3 * i], ranges[3 * i + 1], reinterpret_cast<uint8_t*>(ranges[3 * i + 2])});
    }
    GlobalMemory memory(std::move(tensors), races);
    launch.memory = &memory;
    events.clear();
    barriers.clear();
    if (trace) launch.trace = &events;
    execute(launch, {seed, most_instructions});
    const Counts& c = launch.counts;
    const uint64_t values[COUNTS] = {c.warps,        c.instructions,  c.load_bytes, c.store_bytes,
                                     c.load_sectors, c.store_sectors, c.wavefronts, c.conflicts};
    std::copy_n(values, COUNTS, counts);
    std::copy_n(c.by_category, static_cast<int>(Category::COUNT), counts + COUNTS);
    for (const auto& [block, instruction] : launch.barriers) {
      barriers.push_back(block);
      barriers.push_back(instruction);
    }
  });
}

// The events of the last launch, six words each, or its barriers: block and instruction of each.
const void* ptx_trace(int which, uint64_t* count) {
  *count = which == 0 ? ptx::events.size() : ptx::barriers.size() / 2;
  return which == 0 ? static_cast<const void*>(ptx::events.data()) : ptx::barriers.data();
}

const char* ptx_text(const void* kernel, int instruction) {
  return static_cast<const ptx::Kernel*>(kernel)->code.at(instruction).place.c_str();
}
}
