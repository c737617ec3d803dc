// What a row of Q-values is reduced to, a pair: its largest element and, depending on the kind, the column where that
// comes first or a sum of exponentials. Pairs are combined over the columns of a lane, the lanes of a row and the
// splits of a wide row.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "../td_loss.h"
#include "geometry.h"

namespace dqn_fused::cuda {

// A pair holds the result of what has been added so far, and NaN once a NaN has been. -inf adds nothing, so it stands
// for an illegal action or a column outside the row. `best` and `aux` are arrays of the two parts of pairs.
template <class W>
struct Largest {
  using Value = W;
  using Aux = W;
  W largest = -INFINITE<W>;

  __device__ void add(W x, int64_t, W) { largest = nan_max(largest, x); }
  __device__ void combine(const Largest& other, W) { largest = nan_max(largest, other.largest); }
  __device__ Largest of_lane(int distance) const { return {__shfl_xor_sync(0xffffffff, largest, distance)}; }
  __device__ static Largest stored(const W* best, const Aux*, int64_t i) { return {best[i]}; }
  __device__ void store(W* best, Aux*, int64_t i) const { best[i] = largest; }
};

// index is the first column of the largest element, NOWHERE as long as all are -inf.
template <class W>
struct FirstLargest {
  using Value = W;
  using Aux = int64_t;
  static constexpr int64_t NOWHERE = std::numeric_limits<int64_t>::max();
  W largest = -INFINITE<W>;
  int64_t index = NOWHERE;

  __device__ void add(W x, int64_t column, W) { combine({x, x == -INFINITE<W> ? NOWHERE : column}, W(1)); }
  __device__ void combine(const FirstLargest& other, W) {
    const W x = other.largest;
    if (x > largest || (x != x && largest == largest) || (x == largest && other.index < index)) *this = other;
  }
  __device__ FirstLargest of_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffff, largest, distance), __shfl_xor_sync(0xffffffff, index, distance)};
  }
  __device__ static FirstLargest stored(const W* best, const Aux* aux, int64_t i) { return {best[i], aux[i]}; }
  __device__ void store(W* best, Aux* aux, int64_t i) const {
    best[i] = largest;
    aux[i] = index;
  }
};

// total is the sum of exp((x - largest) * scale). As long as every x is -inf it counts them, and the first finite x
// drops the count.
template <class W>
struct Exponentials {
  using Value = W;
  using Aux = W;
  W largest = -INFINITE<W>, total = 0;

  // exp(-|a - b| * scale); 1 for equal infinities.
  __device__ static W exp_of_gap(W a, W b, W scale) { return std::exp(-std::fabs(a == b ? W(0) : a - b) * scale); }

  __device__ void add(W x, int64_t, W scale) { combine({x, W(1)}, scale); }
  __device__ void combine(const Exponentials& other, W scale) {
    const W shrunk = exp_of_gap(largest, other.largest, scale);
    total = other.largest > largest ? total * shrunk + other.total : total + other.total * shrunk;
    largest = nan_max(largest, other.largest);
  }
  __device__ Exponentials of_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffff, largest, distance), __shfl_xor_sync(0xffffffff, total, distance)};
  }
  __device__ static Exponentials stored(const W* best, const Aux* aux, int64_t i) { return {best[i], aux[i]}; }
  __device__ void store(W* best, Aux* aux, int64_t i) const {
    best[i] = largest;
    aux[i] = total;
  }
};

// Combine the results of neighbouring lanes, a power of two of them; every lane has the result.
template <class Pair>
__device__ void combine_lanes(Pair& found, int lanes, typename Pair::Value scale) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) found.combine(found.of_lane(distance), scale);
}

// Sum over a block in a fixed order, on thread 0.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T warp_sums[WARP];
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = x;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

// Columns first, first + lanes, ... of a row, with all loads in flight at once; -inf where an action is illegal or the
// column is outside the row.
template <class W>
__device__ void load(const Matrix& x, const Matrix& legal, int64_t row, int64_t first, int lanes,
                     W (&values)[COLUMNS]) {
  const int64_t start = x.offset(row) + first * x.stride_action, step = lanes * x.stride_action;
  const auto load_as = [&](auto* data) {
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      values[k] = first + k * lanes < x.A ? static_cast<W>(data[start + k * step]) : -INFINITE<W>;
    }
  };
  switch (x.values.type) {
    case ScalarType::Double:
      load_as(static_cast<const double*>(x.values.data));
      break;
    case ScalarType::Half:
      load_as(static_cast<const Half*>(x.values.data));
      break;
    case ScalarType::BFloat16:
      load_as(static_cast<const BFloat16*>(x.values.data));
      break;
    default:
      load_as(static_cast<const float*>(x.values.data));
      break;
  }
  if (!legal) return;
  const uint8_t* const flags = static_cast<const uint8_t*>(legal.values.data) + legal.offset(row);
#pragma unroll
  for (int k = 0; k < COLUMNS; ++k) {
    const int64_t column = first + k * lanes;
    if (column < x.A && flags[column * legal.stride_action] == 0) values[k] = -INFINITE<W>;
  }
}

// The results of rows_kernel for a matrix, (rows, splits); splits is 0 where forward_kernel reads the rows itself.
struct Partial {
  const void* best = nullptr;
  const void* aux = nullptr;
  int64_t splits = 0;
};

// Reduce a row by neighbouring lanes; every lane has the result. Where the row is not wanted, nothing is read.
template <class Pair>
__device__ Pair reduce_row(const Matrix& x, const Matrix& legal, const Partial& partial, int64_t row, bool wanted,
                           int lane, int lanes, typename Pair::Value scale) {
  using W = typename Pair::Value;
  using Aux = typename Pair::Aux;
  Pair found;
  if (wanted && partial.splits > 0) {
    const W* const best = static_cast<const W*>(partial.best) + row * partial.splits;
    const Aux* const aux = static_cast<const Aux*>(partial.aux) + row * partial.splits;
    for (int64_t split = lane; split < partial.splits; split += lanes) {
      found.combine(Pair::stored(best, aux, split), scale);
    }
  } else if (wanted) {
    for (int64_t first = lane; first < x.A; first += COLUMNS * lanes) {
      W values[COLUMNS];
      load(x, legal, row, first, lanes, values);
#pragma unroll
      for (int k = 0; k < COLUMNS; ++k) found.add(values[k], first + k * lanes, scale);
    }
  }
  combine_lanes(found, lanes, scale);
  return found;
}

// The softmax of a legal x, 0 for an illegal one, which is -inf; NaN where the sum is not finite.
template <class T>
__device__ T policy_of(const SoftValue<T>& sum, T x, const Matrix& legal, int64_t row, int64_t column) {
  if (std::fabs(sum.largest) < INFINITE<T>) return std::exp(sum.log_policy(x));
  return legal && !legal.at<bool>(row, column) ? T(0) : NOT_A_NUMBER<T>;
}

}  // namespace dqn_fused::cuda
