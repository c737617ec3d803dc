// The maximum is taken over integers that are ordered as the floats are: integer maxima vectorise without -ffast-math,
// NaN shows as a magnitude above infinity's, and half precision needs no conversion, so its lanes stay 16 bits wide.

#include "row_max.h"

#include <cstring>
#include <limits>

namespace dqn_fused::cpu {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define DQN_FUSED_MULTIVERSION 1
#endif

template <class Float, class Int, int MANTISSA_BITS>
struct Format {
  using Bits = Int;
  static constexpr Int MAGNITUDE = std::numeric_limits<Int>::max();
  static constexpr Int INFINITE = static_cast<Int>(MAGNITUDE >> MANTISSA_BITS << MANTISSA_BITS);

  // Its own inverse: negative floats have their magnitude flipped.
  static Int key(Int x) { return static_cast<Int>(x ^ ((x >> (8 * sizeof(Int) - 1)) & MAGNITUDE)); }

  static double value(Int x) {
    Float y;
    std::memcpy(&y, &x, sizeof y);
    return static_cast<double>(y);
  }
};

using F64 = Format<double, int64_t, 52>;
using F32 = Format<float, int32_t, 23>;
using F16 = Format<Half, int16_t, 10>;
using BF16 = Format<BFloat16, int16_t, 7>;

template <class F>
__attribute__((always_inline)) inline double largest(const void* data, int64_t n, int64_t stride) {
  const auto* row = static_cast<const typename F::Bits*>(data);
  typename F::Bits best = std::numeric_limits<typename F::Bits>::min(), magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    const typename F::Bits x = row[i * stride], key = F::key(x), size = x & F::MAGNITUDE;
    best = key > best ? key : best;
    magnitude = size > magnitude ? size : magnitude;
  }
  return magnitude > F::INFINITE ? std::numeric_limits<double>::quiet_NaN() : F::value(F::key(best));
}

template <class F>
double strided(const void* row, int64_t n, int64_t stride) {
  return largest<F>(row, n, stride);
}

template <class F>
double baseline(const void* row, int64_t n, int64_t) {
  return largest<F>(row, n, 1);
}

#ifdef DQN_FUSED_MULTIVERSION
template <class F>
__attribute__((target("avx2"))) double avx2(const void* row, int64_t n, int64_t) {
  return largest<F>(row, n, 1);
}

template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) double avx512(const void* row, int64_t n, int64_t) {
  return largest<F>(row, n, 1);
}
#endif

template <class F>
RowMax contiguous_row_max() {
#ifdef DQN_FUSED_MULTIVERSION
  // Asked by hand, not by target_clones: an ifunc resolver runs before a sanitizer does, and musl has none.
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512<F>;
  if (__builtin_cpu_supports("avx2")) return avx2<F>;
#endif
  return baseline<F>;
}

template <class F>
RowMax choose(bool contiguous) {
  static const RowMax best = contiguous_row_max<F>();
  return contiguous ? best : strided<F>;
}

}  // namespace

RowMax row_max(ScalarType type, bool contiguous) {
  switch (type) {
    case ScalarType::Double:
      return choose<F64>(contiguous);
    case ScalarType::Half:
      return choose<F16>(contiguous);
    case ScalarType::BFloat16:
      return choose<BF16>(contiguous);
    default:
      return choose<F32>(contiguous);
  }
}

}  // namespace dqn_fused::cpu
