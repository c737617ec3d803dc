// cvt between integers, floats and halves.

#include <cmath>
#include <limits>

#include "rounding.h"
#include "warp.h"

namespace ptx {
namespace {

void add(Table& table, const std::string& name, Form form) { add_opcode(table, name, form, Category::CONVERT); }

// Out of range to the nearest end; NaN to 0.
template <class To, class From>
To clamped(From x) {
  if (std::isnan(x)) return 0;
  using Limits = std::numeric_limits<To>;
  if (x <= static_cast<From>(Limits::min())) return Limits::min();
  if (x >= static_cast<From>(Limits::max())) return Limits::max();
  return static_cast<To>(x);
}

template <class From>
void add_float_to_integers(Table& table, const std::string& from) {
  const auto all = [&](auto to, const std::string& type) {
    using To = decltype(to);
    add(table, "cvt.rni." + type + from, lanewise<To, From>([](From x) { return clamped<To>(std::nearbyint(x)); }));
    add(table, "cvt.rzi." + type + from, lanewise<To, From>([](From x) { return clamped<To>(std::trunc(x)); }));
    add(table, "cvt.rmi." + type + from, lanewise<To, From>([](From x) { return clamped<To>(std::floor(x)); }));
    add(table, "cvt.rpi." + type + from, lanewise<To, From>([](From x) { return clamped<To>(std::ceil(x)); }));
  };
  all(uint16_t{}, "u16");
  all(int16_t{}, "s16");
  all(uint32_t{}, "u32");
  all(int32_t{}, "s32");
  all(uint64_t{}, "u64");
  all(int64_t{}, "s64");
}

template <class T, bool FTZ = false>
void add_to_whole(Table& table, const std::string& type) {
  const std::string ends = (FTZ ? ".ftz." : ".") + type + "." + type;
  const auto all = [&](const std::string& rounding, auto f) {
    add(table, "cvt." + rounding + ends, lanewise<T, T>([](T x) { return decltype(f){}(flush<FTZ>(x)); }));
  };
  all("rni", [](T x) { return std::nearbyint(x); });
  all("rzi", [](T x) { return std::trunc(x); });
  all("rmi", [](T x) { return std::floor(x); });
  all("rpi", [](T x) { return std::ceil(x); });
}

template <class From>
void add_integer(Table& table, const std::string& from) {
  // Signed ones are extended to the register, whatever its size.
  add(table, "cvt.u8" + from, lanewise<uint64_t, From>([](From x) { return uint64_t{static_cast<uint8_t>(x)}; }));
  add(table, "cvt.s8" + from, lanewise<int64_t, From>([](From x) { return int64_t{static_cast<int8_t>(x)}; }));
  add(table, "cvt.u16" + from, lanewise<uint64_t, From>([](From x) { return uint64_t{static_cast<uint16_t>(x)}; }));
  add(table, "cvt.s16" + from, lanewise<int64_t, From>([](From x) { return int64_t{static_cast<int16_t>(x)}; }));
  add(table, "cvt.u32" + from, lanewise<uint64_t, From>([](From x) { return uint64_t{static_cast<uint32_t>(x)}; }));
  add(table, "cvt.s32" + from, lanewise<int64_t, From>([](From x) { return int64_t{static_cast<int32_t>(x)}; }));
  add(table, "cvt.u64" + from, lanewise<uint64_t, From>([](From x) { return static_cast<uint64_t>(x); }));
  add(table, "cvt.s64" + from, lanewise<int64_t, From>([](From x) { return static_cast<int64_t>(x); }));
  add(table, "cvt.rn.f32" + from, lanewise<float, From>([](From x) { return static_cast<float>(x); }));
  add(table, "cvt.rn.f64" + from, lanewise<double, From>([](From x) { return static_cast<double>(x); }));
  add(table, "cvt.rn.f16" + from, lanewise<uint16_t, From>([](From x) { return to_f16(static_cast<double>(x)); }));
}

template <class F>
Form pack_halves(F) {  // d, high, low
  return {[](Warp& w, const Instr& in, uint32_t lanes) {
            each(lanes, [&](int i) {
              const uint32_t high = F{}(get<float>(w.row(in.v[1]), i)), low = F{}(get<float>(w.row(in.v[2]), i));
              put<uint32_t>(w.row(in.v[0]), i, high << 16 | low);
            });
          },
          3};
}

}  // namespace

void add_conversions(Table& table) {
  add_integer<uint8_t>(table, ".u8");
  add_integer<int8_t>(table, ".s8");
  add_integer<uint16_t>(table, ".u16");
  add_integer<int16_t>(table, ".s16");
  add_integer<uint32_t>(table, ".u32");
  add_integer<int32_t>(table, ".s32");
  add_integer<uint64_t>(table, ".u64");
  add_integer<int64_t>(table, ".s64");
  add_float_to_integers<float>(table, ".f32");
  add_float_to_integers<double>(table, ".f64");
  add_to_whole<float>(table, "f32");
  add_to_whole<float, true>(table, "f32");
  add_to_whole<double>(table, "f64");
  add(table, "cvt.f64.f32", lanewise<double, float>([](float x) { return static_cast<double>(x); }));
  add(table, "cvt.rn.f32.f64", lanewise<float, double>([](double x) { return static_cast<float>(x); }));
  // To [0, 1], NaN to 0.
  add(table, "cvt.sat.f32.f32", lanewise<float, float>([](float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }));
  for (const char* ftz : {"", ".ftz"}) {  // halves that are subnormal are normal float32
    add(table, std::string("cvt") + ftz + ".f32.f16",
        lanewise<float, uint16_t>([](uint16_t x) { return from_f16(x); }));
  }
  add(table, "cvt.f32.bf16", lanewise<float, uint16_t>([](uint16_t x) { return from_bf16(x); }));
  add(table, "cvt.f64.f16", lanewise<double, uint16_t>([](uint16_t x) { return static_cast<double>(from_f16(x)); }));
  add(table, "cvt.f64.bf16", lanewise<double, uint16_t>([](uint16_t x) { return static_cast<double>(from_bf16(x)); }));
  add(table, "cvt.rn.f16.f32", lanewise<uint16_t, float>([](float x) { return to_f16(x); }));
  add(table, "cvt.rn.f16.f64", lanewise<uint16_t, double>([](double x) { return to_f16(x); }));
  add(table, "cvt.rn.bf16.f32", lanewise<uint16_t, float>([](float x) { return to_bf16(x); }));
  add(table, "cvt.rna.tf32.f32", lanewise<uint32_t, float>([](float x) { return to_tf32(x); }));
  add(table, "cvt.rn.f16x2.f32", pack_halves([](float x) { return to_f16(x); }));
  add(table, "cvt.rn.bf16x2.f32", pack_halves([](float x) { return to_bf16(x); }));
}

}  // namespace ptx
