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
  using Unsigned = std::make_unsigned_t<Int>;
  static constexpr Int MAGNITUDE = std::numeric_limits<Int>::max();
  static constexpr Int INFINITE = static_cast<Int>(MAGNITUDE >> MANTISSA_BITS << MANTISSA_BITS);

  // A key is ordered as the floats are: from -infinity, the least Int there is, to infinity, and every NaN above it.
  // Bits is an Int, or a vector of them.
  template <class Bits>
  DQN_FUSED_INLINE static Bits key(Bits x) {
    return flipped(x) - BELOW;
  }
  static constexpr Int LEAST = std::numeric_limits<Int>::min();

  template <class T>
  DQN_FUSED_INLINE static T value(Int key) {
    const Int x = flipped(static_cast<Int>(static_cast<Unsigned>(key) + BELOW));
    Float y;
    std::memcpy(&y, &x, sizeof y);
    return key > INFINITE - BELOW ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(y);
  }

 private:
  static constexpr Int BELOW = static_cast<Int>(MAGNITUDE ^ INFINITE);  // how many negative NaN there are

  // Its own inverse: negative floats have their magnitude flipped.
  template <class Bits>
  DQN_FUSED_INLINE static Bits flipped(Bits x) {
    return x ^ ((x >> (8 * sizeof(Int) - 1)) & MAGNITUDE);
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
DQN_FUSED_INLINE auto largest_key(const Float* row, int64_t n, int64_t stride) {
  using F = FormatOf<Float>;
  typename F::Bits best = F::LEAST;
  for (int64_t i = 0; i < n; ++i) {
    typename F::Bits bits;
    std::memcpy(&bits, row + i * stride, sizeof bits);
    const typename F::Bits key = F::key(bits);
    best = key > best ? key : best;
  }
  return best;
}

// The same for a short contiguous row: in vectors of `lanes`, the longest that n elements fill. The last one overlaps
// the one before it, as a remainder would take longer than the rest.
template <class Float, int lanes = 16 / sizeof(Float)>
DQN_FUSED_INLINE auto largest_key_of_few(const Float* row, int64_t n) {
  using F = FormatOf<Float>;
  if constexpr (lanes > 1) {
    if (n < lanes) return largest_key_of_few<Float, lanes / 2>(row, n);
  }
  using Vector [[gnu::vector_size(lanes * sizeof(Float))]] = typename F::Bits;
  Vector best;
  std::memcpy(&best, row + n - lanes, sizeof best);
  best = F::key(best);
  for (int64_t i = 0; i < n - lanes; i += lanes) {
    Vector x;
    std::memcpy(&x, row + i, sizeof x);
    x = F::key(x);
    best = x > best ? x : best;
  }
  typename F::Bits found = best[0];
  for (int lane = 1; lane < lanes; ++lane) found = best[lane] > found ? best[lane] : found;
  return found;
}

template <class Float>
DQN_FUSED_INLINE double largest_of(const Float* row, int64_t n, int64_t stride) {
  return FormatOf<Float>::template value<double>(largest_key(row, n, stride));
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
