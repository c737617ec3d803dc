// The kernel of the TD loss, and a fixed-order sum of what several of its blocks leave.

#pragma once

#include <type_traits>

#include "reduce.cuh"

namespace dqn_fused::cuda {

// The most threads of a block for which ptxas need not spill registers.
template <class T, class W, bool EXPONENTIALS>
constexpr int MOST_THREADS = std::is_same_v<T, double>                   ? 384
                             : EXPONENTIALS || std::is_same_v<W, double> ? 512
                                                                         : 768;

constexpr int SUM_THREADS = 512;

template <class T>
__device__ void store(void* data, ScalarType type, int64_t i, T x) {
  switch (type) {
    case ScalarType::Half:
      static_cast<Half*>(data)[i] = static_cast<Half>(static_cast<float>(x));
      break;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(data)[i] = static_cast<BFloat16>(static_cast<float>(x));
      break;
    default:
      static_cast<T*>(data)[i] = x;  // float32 and float64 are their own accumulation dtypes
      break;
  }
}

// What forward_kernel reads and writes. loss is (n,) where the reduction is NONE, and else one sum for each block, over
// divisor; normaliser is null, or (2, n); grad_q is null, or (n, A), contiguous. rank is null, or the number of next
// rows up to and including each sample's own.
template <class T>
struct Forward {
  T *loss = nullptr, *td = nullptr, *normaliser = nullptr;
  void* grad_q = nullptr;
  Batch batch;
  Options options;
  const int64_t* rank = nullptr;
  Partial next, policy, conservative;
  int lanes = 1;
  int64_t block_rows = 1, divisor = 1, count = 1;
  T scale = 1;  // 1 / temperature, as far as T goes
};

// The value of the next state; W is the dtype in which actions are compared.
template <class T, class W, bool EXPONENTIALS>
__device__ T next_value(const Forward<T>& f, int64_t row, bool known, int lane) {
  const Batch& b = f.batch;
  if (EXPONENTIALS && f.options.target != MAX) {
    const auto found = reduce_row<Exponentials<T>>(b.next_q, b.next_legal, f.next, row, known, lane, f.lanes, f.scale);
    return soft_value(found.largest, found.total, static_cast<T>(f.options.temperature),
                      static_cast<bool>(b.next_legal))
        .sum();
  }
  W largest;
  if (b.next_online) {
    using Pair = FirstLargest<W>;
    const Pair found = reduce_row<Pair>(b.next_online, b.next_legal, f.next, row, known, lane, f.lanes, W(1));
    largest = found.largest;
    if (known && largest == largest) {
      const T value = b.next_q.template at<T>(row, found.index == Pair::NOWHERE ? 0 : found.index);
      return b.next_legal && largest == -INFINITE<W> ? NOT_A_NUMBER<T> : value;
    }
  } else {
    largest = reduce_row<Largest<W>>(b.next_q, b.next_legal, f.next, row, known, lane, f.lanes, W(1)).largest;
  }
  return b.next_legal && largest == -INFINITE<W> ? NOT_A_NUMBER<T> : static_cast<T>(largest);
}

// alpha * clip(temperature * log(policy of the action), clip, 0) of the target network.
template <class T>
__device__ T bonus(const Forward<T>& f, int64_t i, int64_t action, bool legal_one, int lane) {
  const Batch& b = f.batch;
  const auto found = reduce_row<Exponentials<T>>(b.target_q, b.legal, f.policy, i, true, lane, f.lanes, f.scale);
  T taken = -INFINITE<T>;
  if (legal_one && (!b.legal || b.legal.template at<bool>(i, action))) taken = b.target_q.template at<T>(i, action);
  const T temperature = static_cast<T>(f.options.temperature);
  const SoftValue<T> sum = soft_value(found.largest, found.total, temperature, static_cast<bool>(b.legal));
  return munchausen_bonus(f.options, sum.log_policy(taken));
}

// Neighbouring lanes share a row and all have its results; the first one stores them. EXPONENTIALS: the soft and
// Munchausen targets and the conservative term.
template <class T, class W, bool EXPONENTIALS>
__global__ void __launch_bounds__(MOST_THREADS<T, W, EXPONENTIALS>, 1)
    forward_kernel(const __grid_constant__ Forward<T> f) {
  const Batch& b = f.batch;
  const Options& options = f.options;
  const int lanes = f.lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int64_t A = b.q.A, first = blockIdx.x * f.block_rows;
  const int64_t stop = first + f.block_rows < b.n ? first + f.block_rows : b.n;
  T sum = 0;
  // Every lane takes part in every round, as the shuffles need them all.
  for (int64_t round = first; round < stop; round += groups) {
    const bool inside = round + group < stop;
    const int64_t i = inside ? round + group : first;
    const int64_t action = b.actions.template at<int64_t>(i);
    T reward = b.rewards.template at<T>(i);
    const bool live = inside && b.live(i), legal_one = legal(action, A);
    const T taken = legal_one ? b.q.template at<T>(i, action) : NOT_A_NUMBER<T>;
    const T discount = live ? b.template gamma<T>(i) : T(0);
    const int64_t next_row = live && f.rank != nullptr ? f.rank[i] - 1 : i;
    const bool known = live && next_row < b.next_q.rows;
    if (EXPONENTIALS && b.target_q) reward += bonus(f, i, action, legal_one, lane);
    T value = 0;
    if (b.next_q) value = next_value<T, W, EXPONENTIALS>(f, next_row, known, lane);
    T error = NOT_A_NUMBER<T>;
    if (legal_one && known == live) error = td_error(options, taken, reward, live, discount, value);
    value = loss_value(options, error);
    SoftValue<T> normaliser{0, 0};
    if (EXPONENTIALS && options.cql) {
      const auto found = reduce_row<Exponentials<T>>(b.q, b.legal, f.conservative, i, true, lane, lanes, T(1));
      normaliser = soft_value(found.largest, found.total, T(1), static_cast<bool>(b.legal));
      if (options.cql_alpha != 0) value -= static_cast<T>(options.cql_alpha) * normaliser.log_policy(taken);
    }
    if (!inside) continue;
    if (lane == 0) {
      f.td[i] = error;
      if (EXPONENTIALS && options.cql) {
        f.normaliser[i] = normaliser.largest;
        f.normaliser[b.n + i] = normaliser.rest;
      }
      if (b.weights) value *= b.weights.template at<T>(i);
      if (options.reduction == NONE) {
        f.loss[i] = value;
      } else {
        sum += value;
      }
    }
    if (f.grad_q == nullptr) continue;
    const bool dense = EXPONENTIALS && options.cql_alpha != 0;
    const T slope = loss_slope(options, error);
    for (int64_t from = lane; from < A; from += COLUMNS * lanes) {
      T policy[COLUMNS] = {};
      if (dense) load(b.q, b.legal, i, from, lanes, policy);
#pragma unroll
      for (int k = 0; k < COLUMNS; ++k) {
        const int64_t j = from + k * lanes;
        if (j >= A) break;
        T gradient = 0;
        if (dense && legal_one) {
          gradient = slope_by_q(options, j == action, slope, policy_of(normaliser, policy[k], b.legal, i, j));
        } else if (j == action) {
          gradient = slope;
        }
        if (gradient != 0) gradient = scaled(gradient, T(1), b.weights, i, f.count);
        store(f.grad_q, b.q.values.type, i * A + j, gradient);
      }
    }
  }
  if (options.reduction == NONE) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) f.loss[blockIdx.x] = sum / static_cast<T>(f.divisor);
}

// The sum of n partial sums over count, in a fixed order: one block.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(T* loss, const T* partial, int64_t n, int64_t count) {
  T sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = sum / static_cast<T>(count);
}

}  // namespace dqn_fused::cuda
