// Floating-point arithmetic and comparisons of every type. Approximations are the host's functions.

#include <functional>
#include <limits>

#include "rounding.h"
#include "warp.h"

namespace ptx {
namespace {

template <class T>
struct Pair {
  T low, high;
};
using Float2 = Pair<float>;

template <class T, bool FTZ, class F>
Form unary(F) {
  return lanewise<T, T>([](T a) { return result<FTZ>(static_cast<T>(F{}(flush<FTZ>(a)))); });
}

template <class T, bool FTZ, class F>
Form binary(F) {
  return lanewise<T, T, T>([](T a, T b) { return result<FTZ>(static_cast<T>(F{}(flush<FTZ>(a), flush<FTZ>(b)))); });
}

template <class T, bool FTZ>
void multiply_add(Warp& w, const Instr& in, uint32_t lanes) {
  uint64_t* const d = w.row(in.v[0]);
  const uint64_t *const a = w.row(in.v[1]), *const b = w.row(in.v[2]), *const c = w.row(in.v[3]);
  each(lanes, [&](int i) {
    const T x = flush<FTZ>(get<T>(a, i)), y = flush<FTZ>(get<T>(b, i)), z = flush<FTZ>(get<T>(c, i));
    put<T>(d, i, result<FTZ>(std::fma(x, y, z)));
  });
}

// fma.rm, which rounds down: the product is exact in float64, and long double has bits enough for the sum.
template <bool FTZ>
void multiply_add_down(Warp& w, const Instr& in, uint32_t lanes) {
  each(lanes, [&](int i) {
    const auto x = [&](int k) { return flush<FTZ>(get<float>(w.row(in.v[k]), i)); };
    const long double exact = static_cast<long double>(x(1)) * x(2) + x(3);
    float below = static_cast<float>(exact);
    if (below > exact) below = std::nextafter(below, -std::numeric_limits<float>::infinity());
    put<float>(w.row(in.v[0]), i, result<FTZ>(below));
  });
}

template <bool FTZ, class F>
Form of_three(F) {
  return {[](Warp& w, const Instr& in, uint32_t lanes) {
            each(lanes, [&](int i) {
              const auto x = [&](int k) { return flushed<FTZ>(get<float>(w.row(in.v[k]), i)); };
              put<float>(w.row(in.v[0]), i, F{}(F{}(x(1), x(2)), x(3)));
            });
          },
          4};
}

// Half types as floats: F of float, rounded again.
struct Half {
  static float from(uint16_t x) { return from_f16(x); }
  static uint16_t to(float x) { return to_f16(x); }
};
struct BFloat16 {
  static float from(uint16_t x) { return from_bf16(x); }
  static uint16_t to(float x) { return to_bf16(x); }
};

// Rounded once: a sum, difference or product of two halves is exact in float64, and rounds the same when float32 rounds
// it to odd first.
float to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || std::isnan(x) || std::isinf(nearest)) return nearest;
  const uint32_t bits = bits_as<uint32_t>(nearest);
  if (bits & 1) return nearest;
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  return bits_as<float>(away ? bits - 1 : bits + 1);
}

template <class H, int PARTS, size_t OPERANDS, class F>
Form half_operation(F) {
  return {[](Warp& w, const Instr& in, uint32_t lanes) {
            each(lanes, [&](int i) {
              uint32_t result = 0;
              for (int k = 0; k < PARTS; ++k) {
                double x[3] = {};
                for (size_t j = 1; j < OPERANDS; ++j) {
                  x[j - 1] = H::from(static_cast<uint16_t>(get<uint32_t>(w.row(in.v[j]), i) >> 16 * k));
                }
                result |= static_cast<uint32_t>(H::to(to_odd(F{}(x[0], x[1], x[2])))) << 16 * k;
              }
              put<uint32_t>(w.row(in.v[0]), i, result);
            });
          },
          OPERANDS};
}

void add(Table& table, const std::string& name, Form form, Category category = Category::FLOAT) {
  add_opcode(table, name, form, category);
}

