// The arithmetic of one transition, for host and device, and how its inputs lie in memory.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace dqn_fused {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// One value a sample, (n,), of any dtype and stride. Which dtype is asked at every element: the branch always goes the
// same way, and it saves a kernel for each combination of dtypes.
struct Column {
  const void* data = nullptr;
  ScalarType type = ScalarType::Undefined;
  int64_t stride = 1;

  C10_HOST_DEVICE explicit operator bool() const { return data != nullptr; }

  template <class T>
  C10_HOST_DEVICE T at(int64_t i) const {
    i *= stride;
    switch (type) {
      case ScalarType::Bool:
      case ScalarType::Byte:
        return static_cast<T>(static_cast<const uint8_t*>(data)[i]);
      case ScalarType::Char:
        return static_cast<T>(static_cast<const int8_t*>(data)[i]);
      case ScalarType::Short:
        return static_cast<T>(static_cast<const int16_t*>(data)[i]);
      case ScalarType::Int:
        return static_cast<T>(static_cast<const int32_t*>(data)[i]);
      case ScalarType::Long:
        return static_cast<T>(static_cast<const int64_t*>(data)[i]);
      case ScalarType::UInt16:
        return static_cast<T>(static_cast<const uint16_t*>(data)[i]);
      case ScalarType::UInt32:
        return static_cast<T>(static_cast<const uint32_t*>(data)[i]);
      case ScalarType::UInt64:
        return static_cast<T>(static_cast<const uint64_t*>(data)[i]);
      case ScalarType::Half:
        return static_cast<T>(static_cast<float>(static_cast<const Half*>(data)[i]));
      case ScalarType::BFloat16:
        return static_cast<T>(static_cast<float>(static_cast<const BFloat16*>(data)[i]));
      case ScalarType::Float:
        return static_cast<T>(static_cast<const float*>(data)[i]);
      case ScalarType::Double:
        return static_cast<T>(static_cast<const double*>(data)[i]);
      default:
        return T();
    }
  }
};

// Q-values: (rows, A) or (outer, inner, A), of any strides.
struct Matrix {
  Column values;
  int64_t rows, A, inner, stride_outer, stride_inner, stride_action;

  C10_HOST_DEVICE int64_t offset(int64_t row) const {
    // A division costs more than the rest of a short row; most matrices have no outer dimension.
    return row < inner ? row * stride_inner : row / inner * stride_outer + row % inner * stride_inner;
  }
};

// A batch of n transitions. final is terminated, or with `compacted` the mask of the rows that are not final
// and whose next values next_q holds, in order. discount is a number where its column is empty.
struct Batch {
  Matrix q, next_q;
  Column actions, rewards, final, discounts;
  int64_t n;
  double discount;
  bool compacted;

  C10_HOST_DEVICE bool live(int64_t i) const { return !final || final.at<bool>(i) == compacted; }

  template <class T>
  C10_HOST_DEVICE T gamma(int64_t i) const {
    return discounts ? discounts.at<T>(i) : static_cast<T>(discount);
  }
};

C10_HOST_DEVICE inline bool legal(int64_t action, int64_t A) { return action >= 0 && action < A; }

// The maximum in which NaN wins, as in torch.max.
template <class T>
C10_HOST_DEVICE T nan_max(T a, T b) {
  return a > b || a != a ? a : b;
}

// q[i, a_i] - y_i. Selected, not multiplied: what stands in a terminated row's next_q never reaches the target.
template <class T>
C10_HOST_DEVICE T td_error(const Batch& batch, int64_t i, int64_t action, bool live, T next_value) {
  const T taken = batch.q.values.at<T>(batch.q.offset(i) + action * batch.q.stride_action);
  const T reward = batch.rewards.at<T>(i);
  return taken - (live ? reward + batch.gamma<T>(i) * next_value : reward);
}

// Another loss is another struct of these two functions.
template <class T>
struct SquaredError {
  C10_HOST_DEVICE static T value(T td) { return td * td; }
  C10_HOST_DEVICE static T slope(T td) { return 2 * td; }
};

enum Reduction : int64_t { NONE = 0, MEAN = 1, SUM = 2 };

}  // namespace dqn_fused
