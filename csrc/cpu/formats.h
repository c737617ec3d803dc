// How floats are stored: their order as integers, what they are in float32 or float64, a function for each type.

#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "../td_loss.h"
#include "exponential.h"
#include "versions.h"

namespace dqn_fused::cpu {

// A maximum is taken over integers that are ordered as the floats are: integer maxima vectorise without -ffast-math,
// NaN shows as a magnitude above infinity's, and half precision needs no conversion, so its lanes stay 16 bits wide.
template <class Float, class Int, int MANTISSA_BITS>
struct Format {
  using Bits = Int;
  static constexpr Int MAGNITUDE = std::numeric_limits<Int>::max();
  static constexpr Int INFINITE = static_cast<Int>(MAGNITUDE >> MANTISSA_BITS << MANTISSA_BITS);

  // Its own inverse: negative floats have their magnitude flipped.
  DQN_FUSED_INLINE static Int key(Int x) { return static_cast<Int>(x ^ ((x >> (8 * sizeof(Int) - 1)) & MAGNITUDE)); }

  DQN_FUSED_INLINE static double value(Int x) {
    Float y;
    std::memcpy(&y, &x, sizeof y);
    return static_cast<double>(y);
  }
};

template <class Float>
struct FormatOf;
template <>
struct FormatOf<double> : Format<double, int64_t, 52> {};
template <>
struct FormatOf<float> : Format<float, int32_t, 23> {};
template <>
struct FormatOf<Half> : Format<Half, int16_t, 10> {};
template <>
struct FormatOf<BFloat16> : Format<BFloat16, int16_t, 7> {};

template <class Float>
DQN_FUSED_INLINE double largest_of(const void* data, int64_t n, int64_t stride) {
  using F = FormatOf<Float>;
  const auto* row = static_cast<const Float*>(data);
  typename F::Bits best = std::numeric_limits<typename F::Bits>::min(), magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    typename F::Bits x;
    std::memcpy(&x, row + i * stride, sizeof x);
    const typename F::Bits key = F::key(x), size = x & F::MAGNITUDE;
    best = key > best ? key : best;
    magnitude = size > magnitude ? size : magnitude;
  }
  return magnitude > F::INFINITE ? std::numeric_limits<double>::quiet_NaN() : F::value(F::key(best));
}

template <class T, class Stored>
DQN_FUSED_INLINE T widen(Stored x) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return static_cast<T>(from_bits(static_cast<uint32_t>(x.x) << 16));
  } else if constexpr (std::is_same_v<Stored, Half>) {
    // By hand, for loops that vectorise: rebiased by a multiplication, which is exact for subnormal numbers too.
    const uint32_t magnitude = (x.x & 0x7fffu) << 13;
    const uint32_t rebiased = bits(from_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
    return static_cast<T>(from_bits(rebiased | special | (x.x & 0x8000u) << 16));
  } else {
    return static_cast<T>(x);
  }
}

// Calls f with a value of the type.
template <class F>
auto dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(float());
  }
}

}  // namespace dqn_fused::cpu
