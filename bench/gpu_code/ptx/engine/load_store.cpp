// Loads, stores, atomics and asynchronous copies.

#include <set>

#include "shared.h"
#include "warp.h"

namespace ptx {
namespace {

// Lanes of one instruction that store different values to one address: PTX does not say which value remains.
void check_same(const uint64_t* addresses, const uint8_t (*bytes)[32], int size, uint32_t lanes) {
  int slots[64];
  std::fill(slots, slots + 64, -1);
  each(lanes, [&](int i) {
    for (uint64_t slot = addresses[i] / size % 64;; slot = (slot + 1) % 64) {
      if (slots[slot] < 0) {
        slots[slot] = i;
        break;
      }
      const int other = slots[slot];
      if (addresses[other] != addresses[i]) continue;
      if (std::memcmp(bytes[other], bytes[i], size) != 0) {
        throw Fault{"race: lane " + std::to_string(other) + " stores another value to the same address", i};
      }
      break;
    }
  });
}

// A byte that several lanes request at once is moved once.
void count_global(const uint64_t* addresses, int size, uint32_t lanes, uint64_t& bytes, uint64_t& sectors) {
  uint64_t distinct[LANES], touched[LANES];
  int n = 0;
  each(lanes, [&](int i) { distinct[n++] = addresses[i]; });
  std::sort(distinct, distinct + n);
  n = static_cast<int>(std::unique(distinct, distinct + n) - distinct);
  bytes += static_cast<uint64_t>(n) * size;
  for (int k = 0; k < n; ++k) touched[k] = distinct[k] / 32;  // aligned: an access lies in one sector
  sectors += std::unique(touched, touched + n) - touched;
}

void count(Warp& w, Space space, const uint64_t* addresses, int size, uint32_t lanes, bool store) {
  Counts& counts = w.launch().counts;
  if (space == Space::GLOBAL) {
    count_global(addresses, size, lanes, store ? counts.store_bytes : counts.load_bytes,
                 store ? counts.store_sectors : counts.load_sectors);
  } else if (space == Space::SHARED) {
    uint64_t packed[LANES];
    int n = 0;
    each(lanes, [&](int i) { packed[n++] = addresses[i]; });
    count_wavefronts(w, packed, n, size);
  }
}

// The addresses of the lanes, and their space if that is generic: the same for all lanes of an instruction.
Space addresses_of(Warp& w, const Instr& in, int operand, uint32_t lanes, uint64_t* addresses) {
  Space space = in.op.access.space;
  const bool narrow = space == Space::SHARED;
  each(lanes, [&](int i) {
    const uint64_t base = w.row(in.v[operand])[i];
    addresses[i] = narrow ? static_cast<uint32_t>(base + in.offset[0]) : base + in.offset[0];
  });
  if (space == Space::GENERIC) {
    space = addresses[__builtin_ctz(lanes)] >= SHARED_WINDOW ? Space::SHARED : Space::GLOBAL;
    each(lanes, [&](int i) {
      if ((addresses[i] >= SHARED_WINDOW) != (space == Space::SHARED)) throw Fault{"addresses of two spaces", i};
      if (space == Space::SHARED) addresses[i] -= SHARED_WINDOW;
    });
  }
  return space;
}

template <class F>
void in_bounds(const std::vector<uint8_t>& bytes, uint64_t address, int size, const F& f) {
  if (address % size || address + size > bytes.size()) {
    throw Fault{std::to_string(size) + " bytes at " + std::to_string(address) + " of " + std::to_string(bytes.size())};
  }
  f();
}

uint64_t extended(const uint8_t* bytes, const Access& access) {
  uint64_t x = 0;
  std::memcpy(&x, bytes, access.size);
  const int unused = 64 - 8 * access.size;
  return access.sign ? static_cast<uint64_t>(static_cast<int64_t>(x << unused) >> unused) : x;
}

void load(Warp& w, const Instr& in, uint32_t lanes) {
  const Access& access = in.op.access;
  const int size = access.size * access.count;
  uint64_t addresses[LANES];
  const Space space = addresses_of(w, in, access.count, lanes, addresses);
  count(w, space, addresses, size, lanes, false);
  const Actor actor = w.actor();
  uint8_t bytes[32];
  each(lanes, [&](int i) {
    on_lane(i, [&] {
      switch (space) {
        case Space::SHARED:
          w.block->shared->load(actor, addresses[i], size, size, bytes);
          break;
        case Space::GLOBAL:
          w.launch().memory->load(actor, addresses[i], size, size, bytes);
          break;
        default: {
          const std::vector<uint8_t>& from = space == Space::PARAM ? w.launch().parameters : w.local[i];
          in_bounds(from, addresses[i], size, [&] { std::memcpy(bytes, from.data() + addresses[i], size); });
        }
      }
    });
    for (int k = 0; k < access.count; ++k) w.row(in.v[k])[i] = extended(bytes + k * access.size, access);
  });
}

void store(Warp& w, const Instr& in, uint32_t lanes) {
  const Access& access = in.op.access;
  const int size = access.size * access.count;
  uint64_t addresses[LANES];
  uint8_t bytes[LANES][32];
  const Space space = addresses_of(w, in, 0, lanes, addresses);
  each(lanes, [&](int i) {
    for (int k = 0; k < access.count; ++k) std::memcpy(bytes[i] + k * access.size, w.row(in.v[1 + k]) + i, access.size);
  });
  if (space != Space::LOCAL) check_same(addresses, bytes, size, lanes);
  count(w, space, addresses, size, lanes, true);
  const Actor actor = w.actor();
  each(lanes, [&](int i) {
    on_lane(i, [&] {
      if (space == Space::SHARED) {
        w.block->shared->store(actor, addresses[i], size, size, bytes[i]);
      } else if (space == Space::GLOBAL) {
        w.launch().memory->store(actor, addresses[i], size, size, bytes[i]);
      } else {
        std::vector<uint8_t>& to = w.local[i];
        in_bounds(to, addresses[i], size, [&] { std::memcpy(to.data() + addresses[i], bytes[i], size); });
      }
    });
  });
}

// cp.async [to], [from], size[, read]: what is not read is zero.
void copy(Warp& w, const Instr& in, uint32_t lanes) {
  if (in.v.size() > 4) throw Fault{"a copy of more than four operands"};
  const int size = static_cast<int>(get<uint32_t>(w.row(in.v[2]), 0));
  uint64_t from[LANES], to[LANES];
  uint32_t reading = 0;
  each(lanes, [&](int i) {
    Copy copy;
    copy.to = to[i] = static_cast<uint32_t>(w.row(in.v[0])[i] + in.offset[0]);
    copy.size = size;
    from[i] = w.row(in.v[1])[i] + in.offset[1];
    const uint32_t read = in.v.size() > 3 ? get<uint32_t>(w.row(in.v[3]), i) : size;
    on_lane(i, [&] {
      if (read != 0 && read != static_cast<uint32_t>(size)) throw Fault{"a part of a copy"};
      if (read != 0) w.launch().memory->load(w.actor(), from[i], size, size, copy.bytes);
      w.block->shared->start_copy(w.actor(), copy.to, size, size);
    });
    if (read != 0) reading |= 1u << i;
    w.copies.push_back(copy);
  });
  count(w, Space::GLOBAL, from, size, reading, false);
  count(w, Space::SHARED, to, size, lanes, true);
}

template <class T, class F>
Handler atomic(F) {
  return [](Warp& w, const Instr& in, uint32_t lanes) {
    const Access& access = in.op.access;
    uint64_t addresses[LANES];
    const int first = access.count;  // 1 where the old value is wanted, 0 for red
    if (addresses_of(w, in, first, lanes, addresses) != Space::GLOBAL) throw Fault{"an atomic on shared memory"};
    each(lanes, [&](int i) {
      on_lane(i, [&] {
        uint8_t* const bytes =
            w.launch().memory->atomic(w.actor(), addresses[i], sizeof(T), access.release, access.acquire);
        T old;
        std::memcpy(&old, bytes, sizeof old);
        const T b = get<T>(w.row(in.v[first + 1]), i), c = get<T>(w.row(in.v.back()), i);
        const T fresh = F{}(old, b, c);
        std::memcpy(bytes, &fresh, sizeof fresh);
        if (first == 1) put<T>(w.row(in.v[0]), i, old);
      });
    });
  };
}

template <class T>
Handler find_atomic(const std::string& operation) {
  if (operation == "add") return atomic<T>([](T a, T b, T) { return static_cast<T>(a + b); });
  if (operation == "min") return atomic<T>([](T a, T b, T) { return b < a ? b : a; });
  if (operation == "max") return atomic<T>([](T a, T b, T) { return a < b ? b : a; });
  if (operation == "exch") return atomic<T>([](T, T b, T) { return b; });
  if constexpr (std::is_integral_v<T>) {
    if (operation == "and") return atomic<T>([](T a, T b, T) { return a & b; });
    if (operation == "or") return atomic<T>([](T a, T b, T) { return a | b; });
    if (operation == "xor") return atomic<T>([](T a, T b, T) { return a ^ b; });
    if (operation == "cas") return atomic<T>([](T a, T b, T c) { return a == b ? c : a; });
    if (operation == "inc") return atomic<T>([](T a, T b, T) { return a >= b ? T(0) : T(a + 1); });
    if (operation == "dec") return atomic<T>([](T a, T b, T) { return a == 0 || a > b ? b : T(a - 1); });
  }
  return nullptr;
}

Handler find_atomic(const std::string& operation, const std::string& type) {
  if (type == "u32" || type == "b32") return find_atomic<uint32_t>(operation);
  if (type == "s32") return find_atomic<int32_t>(operation);
  if (type == "u64" || type == "b64") return find_atomic<uint64_t>(operation);
  if (type == "s64") return find_atomic<int64_t>(operation);
  if (type == "f32") return find_atomic<float>(operation);
  if (type == "f64") return find_atomic<double>(operation);
  return nullptr;
}

std::vector<std::string> parts_of(const std::string& spelling) {
  std::vector<std::string> parts(1);
  for (const char c : spelling) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

Opcode load_or_store(const std::vector<std::string>& parts) {
  static const std::unordered_map<std::string, Space> spaces{{"global", Space::GLOBAL},
                                                             {"shared", Space::SHARED},
                                                             {"shared::cta", Space::SHARED},
                                                             {"param", Space::PARAM},
                                                             {"local", Space::LOCAL}};
  static const std::set<std::string> hints{"weak",
                                           "volatile",
                                           "nc",
                                           "ca",
                                           "cg",
                                           "cs",
                                           "wb",
                                           "wt",
                                           "L1::evict_first",
                                           "L1::evict_last",
                                           "L1::no_allocate",
                                           "L1::evict_normal",
                                           "L2::128B",
                                           "L2::256B",
                                           "L2::64B"};
  static const std::unordered_map<std::string, int> vectors{{"v2", 2}, {"v4", 4}, {"v8", 8}};
  const bool loads = parts[0] == "ld";
  Access access;
  for (size_t k = 1; k + 1 < parts.size(); ++k) {
    if (const auto space = spaces.find(parts[k]); space != spaces.end()) {
      access.space = space->second;
    } else if (const auto vector = vectors.find(parts[k]); vector != vectors.end()) {
      access.count = static_cast<uint8_t>(vector->second);
    } else if (hints.count(parts[k]) == 0) {
      return {};
    }
  }
  const std::string& type = parts.back();
  if (type.size() < 2 || (type[0] != 'b' && type[0] != 'u' && type[0] != 's' && type[0] != 'f')) return {};
  const int bits = std::atoi(type.c_str() + 1);
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) return {};
  access.size = static_cast<uint8_t>(bits / 8);
  access.sign = type[0] == 's';
  if (access.size * access.count > 32) return {};
  const bool global = access.space == Space::GLOBAL || access.space == Space::GENERIC;
  Category category = Category::MOVE;
  if (global) category = loads ? Category::GLOBAL_LOAD : Category::GLOBAL_STORE;
  if (access.space == Space::SHARED) category = loads ? Category::SHARED_LOAD : Category::SHARED_STORE;
  return {loads ? load : store, Kind::PLAIN, category, false, access, 0, access.count + 1u};
}

Opcode atomic_or_reduction(const std::vector<std::string>& parts) {
  Access access;
  access.count = parts[0] == "atom" ? 1 : 0;
  for (size_t k = 1; k + 2 < parts.size(); ++k) {
    const std::string& part = parts[k];
    if (part == "global") {
      access.space = Space::GLOBAL;
    } else if (part == "acquire" || part == "release" || part == "acq_rel") {
      access.acquire = part != "release";
      access.release = part != "acquire";
    } else if (part != "gpu" && part != "sys" && part != "relaxed") {
      return {};
    }
  }
  const Handler run = find_atomic(parts[parts.size() - 2], parts.back());
  return {run,
          Kind::PLAIN,
          Category::ATOMIC,
          false,
          access,
          0,
          access.count + (parts[parts.size() - 2] == "cas" ? 3u : 2u)};
}

}  // namespace

Opcode memory_opcode(const std::string& spelling) {
  const std::vector<std::string> parts = parts_of(spelling);
  if (parts.size() < 2) return {};
  if (parts[0] == "ld" || parts[0] == "st") return load_or_store(parts);
  if (parts.size() > 2 && (parts[0] == "atom" || parts[0] == "red")) return atomic_or_reduction(parts);
  static const std::set<std::string> copies{"cp.async.ca.shared.global",          "cp.async.cg.shared.global",
                                            "cp.async.ca.shared.global.L2::128B", "cp.async.cg.shared.global.L2::128B",
                                            "cp.async.ca.shared::cta.global",     "cp.async.cg.shared::cta.global"};
  if (copies.count(spelling)) return {copy, Kind::PLAIN, Category::GLOBAL_LOAD, false, {}, 0, 0};
  return {};
}

}  // namespace ptx