template <class T, bool FTZ>
void add_type(Table& table, const std::string& type) {
  constexpr Category SPECIAL = Category::SPECIAL;
  const std::string ends = (FTZ ? ".ftz." : ".") + type;
  for (const char* rounding : {"", ".rn"}) {
    add(table, std::string("add") + rounding + ends, binary<T, FTZ>([](T a, T b) { return a + b; }));
    add(table, std::string("sub") + rounding + ends, binary<T, FTZ>([](T a, T b) { return a - b; }));
    add(table, std::string("mul") + rounding + ends, binary<T, FTZ>([](T a, T b) { return a * b; }));
  }
  add(table, "fma.rn" + ends, {multiply_add<T, FTZ>, 4});
  add(table, "mad.rn" + ends, {multiply_add<T, FTZ>, 4});
  add(table, "neg" + ends, unary<T, FTZ>([](T a) { return -a; }));
  add(table, "abs" + ends, unary<T, FTZ>([](T a) { return std::fabs(a); }));
  add(table, "max" + ends, binary<T, FTZ>(Maximum<T, false>{}));
  add(table, "min" + ends, binary<T, FTZ>(Minimum<T, false>{}));
  add(table, "max" + std::string(FTZ ? ".ftz" : "") + ".NaN." + type, binary<T, FTZ>(Maximum<T, true>{}));
  add(table, "min" + std::string(FTZ ? ".ftz" : "") + ".NaN." + type, binary<T, FTZ>(Minimum<T, true>{}));
  add(table, "div.rn" + ends, binary<T, FTZ>([](T a, T b) { return a / b; }), SPECIAL);
  add(table, "rcp.rn" + ends, unary<T, FTZ>([](T a) { return 1 / a; }), SPECIAL);
  add(table, "sqrt.rn" + ends, unary<T, FTZ>([](T a) { return std::sqrt(a); }), SPECIAL);
  add(table, "copysign" + ends, binary<T, FTZ>([](T a, T b) { return std::copysign(b, a); }));
  add(table, "rcp.approx" + ends, unary<T, FTZ>([](T a) { return 1 / a; }), SPECIAL);
  add(table, "rsqrt.approx" + ends, unary<T, FTZ>([](T a) { return 1 / std::sqrt(a); }), SPECIAL);
  if constexpr (std::is_same_v<T, float>) {
    const std::string nan = FTZ ? ".ftz.NaN.f32 of 3" : ".NaN.f32 of 3";
    add(table, "max" + ends + " of 3", of_three<FTZ>(Maximum<T, false>{}));
    add(table, "min" + ends + " of 3", of_three<FTZ>(Minimum<T, false>{}));
    add(table, "max" + nan, of_three<FTZ>(Maximum<T, true>{}));
    add(table, "min" + nan, of_three<FTZ>(Minimum<T, true>{}));
    add(table, "div.full" + ends, binary<T, FTZ>([](T a, T b) { return a / b; }), SPECIAL);
    add(table, "div.approx" + ends, binary<T, FTZ>([](T a, T b) { return a / b; }), SPECIAL);
    add(table, "fma.rm" + ends, {multiply_add_down<FTZ>, 4});
    add(table, "sqrt.approx" + ends, unary<T, FTZ>([](T a) { return std::sqrt(a); }), SPECIAL);
    add(table, "ex2.approx" + ends, unary<T, FTZ>([](T a) { return std::exp2(a); }), SPECIAL);
    add(table, "lg2.approx" + ends, unary<T, FTZ>([](T a) { return std::log2(a); }), SPECIAL);
  }
}

