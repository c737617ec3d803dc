// Questions about a row of Q-values: its largest element, where it comes first, a sum of exponentials, the softmax.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../td_loss.h"
#include "parallel.h"

namespace dqn_fused::cpu {

// n >= 1 elements; legal is null where every action is.
struct Row {
  const void* values;
  int64_t stride;
  const uint8_t* legal;
  int64_t legal_stride;
  int64_t n;
};

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// A range of the columns of a row.
inline Row row_of(const Matrix& values, const Matrix& legal, int64_t row, int64_t first, int64_t n) {
  const int64_t start = values.offset(row) + first * values.stride_action;
  Row found{static_cast<const char*>(values.values.data) + start * element_size(values.values.type),
            values.stride_action, nullptr, 0, n};
  if (legal) {
    found.legal = static_cast<const uint8_t*>(legal.values.data) + legal.offset(row) + first * legal.stride_action;
    found.legal_stride = legal.stride_action;
  }
  return found;
}

enum class Question { LARGEST, FIRST_LARGEST, EXPONENTIALS };

// Of the legal actions: the largest value, NaN if one is NaN; and, if asked for, where it comes first, unless it is
// NaN, or the sum of exp((x - largest) * scale), unless it is NaN or infinite.
struct Summary {
  double largest = 0;
  int64_t index = 0;
  double sum = 0;
};

// A question to the rows of a matrix. Sums are taken in float32 or float64, in an order that depends only on A.
class Rows {
 public:
  Rows() = default;
  Rows(Question question, const Matrix& values, const Matrix& legal, bool as_double, double temperature = 1);

  explicit operator bool() const { return function_ != nullptr; }
  bool masked() const { return static_cast<bool>(legal_); }

  // The cost of an element, where reading one costs 1. An exponential takes 0.4 ns with AVX-512.
  int64_t cost() const { return function_ == nullptr ? 0 : exponentials_ ? 8 : 1; }

  Summary operator()(int64_t row) const {
    return values_.A <= CHUNK ? function_(row_of(values_, legal_, row, 0, values_.A), scale_) : in_chunks(row);
  }

  // Only the largest values, for Question::LARGEST without a mask: those of the rows [first, first + n) whose flag in
  // `wanted` is set.
  template <class T>
  void largest(int64_t first, int64_t n, const bool* wanted, T* out) const {
    if (values_.A > CHUNK) {
      for (int64_t i = 0; i < n; ++i) {
        if (wanted[i]) out[i] = static_cast<T>(in_chunks(first + i).largest);
      }
      return;
    }
    while (n > 0) {
      const int64_t run = std::min(n, values_.inner - first % values_.inner);
      const Row row = row_of(values_, legal_, first, 0, values_.A);
      largest_(row, run, values_.stride_inner, wanted, out);
      first += run, wanted += run, out += run, n -= run;
    }
  }

  // Splits the columns of the wanted rows where the rows are too few for the threads; returns whether it did.
  template <class F>
  bool share(const F& wanted) {
    const int64_t chunks = ceil_div(values_.A, CHUNK);
    if (chunks < 2 || values_.rows >= 4 * torch::stable::get_num_threads()) return false;
    chunks_.resize(values_.rows * chunks);
    for_each_block(values_.rows * chunks, CHUNK * cost(), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (wanted(k / chunks)) chunks_[k] = chunk(k / chunks, k % chunks);
      }
    });
    return true;
  }

 private:
  static constexpr int64_t CHUNK = 1 << 15;  // elements of a row that are worth splitting off

  Summary in_chunks(int64_t row) const;
  Summary chunk(int64_t row, int64_t k) const;

  Matrix values_, legal_;
  Summary (*function_)(const Row& row, double scale) = nullptr;
  void (*largest_)(const Row& first, int64_t rows, int64_t stride, const bool* wanted, void* out) = nullptr;
  bool exponentials_ = false;
  double scale_ = 1;
  std::vector<Summary> chunks_;
};

// out[j] = coefficient * exp((x[j] - largest) - log_total), 0 where an action is illegal; out is of x's dtype.
using WritePolicy = void (*)(const Row& row, double largest, double log_total, double coefficient, void* out);

WritePolicy write_policy(ScalarType type);

}  // namespace dqn_fused::cpu
