// The maximum is taken over integers that are ordered as the floats are: integer maxima vectorise without -ffast-math,
// NaN shows as a magnitude above infinity's, and half precision needs no conversion, so its lanes stay 16 bits wide.
//
// What needs two looks at a row takes them block by block, while the block is in the first-level cache.

#include "rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "exponential.h"
#include "versions.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t WIDTH = 1024;  // elements of a block
constexpr int64_t LANES = 32;    // partial sums; a block is padded to a multiple

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

// The same of a short row without gaps: in vectors of `lanes`, the largest there are for n elements, of which the last
// overlaps the one before it, for a remainder would take longer than the rest.
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

// Elements [first, first + n) of a row as T, n <= WIDTH, -inf where illegal and behind the last up to a multiple of
// LANES; in the buffer, unless they lie ready.
template <class Stored, class T>
DQN_FUSED_INLINE const T* block_of(const Row& row, int64_t first, int64_t n, T* __restrict buffer) {
  constexpr T NONE_LEGAL = -std::numeric_limits<T>::infinity();
  const Stored* const x = static_cast<const Stored*>(row.values) + first * row.stride;
  const uint8_t* const legal = row.legal + first * row.legal_stride;
  if (row.stride == 1 && row.legal == nullptr) {
    if constexpr (std::is_same_v<Stored, T>) {
      if (n % LANES == 0) return x;
    }
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen<T>(x[i]);
  } else if (row.stride == 1 && row.legal_stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const T value = widen<T>(x[i]);
      buffer[i] = legal[i] != 0 ? value : NONE_LEGAL;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const bool known = row.legal == nullptr || legal[i * row.legal_stride] != 0;
      buffer[i] = known ? widen<T>(x[i * row.stride]) : NONE_LEGAL;
    }
  }
  for (int64_t i = n; i % LANES != 0; ++i) buffer[i] = NONE_LEGAL;
  return buffer;
}

template <class Stored>
struct Largest {
  DQN_FUSED_INLINE static Summary run(const Row& row, double) {
    const auto* const x = static_cast<const Stored*>(row.values);
    return {row.stride == 1 ? largest_of(x, row.n, 1) : largest_of(x, row.n, row.stride)};
  }
};

// Of many rows, where the call of a function for each would cost as much as a row of few actions.
template <class Stored, class T>
struct LargestOfRows {
  static constexpr int64_t SHORT = 64;  // elements that cost less than a branch that goes either way
  static constexpr int64_t GROUP = 64;

  DQN_FUSED_INLINE static void run(const Row& row, int64_t rows, int64_t stride, const bool* wanted, void* out) {
    using F = FormatOf<Stored>;
    typename F::Bits keys[GROUP];
    for (int64_t first = 0; first < rows; first += GROUP) {
      const int64_t n = rows - first < GROUP ? rows - first : GROUP;
      const Stored* const x = static_cast<const Stored*>(row.values) + first * stride;
      if (row.stride == 1 && row.n <= SHORT) {
        for (int64_t i = 0; i < n; ++i) keys[i] = largest_key_of_few(x + i * stride, row.n);
      } else if (row.stride == 1) {
        for (int64_t i = 0; i < n; ++i) keys[i] = wanted[first + i] ? largest_key(x + i * stride, row.n, 1) : 0;
      } else {
        for (int64_t i = 0; i < n; ++i)
          keys[i] = wanted[first + i] ? largest_key(x + i * stride, row.n, row.stride) : 0;
      }
      T* const found = static_cast<T*>(out) + first;
      for (int64_t i = 0; i < n; ++i) found[i] = F::template value<T>(keys[i]);
    }
  }
};

template <class Stored, class T, bool FIRST>
struct Best {
  DQN_FUSED_INLINE static Summary run(const Row& row, double) {
    T buffer[WIDTH];
    const T* x = nullptr;
    Summary found{-std::numeric_limits<double>::infinity()};
    for (int64_t first = 0; first < row.n; first += WIDTH) {
      const int64_t n = row.n - first < WIDTH ? row.n - first : WIDTH;
      x = block_of<Stored>(row, first, n, buffer);
      const double largest = largest_of(x, n, 1);
      if (largest != largest) return {largest};
      if (largest > found.largest) found = {largest, first};
    }
    if (!FIRST) return found;
    const int64_t n = row.n - found.index < WIDTH ? row.n - found.index : WIDTH;
    if (row.n > WIDTH) x = block_of<Stored>(row, found.index, n, buffer);
    const T best = static_cast<T>(found.largest);  // compared as floats: the two zeros are equal
    int32_t index = WIDTH;
    for (int32_t i = 0; i < static_cast<int32_t>(n); ++i) {
      const int32_t candidate = x[i] == best ? i : WIDTH;
      index = candidate < index ? candidate : index;
    }
    found.index += index;
    return found;
  }
};

