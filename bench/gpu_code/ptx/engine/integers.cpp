// Integers, bits, predicates and moves.

#include <type_traits>

#include "warp.h"

namespace ptx {

uint32_t twice(uint16_t);
int32_t twice(int16_t);
uint64_t twice(uint32_t);
int64_t twice(int32_t);
unsigned __int128 twice(uint64_t);
__int128 twice(int64_t);

// The type with twice the bits.
template <class T>
using Twice = decltype(twice(T{}));

namespace {

void add(Table& table, const std::string& name, Form form, Category category = Category::INTEGER) {
  add_opcode(table, name, form, category);
}

template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);  // what the hardware gives
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
}

template <class T>
void add_arithmetic(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  constexpr int BITS = sizeof(T) * 8;
  add(table, "add." + type, lanewise<U, U, U>([](U a, U b) { return static_cast<U>(a + b); }));
  add(table, "sub." + type, lanewise<U, U, U>([](U a, U b) { return static_cast<U>(a - b); }));
  add(table, "mul.lo." + type,
      lanewise<U, U, U>([](U a, U b) { return static_cast<U>(static_cast<uint64_t>(a) * b); }));
  add(table, "mul.hi." + type,
      lanewise<T, T, T>([](T a, T b) { return static_cast<T>(static_cast<Twice<T>>(a) * b >> BITS); }));
  add(table, "mad.lo." + type,
      lanewise<U, U, U, U>([](U a, U b, U c) { return static_cast<U>(static_cast<uint64_t>(a) * b + c); }));
  add(table, "mad.hi." + type,
      lanewise<T, T, T, T>([](T a, T b, T c) { return static_cast<T>((static_cast<Twice<T>>(a) * b >> BITS) + c); }));
  add(table, "div." + type, lanewise<T, T, T>([](T a, T b) { return divide(a, b); }));
  add(table, "rem." + type, lanewise<T, T, T>([](T a, T b) {
        return b == 0 ? a : static_cast<T>(static_cast<U>(a) - static_cast<U>(static_cast<uint64_t>(divide(a, b)) * b));
      }));
  add(table, "min." + type, lanewise<T, T, T>([](T a, T b) { return b < a ? b : a; }));
  add(table, "max." + type, lanewise<T, T, T>([](T a, T b) { return a < b ? b : a; }));
  add(table, "shr." + type, lanewise<T, T, uint32_t>([](T a, uint32_t n) {
        return static_cast<T>(n < BITS ? a >> n : a < 0 ? -1 : 0);
      }));
  if constexpr (BITS < 64) {
    using W = Twice<T>;
    add(table, "mul.wide." + type,
        {[](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes, [&](int i) {
             put<W>(w.row(in.v[0]), i, static_cast<W>(get<T>(w.row(in.v[1]), i)) * get<T>(w.row(in.v[2]), i));
           });
         },
         3});
    add(table, "mad.wide." + type, lanewise<W, T, T, W>([](T a, T b, W c) {
          return static_cast<W>(static_cast<std::make_unsigned_t<W>>(static_cast<W>(a) * b) + c);
        }));
  }
  if constexpr (std::is_signed_v<T>) {
    add(table, "neg." + type, lanewise<U, U>([](U a) { return static_cast<U>(0 - a); }));
    add(table, "abs." + type, lanewise<T, T>([](T a) { return a < 0 ? static_cast<T>(0 - static_cast<U>(a)) : a; }));
  }
  if constexpr (BITS >= 32) {
    // bfe: bits [b, b + c) of a, the uppermost of them extended if signed.
    add(table, "bfe." + type,
        {[](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes, [&](int i) {
             const U a = get<U>(w.row(in.v[1]), i);
             const uint32_t from = get<uint32_t>(w.row(in.v[2]), i) & 0xff,
                            size = get<uint32_t>(w.row(in.v[3]), i) & 0xff;
             U x = from < BITS ? a >> from : 0;
             if (size < BITS) x &= (U{1} << size) - 1;
             if (std::is_signed_v<T> && size != 0) {
               const uint32_t top = std::min<uint32_t>(from + size - 1, BITS - 1);
               const uint32_t width = std::min<uint32_t>(size, BITS);
               if ((a >> top & 1) && width < BITS) x |= ~((U{1} << (top >= from ? top - from + 1 : 0)) - 1);
             }
             put<U>(w.row(in.v[0]), i, x);
           });
         },
         4});
  }
}

