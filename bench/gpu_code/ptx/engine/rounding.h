// Half precision as in the hardware: rounding to the nearest, ties to even, one NaN; and its maxima.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline float from_bf16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -small : small;
}

inline uint16_t to_f16(double x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24));
  int exponent = 0;
  std::frexp(size, &exponent);                                              // size = f * 2^exponent, f in [0.5, 1)
  const double fraction = std::nearbyint(std::ldexp(size, 11 - exponent));  // in [1024, 2048]
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(fraction) - 1024);
}

// -0 is less than +0. Without NAN_WINS a NaN gives way to a number.
template <class T, bool NAN_WINS>
struct Maximum {
  T operator()(T a, T b) const {
    if (std::isnan(a) || std::isnan(b)) {
      if (NAN_WINS || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<T>::quiet_NaN();
      return std::isnan(a) ? b : a;
    }
    if (a == b) return std::signbit(a) ? b : a;
    return a < b ? b : a;
  }
};

template <class T, bool NAN_WINS>
struct Minimum {
  T operator()(T a, T b) const { return -Maximum<T, NAN_WINS>{}(-a, -b); }
};

// The part of a float32 that tensor cores read: the lowest 13 bits are ignored.
inline float tf32(uint32_t bits) { return bits_as<float>(bits & 0xffffe000); }

// As cvt.rna.tf32.f32: to the nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffffff;
  return std::isinf(x) ? bits : (bits + 0x1000) & 0xffffe000;
}

template <bool FTZ>
float flushed(float x) {
  return FTZ && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

template <bool FTZ, class T>
T flush(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return flushed<FTZ>(x);
  } else {
    return x;
  }
}

// The result of arithmetic: float has one NaN, whichever went in; for double, PTX leaves open which one.
template <bool FTZ, class T>
T result(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(x) ? std::numeric_limits<T>::quiet_NaN() : flush<FTZ>(x);
  } else {
    return x;
  }
}

}  // namespace ptx