void add_pairs(Table& table) {
  const auto pairwise = [&](const std::string& name, Form form) { add(table, name, form); };
  for (const char* rounding : {"", ".rn"}) {
    pairwise(std::string("add") + rounding + ".f32x2",
             binary<Float2, false>([](Float2 a, Float2 b) { return Float2{a.low + b.low, a.high + b.high}; }));
    pairwise(std::string("sub") + rounding + ".f32x2",
             binary<Float2, false>([](Float2 a, Float2 b) { return Float2{a.low - b.low, a.high - b.high}; }));
    pairwise(std::string("mul") + rounding + ".f32x2",
             binary<Float2, false>([](Float2 a, Float2 b) { return Float2{a.low * b.low, a.high * b.high}; }));
  }
  pairwise("fma.rn.f32x2", {[](Warp& w, const Instr& in, uint32_t lanes) {
                              each(lanes, [&](int i) {
                                const Float2 a = get<Float2>(w.row(in.v[1]), i), b = get<Float2>(w.row(in.v[2]), i);
                                const Float2 c = get<Float2>(w.row(in.v[3]), i);
                                put(w.row(in.v[0]), i,
                                    Float2{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)});
                              });
                            },
                            4});
}

template <class H>
void add_half(Table& table, const std::string& type) {
  const auto both = [&](const std::string& name, auto operands, auto f) {
    constexpr size_t OPERANDS = decltype(operands)::value;
    add(table, name + "." + type, half_operation<H, 1, OPERANDS>(f));
    add(table, name + "." + type + "x2", half_operation<H, 2, OPERANDS>(f));
  };
  constexpr std::integral_constant<size_t, 2> one;
  constexpr std::integral_constant<size_t, 3> two;
  constexpr std::integral_constant<size_t, 4> three;
  for (const char* rounding : {"", ".rn"}) {
    both(std::string("add") + rounding, two, [](double a, double b, double) { return a + b; });
    both(std::string("sub") + rounding, two, [](double a, double b, double) { return a - b; });
    both(std::string("mul") + rounding, two, [](double a, double b, double) { return a * b; });
  }
  both("fma.rn", three, [](double a, double b, double c) { return std::fma(a, b, c); });
  both("neg", one, [](double a, double, double) { return -a; });
  both("abs", one, [](double a, double, double) { return std::fabs(a); });
  both("max", two, [](double a, double b, double) { return Maximum<double, false>{}(a, b); });
  both("min", two, [](double a, double b, double) { return Minimum<double, false>{}(a, b); });
  both("max.NaN", two, [](double a, double b, double) { return Maximum<double, true>{}(a, b); });
  both("min.NaN", two, [](double a, double b, double) { return Minimum<double, true>{}(a, b); });
  // A half and a float32, to float32.
  for (const bool minus : {false, true}) {
    add(table, (minus ? "sub.rn.f32." : "add.rn.f32.") + type,
        {minus ? Handler([](Warp& w, const Instr& in, uint32_t lanes) {
           each(lanes, [&](int i) {
             put(w.row(in.v[0]), i, H::from(get<uint16_t>(w.row(in.v[1]), i)) - get<float>(w.row(in.v[2]), i));
           });
         })
               : Handler([](Warp& w, const Instr& in, uint32_t lanes) {
                   each(lanes, [&](int i) {
                     put(w.row(in.v[0]), i, H::from(get<uint16_t>(w.row(in.v[1]), i)) + get<float>(w.row(in.v[2]), i));
                   });
                 }),
         3});
  }
}

// setp[.and|.or|.xor] p[|q], a, b[, c]: p = (a ? b) op c, q = !(a ? b) op c.
enum Join : uint8_t { NONE, AND, OR, XOR };

uint32_t joined(uint32_t x, uint32_t c, uint8_t join) {
  return join == NONE ? x : join == AND ? x & c : join == OR ? x | c : x ^ c;
}

template <class Value, class F>
void compare(Warp& w, const Instr& in, uint32_t lanes) {
  const uint8_t join = in.op.variant;
  const size_t first = in.v.size() - (join == NONE ? 2 : 3);
  const uint64_t *const a = w.row(in.v[first]), *const b = w.row(in.v[first + 1]);
  uint32_t yes = 0;
  each(lanes, [&](int i) { yes |= static_cast<uint32_t>(F{}(Value::read(a, i), Value::read(b, i))) << i; });
  const uint32_t c = join == NONE ? 0 : w.predicates[in.v.back()], p = joined(yes, c, join), q = joined(~yes, c, join);
  w.predicates[in.v[0]] = (w.predicates[in.v[0]] & ~lanes) | (p & lanes);
  if (first == 2) w.predicates[in.v[1]] = (w.predicates[in.v[1]] & ~lanes) | (q & lanes);
}

