// Columns and the values of the actions taken, read for a range of rows: the dtype is tested once for each range.

#pragma once

#include <algorithm>

#include "rows.h"

namespace dqn_fused::cpu {

constexpr int64_t MOST_ROWS = 256;  // of a column that are read at a time

// Calls f with a value of the type that a column or a matrix holds.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return f(uint8_t());
    case ScalarType::Char:
      return f(int8_t());
    case ScalarType::Short:
      return f(int16_t());
    case ScalarType::Int:
      return f(int32_t());
    case ScalarType::Long:
      return f(int64_t());
    case ScalarType::UInt16:
      return f(uint16_t());
    case ScalarType::UInt32:
      return f(uint32_t());
    case ScalarType::UInt64:
      return f(uint64_t());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Double:
      return f(double());
    default:
      return f(float());
  }
}

template <class T, class Stored>
T as(Stored x) {
  if constexpr (std::is_same_v<Stored, Half> || std::is_same_v<Stored, BFloat16>)
    return static_cast<T>(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// Elements [begin, begin + n) of a column.
template <class T>
void read(const Column& column, int64_t begin, int64_t n, T* __restrict out) {
  with_type(column.type, [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* const x = static_cast<const Stored*>(column.data) + begin * column.stride;
    if (column.stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = as<T>(x[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = as<T>(x[i * column.stride]);
    }
  });
}

// Which of the rows [begin, begin + n) bootstrap.
inline void read_live(const Batch& b, int64_t begin, int64_t n, bool* live) {
  if (!b.next_q || !b.final) {
    std::fill_n(live, n, static_cast<bool>(b.next_q));
    return;
  }
  read(b.final, begin, n, live);
  for (int64_t i = 0; i < n; ++i) live[i] = live[i] == b.compacted;
}

// The value of one action in each of the rows [begin, begin + n), NaN where there is no such action.
template <class T>
void read_taken(const Matrix& values, const int64_t* actions, int64_t begin, int64_t n, T* __restrict out) {
  with_type(values.values.type, [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* const x = static_cast<const Stored*>(values.values.data);
    for (int64_t i = 0; i < n; ++i) {
      const bool known = legal(actions[i], values.A);
      out[i] = known ? as<T>(x[values.offset(begin + i) + actions[i] * values.stride_action]) : NOT_A_NUMBER<T>;
    }
  });
}

inline void prefetch_taken(const Matrix& values, const int64_t* actions, int64_t begin, int64_t n) {
  const int64_t size = element_size(values.values.type);
  for (int64_t i = 0; i < n; ++i) {
    if (!legal(actions[i], values.A)) continue;
    const int64_t offset = values.offset(begin + i) + actions[i] * values.stride_action;
    __builtin_prefetch(static_cast<const char*>(values.values.data) + offset * size);
  }
}

}  // namespace dqn_fused::cpu