template <class U>
void add_bits(Table& table, const std::string& type) {
  constexpr uint32_t BITS = sizeof(U) * 8;
  add(table, "and." + type, lanewise<U, U, U>([](U a, U b) { return static_cast<U>(a & b); }));
  add(table, "or." + type, lanewise<U, U, U>([](U a, U b) { return static_cast<U>(a | b); }));
  add(table, "xor." + type, lanewise<U, U, U>([](U a, U b) { return static_cast<U>(a ^ b); }));
  add(table, "not." + type, lanewise<U, U>([](U a) { return static_cast<U>(~a); }));
  add(table, "shl." + type, lanewise<U, U, uint32_t>([](U a, uint32_t n) {
        return static_cast<U>(n < BITS ? static_cast<uint64_t>(a) << n : 0);
      }));
  add(table, "shr." + type,
      lanewise<U, U, uint32_t>([](U a, uint32_t n) { return static_cast<U>(n < BITS ? a >> n : 0); }));
  if constexpr (BITS >= 32) {
    add(table, "popc." + type,
        {[](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes,
                [&](int i) { put<uint32_t>(w.row(in.v[0]), i, __builtin_popcountll(get<U>(w.row(in.v[1]), i))); });
         },
         2});
    add(table, "clz." + type,
        {[](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes, [&](int i) {
             const U x = get<U>(w.row(in.v[1]), i);
             put<uint32_t>(w.row(in.v[0]), i, x == 0 ? BITS : __builtin_clzll(x) - (64 - BITS));
           });
         },
         2});
    add(table, "brev." + type, lanewise<U, U>([](U a) {
          U x = 0;
          for (uint32_t k = 0; k < BITS; ++k) x |= (a >> k & 1) << (BITS - 1 - k);
          return x;
        }));
    // bfi d, a, b, from, size: the lowest bits of a into b.
    add(table, "bfi." + type,
        {[](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes, [&](int i) {
             const U a = get<U>(w.row(in.v[1]), i), b = get<U>(w.row(in.v[2]), i);
             const uint32_t from = get<uint32_t>(w.row(in.v[3]), i) & 0xff,
                            size = get<uint32_t>(w.row(in.v[4]), i) & 0xff;
             const U ones = size < BITS ? (U{1} << size) - 1 : ~U{0};
             const U mask = from < BITS ? ones << from : 0;
             put<U>(w.row(in.v[0]), i, (b & ~mask) | ((from < BITS ? a << from : 0) & mask));
           });
         },
         5});
  }
}

// Integers and floats alike are moved and selected as bits.
template <class U>
void add_moves(Table& table, const std::string& type) {
  add(table, "mov." + type, lanewise<U, U>([](U a) { return a; }), Category::MOVE);
  add(table, "selp." + type,
      {[](Warp& w, const Instr& in, uint32_t lanes) {
         uint64_t* const d = w.row(in.v[0]);
         const uint64_t *const a = w.row(in.v[1]), *const b = w.row(in.v[2]);
         const uint32_t chosen = w.predicates[in.v[3]];
         each(lanes, [&](int i) { put<U>(d, i, chosen >> i & 1 ? get<U>(a, i) : get<U>(b, i)); });
       },
       4},
      Category::SELECT);
}

// mov.b64 d, {a, b} and mov.b64 {a, b}, d: the first is the lowest.
template <class U, class Part>
void add_packing(Table& table, const std::string& type) {
  constexpr int PARTS = sizeof(U) / sizeof(Part);
  add(table, "mov." + type + " pack " + std::to_string(PARTS),
      {[](Warp& w, const Instr& in, uint32_t lanes) {
         each(lanes, [&](int i) {
           U x = 0;
           for (int k = 0; k < PARTS; ++k)
             x |= static_cast<U>(get<Part>(w.row(in.v[1 + k]), i)) << k * 8 * sizeof(Part);
           put<U>(w.row(in.v[0]), i, x);
         });
       },
       PARTS + 1},
      Category::MOVE);
  add(table, "mov." + type + " unpack " + std::to_string(PARTS),
      {[](Warp& w, const Instr& in, uint32_t lanes) {
         each(lanes, [&](int i) {
           const U x = get<U>(w.row(in.v[PARTS]), i);
           for (int k = 0; k < PARTS; ++k) {
             put<Part>(w.row(in.v[k]), i, static_cast<Part>(x >> k * 8 * sizeof(Part)));
           }
         });
       },
       PARTS + 1},
      Category::MOVE);
}

