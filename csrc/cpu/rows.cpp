// What reads a row twice does so block by block, while the block is in the first-level cache.

#include "rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "exponential.h"
#include "formats.h"
#include "versions.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t WIDTH = 1024;  // elements of a block
constexpr int64_t LANES = 32;    // partial sums; a block is padded to a multiple

// Elements [first, first + n) of a row as T, n <= WIDTH, -inf where illegal and after the last up to a multiple of
// LANES; in the buffer, unless they can be read where they are.
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

// The same for many rows: a function call for each would cost as much as a row of few actions.
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
