// The arithmetic of one transition, for host and device, and how its inputs lie in memory.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace dqn_fused {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();

template <class T>
constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();

// One value for each sample, (n,), of any dtype and stride. The dtype is tested at every element: the branch always
// goes the same way, and no kernel is needed for each combination of dtypes.
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

// Q-values, or which actions are legal: (rows, A) or (outer, inner, A), of any strides.
struct Matrix {
  Column values;
  int64_t rows = 0, A = 0, inner = 0, stride_outer = 0, stride_inner = 0, stride_action = 0;

  C10_HOST_DEVICE explicit operator bool() const { return A > 0; }

  C10_HOST_DEVICE int64_t offset(int64_t row) const {
    // A division costs more than the rest of a short row; most matrices have no outer dimension.
    return row < inner ? row * stride_inner : row / inner * stride_outer + row % inner * stride_inner;
  }

  template <class T>
  C10_HOST_DEVICE T at(int64_t row, int64_t action) const {
    return values.at<T>(offset(row) + action * stride_action);
  }
};

// The numbers are those of dqn_fused/options.py.
enum Reduction : int64_t { NONE = 0, MEAN = 1, SUM = 2 };
enum Loss : int64_t { MSE = 0, HUBER = 1, SMOOTH_L1 = 2 };
enum Target : int64_t { MAX = 0, SOFT = 1, MUNCHAUSEN = 2 };
enum ValueTransform : int64_t { IDENTITY = 0, SIGNED_HYPERBOLIC = 1 };

// What is computed from a batch: LossSpec of dqn_fused/options.py. Every branch on it always goes the same way.
struct Options {
  int64_t loss = MSE;
  double delta = 1;
  int64_t reduction = MEAN, target = MAX;
  double temperature = 1, alpha = 0, clip = 0;
  bool cql = false;
  double cql_alpha = 0;
  int64_t value_transform = IDENTITY;
};

// How many there are.
constexpr size_t OPTIONS = 10;

// From the n numbers that an op is given: the last ones are left out where they are the defaults.
inline Options unpack(const double* x, size_t n) {
  Options o;
  const double* const end = x + n;
  const auto read = [&](auto& option) {
    if (x != end) option = static_cast<std::remove_reference_t<decltype(option)>>(*x++);
  };
  read(o.loss), read(o.delta), read(o.reduction), read(o.target), read(o.temperature), read(o.alpha), read(o.clip);
  read(o.cql), read(o.cql_alpha), read(o.value_transform);
  return o;
}

// A batch of n transitions. final is terminated, or with `compacted` the mask of the rows that are not final
// and whose next values next_q, next_online and next_legal hold, in order. discount is a number where its column is
// empty. What is not given is empty; without next_q the rewards are the target.
struct Batch {
  Matrix q, next_q, next_online, next_legal, target_q, legal;
  Column actions, rewards, final, discounts, weights;
  int64_t n = 0;
  double discount = 0;
  bool compacted = false;

  // Whether sample i bootstraps.
  C10_HOST_DEVICE bool live(int64_t i) const { return next_q && (!final || final.at<bool>(i) == compacted); }

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

// R2D2's h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x and its inverse, in forms in which nothing cancels: see
// dqn_fused/value_transform.py.
template <class T>
C10_HOST_DEVICE T signed_hyperbolic(T x) {
  return x * (1 / (std::sqrt(std::abs(x) + 1) + 1) + T(1e-3));
}

template <class T>
C10_HOST_DEVICE T signed_parabolic(T x) {
  const T t = 2 * x / (std::sqrt(T(4e-3) * std::abs(x) + T(1.004004)) + T(1.002));
  return std::abs(x) == INFINITE<T> ? x : t * (std::abs(t) + 2);
}

// The Bellman target. It is selected, not multiplied, so that the next_q of a terminated row never reaches it.
template <class T>
C10_HOST_DEVICE T bellman_target(T reward, bool live, T gamma, T next_value) {
  const T bootstrapped = reward + gamma * next_value;  // in either case, so that a loop vectorises
  return live ? bootstrapped : reward;
}

// The TD error of q[a].
template <class T>
C10_HOST_DEVICE T td_error(const Options& options, T taken, T reward, bool live, T gamma, T next_value) {
  if (options.value_transform == IDENTITY) return taken - bellman_target(reward, live, gamma, next_value);
  return taken - signed_hyperbolic(bellman_target(reward, live, gamma, signed_parabolic(next_value)));
}

// temperature * logsumexp(x / temperature) of a row in two parts: the largest legal value, NaN where no action is
// legal, and what the sum adds to it. A difference is taken before they are added, as their sum would round away the
// differences between actions in a row far from zero.
template <class T>
struct SoftValue {
  T largest, rest;

  C10_HOST_DEVICE T sum() const { return largest + rest; }

  // x minus the sum.
  C10_HOST_DEVICE T log_policy(T x) const { return (x - largest) - rest; }
};

// For a row whose largest legal value is `largest`; total is the sum of exp((x - largest) / temperature).
template <class T>
C10_HOST_DEVICE SoftValue<T> soft_value(T largest, T total, T temperature, bool masked) {
  if (std::abs(largest) < INFINITE<T>) return {largest, temperature * std::log(total)};
  return {masked && largest == -INFINITE<T> ? NOT_A_NUMBER<T> : largest, 0};
}

// The bonus of the Munchausen target: alpha * clip(temperature * log(policy of the action), clip, 0). NaN stays NaN.
template <class T>
C10_HOST_DEVICE T munchausen_bonus(const Options& options, T log_policy) {
  const T clip = static_cast<T>(options.clip);
  return static_cast<T>(options.alpha) * (log_policy < clip ? clip : log_policy > 0 ? T(0) : log_policy);
}

// The loss of a TD error; NaN stays NaN.
template <class T>
C10_HOST_DEVICE T loss_value(const Options& options, T td) {
  if (options.loss == MSE) return td * td;
  const T delta = static_cast<T>(options.delta), size = td < 0 ? -td : td;
  if (options.loss == HUBER) return size < delta ? T(0.5) * td * td : delta * (size - T(0.5) * delta);
  return size < delta ? T(0.5) * td * td / delta : size - T(0.5) * delta;
}

// Its derivative: finite for an infinite TD error, except with the squared error.
template <class T>
C10_HOST_DEVICE T loss_slope(const Options& options, T td) {
  if (options.loss == MSE) return 2 * td;
  const T delta = static_cast<T>(options.delta), most = options.loss == HUBER ? delta : T(1);
  if (td >= delta) return td > 0 ? most : T(0);  // delta may be 0, where the slope of |td| is
  if (td <= -delta) return -most;
  return options.loss == HUBER ? td : td / delta;
}

// The gradient of a sample's loss by one of its Q-values, without the factors of scaled(). policy is 0 without the
// conservative term, and where the action is illegal.
template <class T>
C10_HOST_DEVICE T slope_by_q(const Options& options, bool taken, T slope, T policy) {
  const T alpha = static_cast<T>(options.cql_alpha);
  return taken ? slope + alpha * (policy - 1) : alpha * policy;
}

// A slope times the upstream gradient and the weight of a sample, over the divisor of the reduction.
template <class T>
C10_HOST_DEVICE T scaled(T slope, T upstream, const Column& weights, int64_t i, int64_t divisor) {
  slope *= upstream;
  if (weights) slope *= weights.at<T>(i);
  return divisor == 1 ? slope : slope / static_cast<T>(divisor);
}

}  // namespace dqn_fused