template <size_t OPERANDS, class F>
Form predicates(F) {
  return {[](Warp& w, const Instr& in, uint32_t lanes) {
            uint32_t& d = w.predicates[in.v[0]];
            const uint32_t x = F{}(w.predicates[in.v[1]], w.predicates[in.v[OPERANDS - 1]]);
            d = (d & ~lanes) | (x & lanes);
          },
          OPERANDS};
}

void permute(Warp& w, const Instr& in, uint32_t lanes) {
  each(lanes, [&](int i) {
    const uint64_t from = get<uint32_t>(w.row(in.v[1]), i) | static_cast<uint64_t>(get<uint32_t>(w.row(in.v[2]), i))
                                                                 << 32;
    const uint32_t selector = get<uint32_t>(w.row(in.v[3]), i);
    uint32_t x = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t choice = selector >> 4 * k;
      uint32_t byte = from >> 8 * (choice & 7) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
      x |= byte << 8 * k;
    }
    put<uint32_t>(w.row(in.v[0]), i, x);
  });
}

// shf.l.wrap d, a, b, n: the upper word of (b, a) << n; shf.r: the lower word of (b, a) >> n.
template <bool LEFT, bool WRAP>
void funnel(Warp& w, const Instr& in, uint32_t lanes) {
  each(lanes, [&](int i) {
    const uint64_t x = static_cast<uint64_t>(get<uint32_t>(w.row(in.v[2]), i)) << 32 | get<uint32_t>(w.row(in.v[1]), i);
    uint32_t n = get<uint32_t>(w.row(in.v[3]), i);
    n = WRAP ? n & 31 : std::min<uint32_t>(n, 32);
    put<uint32_t>(w.row(in.v[0]), i, static_cast<uint32_t>(LEFT ? (x << n) >> 32 : x >> n));
  });
}

}  // namespace

void add_integers(Table& table) {
  add_arithmetic<uint16_t>(table, "u16");
  add_arithmetic<int16_t>(table, "s16");
  add_arithmetic<uint32_t>(table, "u32");
  add_arithmetic<int32_t>(table, "s32");
  add_arithmetic<uint64_t>(table, "u64");
  add_arithmetic<int64_t>(table, "s64");
  add_bits<uint16_t>(table, "b16");
  add_bits<uint32_t>(table, "b32");
  add_bits<uint64_t>(table, "b64");
  for (const char* type : {"b16", "u16", "s16", "f16", "bf16"}) add_moves<uint16_t>(table, type);
  for (const char* type : {"b32", "u32", "s32", "f32"}) add_moves<uint32_t>(table, type);
  for (const char* type : {"b64", "u64", "s64", "f64"}) add_moves<uint64_t>(table, type);
  add_packing<uint32_t, uint16_t>(table, "b32");
  add_packing<uint64_t, uint32_t>(table, "b64");
  add_packing<uint64_t, uint16_t>(table, "b64");
  add_packing<uint32_t, uint8_t>(table, "b32");
  add_packing<uint16_t, uint8_t>(table, "b16");
  add(table, "mov.pred", predicates<2>([](uint32_t a, uint32_t) { return a; }), Category::SELECT);
  add(table, "not.pred", predicates<2>([](uint32_t a, uint32_t) { return ~a; }), Category::SELECT);
  add(table, "and.pred", predicates<3>([](uint32_t a, uint32_t b) { return a & b; }), Category::SELECT);
  add(table, "or.pred", predicates<3>([](uint32_t a, uint32_t b) { return a | b; }), Category::SELECT);
  add(table, "xor.pred", predicates<3>([](uint32_t a, uint32_t b) { return a ^ b; }), Category::SELECT);
  add(table, "prmt.b32", {permute, 4});
  add(table, "shf.l.wrap.b32", {funnel<true, true>, 4});
  add(table, "shf.r.wrap.b32", {funnel<false, true>, 4});
  add(table, "shf.l.clamp.b32", {funnel<true, false>, 4});
  add(table, "shf.r.clamp.b32", {funnel<false, false>, 4});
  // Generic addresses are those of global memory, except a window.
  for (const char* name : {"cvta.to.global.u64", "cvta.global.u64"})
    add(table, name, lanewise<uint64_t, uint64_t>([](uint64_t a) { return a; }));
  add(table, "cvta.shared.u64", lanewise<uint64_t, uint64_t>([](uint64_t a) { return a + SHARED_WINDOW; }));
  add(table, "cvta.to.shared.u64", lanewise<uint64_t, uint64_t>([](uint64_t a) { return a - SHARED_WINDOW; }));
}

}  // namespace ptx