template <class T>
struct Plain {
  static T read(const uint64_t* row, int i) { return get<T>(row, i); }
};
struct Flushed {
  static float read(const uint64_t* row, int i) { return flushed<true>(get<float>(row, i)); }
};
template <class H>
struct AsFloat {
  static float read(const uint64_t* row, int i) { return H::from(get<uint16_t>(row, i)); }
};

template <class Value, class F>
void add_comparison(Table& table, const std::string& name, const std::string& type, F) {
  const char* const joins[] = {"", ".and", ".or", ".xor"};
  for (uint8_t join = NONE; join <= XOR; ++join) {
    Opcode& opcode = table["setp." + name + joins[join] + type];
    opcode.run = compare<Value, F>;
    opcode.category = Category::SELECT;
    opcode.variant = join;
  }
}

template <class Value>
void add_comparisons(Table& table, const std::string& type, bool floating) {
  add_comparison<Value>(table, "eq", type, [](auto a, auto b) { return a == b; });
  add_comparison<Value>(table, "lt", type, [](auto a, auto b) { return a < b; });
  add_comparison<Value>(table, "le", type, [](auto a, auto b) { return a <= b; });
  add_comparison<Value>(table, "gt", type, [](auto a, auto b) { return a > b; });
  add_comparison<Value>(table, "ge", type, [](auto a, auto b) { return a >= b; });
  if (!floating) {
    add_comparison<Value>(table, "ne", type, [](auto a, auto b) { return a != b; });
    return;
  }
  add_comparison<Value>(table, "ne", type, [](auto a, auto b) { return a < b || a > b; });
  add_comparison<Value>(table, "equ", type, [](auto a, auto b) { return !(a < b || a > b); });
  add_comparison<Value>(table, "neu", type, [](auto a, auto b) { return a != b; });
  add_comparison<Value>(table, "ltu", type, [](auto a, auto b) { return !(a >= b); });
  add_comparison<Value>(table, "leu", type, [](auto a, auto b) { return !(a > b); });
  add_comparison<Value>(table, "gtu", type, [](auto a, auto b) { return !(a <= b); });
  add_comparison<Value>(table, "geu", type, [](auto a, auto b) { return !(a < b); });
  add_comparison<Value>(table, "num", type, [](auto a, auto b) { return a == a && b == b; });
  add_comparison<Value>(table, "nan", type, [](auto a, auto b) { return a != a || b != b; });
}

}  // namespace

void add_floats(Table& table) {
  add_type<float, false>(table, "f32");
  add_type<float, true>(table, "f32");
  add_type<double, false>(table, "f64");
  add_type<double, true>(table, "f64");
  add_pairs(table);
  add_half<Half>(table, "f16");
  add_half<BFloat16>(table, "bf16");
  add_comparisons<Plain<uint16_t>>(table, ".b16", false);
  add_comparisons<Plain<uint16_t>>(table, ".u16", false);
  add_comparisons<Plain<int16_t>>(table, ".s16", false);
  add_comparisons<Plain<uint32_t>>(table, ".b32", false);
  add_comparisons<Plain<uint32_t>>(table, ".u32", false);
  add_comparisons<Plain<int32_t>>(table, ".s32", false);
  add_comparisons<Plain<uint64_t>>(table, ".b64", false);
  add_comparisons<Plain<uint64_t>>(table, ".u64", false);
  add_comparisons<Plain<int64_t>>(table, ".s64", false);
  add_comparisons<Plain<float>>(table, ".f32", true);
  add_comparisons<Flushed>(table, ".ftz.f32", true);
  add_comparisons<Plain<double>>(table, ".f64", true);
  add_comparisons<AsFloat<Half>>(table, ".f16", true);
  add_comparisons<AsFloat<BFloat16>>(table, ".bf16", true);
}

}  // namespace ptx