template <class Stored, class T>
struct Exponentials {
  DQN_FUSED_INLINE static Summary run(const Row& row, double scale) {
    T buffer[WIDTH];
    Summary found{-std::numeric_limits<double>::infinity()};
    for (int64_t first = 0; first < row.n; first += WIDTH) {
      const int64_t n = row.n - first < WIDTH ? row.n - first : WIDTH;
      const T* const x = block_of<Stored>(row, first, n, buffer);
      const double largest = largest_of(x, n, 1);
      if (largest != largest) return {largest};
      if (largest > found.largest) {
        if (found.sum > 0) found.sum *= std::exp((found.largest - largest) * scale);
        found.largest = largest;
      }
      if (std::abs(found.largest) < std::numeric_limits<double>::infinity()) {
        found.sum += sum(x, n, static_cast<T>(found.largest), static_cast<T>(scale));
      }
    }
    return found;
  }

  DQN_FUSED_INLINE static double sum(const T* x, int64_t n, T largest, T scale) {
    T lanes[LANES] = {};
    for (int64_t i = 0; i < n; i += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += exponential((x[i + lane] - largest) * scale);
    }
    double total = 0;
    for (const T lane : lanes) total += lane;
    return total;
  }
};

template <class Stored, class T>
struct Policy {
  DQN_FUSED_INLINE static void run(const Row& row, double largest, double log_total, double coefficient, void* out) {
    T buffer[WIDTH];
    for (int64_t first = 0; first < row.n; first += WIDTH) {
      const int64_t n = row.n - first < WIDTH ? row.n - first : WIDTH;
      const T* const x = block_of<Stored>(row, first, n, buffer);
      Stored* __restrict const y = static_cast<Stored*>(out) + first;
      const SoftValue<T> sum{static_cast<T>(largest), static_cast<T>(log_total)};
      const T factor = static_cast<T>(coefficient);
      for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Stored>(factor * exponential(sum.log_policy(x[i])));
    }
  }
};

template <class Stored>
auto answer(Question question, bool masked, bool as_double) {
  using Wide = std::conditional_t<std::is_same_v<Stored, double>, double, float>;  // holds each value as it is
  if (question == Question::LARGEST && !masked) return fastest<Largest<Stored>>();
  if (question == Question::LARGEST) return fastest<Best<Stored, Wide, false>>();
  if (question == Question::FIRST_LARGEST) return fastest<Best<Stored, Wide, true>>();
  return as_double ? fastest<Exponentials<Stored, double>>() : fastest<Exponentials<Stored, float>>();
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

}  // namespace

Rows::Rows(Question question, const Matrix& values, const Matrix& legal, bool as_double, double temperature)
    : values_(values), legal_(legal), exponentials_(question == Question::EXPONENTIALS) {
  const double most = as_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  const double least = as_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  scale_ = std::min(std::max(1 / temperature, least), most);
  function_ = dispatch(values.values.type,
                       [&](auto stored) { return answer<decltype(stored)>(question, this->masked(), as_double); });
  largest_ = dispatch(values.values.type, [&](auto stored) {
    return as_double ? fastest<LargestOfRows<decltype(stored), double>>()
                     : fastest<LargestOfRows<decltype(stored), float>>();
  });
}

Summary Rows::chunk(int64_t row, int64_t k) const {
  const int64_t first = k * CHUNK;
  Summary found = function_(row_of(values_, legal_, row, first, std::min(CHUNK, values_.A - first)), scale_);
  found.index += first;
  return found;
}

Summary Rows::in_chunks(int64_t row) const {
  const int64_t chunks = ceil_div(values_.A, CHUNK);
  Summary found;
  for (int64_t k = 0; k < chunks; ++k) {
    const Summary next = chunks_.empty() ? chunk(row, k) : chunks_[row * chunks + k];
    if (k == 0) {
      found = next;
      continue;
    }
    if (next.largest != next.largest) return next;
    const bool higher = next.largest > found.largest;
    const Summary high = higher ? next : found, low = higher ? found : next;
    found = high;
    if (low.sum > 0) found.sum += low.sum * std::exp((low.largest - high.largest) * scale_);
    if (found.largest != found.largest) return found;
  }
  return found;
}

WritePolicy write_policy(ScalarType type) {
  return dispatch(type, [](auto stored) -> WritePolicy {
    using Stored = decltype(stored);
    return fastest<Policy<Stored, std::conditional_t<std::is_same_v<Stored, double>, double, float>>>();
  });
}

}  // namespace dqn_fused::cpu
