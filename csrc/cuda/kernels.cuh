// The kernels on CUDA: the best action of a row, TD loss forward, its backward, and a fixed-order sum.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../td_loss.h"

namespace dqn_fused::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of the kernels that move the bytes
// Of forward_kernel, which may have to do with one block; two a multiprocessor: left alone, ptxas spills.
constexpr int FORWARD_THREADS = 512;

template <class T>
__device__ T infinity() {
  return static_cast<T>(__int_as_float(0x7f800000));
}

template <class T>
__device__ T nan() {
  return static_cast<T>(__int_as_float(0x7fc00000));
}

template <class Stored>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(Stored);
  Stored values[SIZE];
};

// Loaded at once with the elements they belong to, where they are aligned.
template <int SIZE>
struct alignas(SIZE) Flags {
  uint8_t values[SIZE];
};

// The dtype in which elements are compared, which holds each of them as it is.
template <class Stored>
using Wide = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// The largest element, NaN if there is one, and where it comes first; NOWHERE as long as all are -inf.
template <class W>
struct Best {
  static constexpr int64_t NOWHERE = std::numeric_limits<int64_t>::max();
  W value = -infinity<W>();
  int64_t index = NOWHERE;

  // In the order of the columns.
  __device__ void look(W x, int64_t j) {
    if (x > value || (x != x && value == value)) {
      value = x;
      index = j;
    }
  }

  // What neighbouring lanes have found, a power of two of them; every lane has the result.
  template <bool INDEXED>
  __device__ void combine(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const W x = __shfl_xor_sync(0xffffffff, value, distance);
      if (INDEXED) {
        const int64_t j = __shfl_xor_sync(0xffffffff, index, distance);
        if (x > value || (x != x && value == value) || (x == value && j < index)) {
          value = x;
          index = j;
        }
      } else {
        value = nan_max(value, x);
      }
    }
  }
};

// Whose largest element is wanted, of the legal ones. index holds the columns of those that are the best of a range
// already, as values does, and is null where they are all there.
struct Choice {
  Matrix values, legal;
  const int64_t* index = nullptr;
};

// Sum over FORWARD_THREADS in a fixed order, on thread 0.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T warp_sums[FORWARD_THREADS / WARP];
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = x;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < FORWARD_THREADS / WARP; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

// best[row, split] and index[row, split]: the best action of a range of columns, by a warp. Rows that are not live are
// left out. index is null unless INDEXED; choice.index is not looked at.
template <class Stored, bool MASKED, bool INDEXED>
__global__ void __launch_bounds__(THREADS)
    row_best_kernel(Wide<Stored>* best, int64_t* index, Batch batch, Choice choice, int64_t splits, int64_t chunk) {
  using W = Wide<Stored>;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t row = warp / splits, split = warp % splits;
  if (row >= choice.values.rows || (!batch.compacted && !batch.live(row))) return;

  const int64_t first = split * chunk, left = choice.values.A - first;
  const Stored* const x = static_cast<const Stored*>(choice.values.values.data) + choice.values.offset(row) + first;
  const uint8_t* legal = nullptr;
  if (MASKED) legal = static_cast<const uint8_t*>(choice.legal.values.data) + choice.legal.offset(row) + first;
  const int64_t n = left < chunk ? left : chunk;
  // Elements before the first 16-byte boundary and behind the last are read one by one.
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(Stored) % SIZE);
  const int64_t head = misaligned == 0 ? 0 : (SIZE - misaligned < n ? SIZE - misaligned : n);
  const int64_t vectors = (n - head) / SIZE, tail = head + vectors * SIZE;

  Best<W> found;
  const auto look = [&](int64_t j) {
    if (!MASKED || legal[j] != 0) found.look(static_cast<W>(x[j]), j);
  };
  if (lane < head) look(lane);
  const Vector<Stored>* const body = reinterpret_cast<const Vector<Stored>*>(x + head);
  const bool aligned = MASKED && reinterpret_cast<uintptr_t>(legal + head) % SIZE == 0;
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += WARP) {
    const Vector<Stored> vector = body[v];
    const int64_t here = head + v * SIZE;
    W values[SIZE];
    W largest = -infinity<W>();
    Flags<SIZE> flags;
    if (MASKED) {
      if (aligned) {
        flags = *reinterpret_cast<const Flags<SIZE>*>(legal + here);
      } else {
#pragma unroll
        for (int k = 0; k < SIZE; ++k) flags.values[k] = legal[here + k];
      }
    }
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      values[k] = !MASKED || flags.values[k] != 0 ? static_cast<W>(vector.values[k]) : -infinity<W>();
      largest = nan_max(largest, values[k]);
    }
    if (!INDEXED) {
      found.value = nan_max(found.value, largest);
    } else if (!(largest <= found.value)) {  // seldom, after the first vectors
#pragma unroll
      for (int k = 0; k < SIZE; ++k) found.look(values[k], here + k);
    }
  }
  if (lane < n - tail) look(tail + lane);
  found.template combine<INDEXED>(WARP);
  if (lane != 0) return;
  best[warp] = found.value;
  if (INDEXED) index[warp] = first + (found.index == Best<W>::NOWHERE ? 0 : found.index);
}

template <class T>
__device__ T coefficient(const Options& options, const Column& weights, int64_t i, T upstream, T td, int64_t count) {
  T slope = upstream * loss_slope(options, td);
  if (weights) slope *= weights.at<T>(i);
  return slope / static_cast<T>(count);
}

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

// A row is taken by `lanes` neighbouring lanes, a block takes block_rows rows. loss is (n,) where the reduction is
// NONE, else one sum a block, divided by divisor. grad_q is null, or (n, A), contiguous. INDEXED: the action that
// choice finds is valued in next_q.
template <class T, class Stored, bool INDEXED>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(T* loss, T* td, void* grad_q, Batch batch, Options options, Choice choice, const int64_t* rank,
                   int lanes, int64_t block_rows, int64_t divisor, int64_t count) {
  using W = Wide<Stored>;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = FORWARD_THREADS / lanes;
  const int64_t A = batch.q.A, K = choice.values.A, first = blockIdx.x * block_rows;
  const int64_t stop = first + block_rows < batch.n ? first + block_rows : batch.n;
  T sum = 0;
  // Every lane makes every round: the shuffles below need them all.
  for (int64_t round = first; round < stop; round += groups) {
    const int64_t i = round + group;
    const bool inside = i < stop;
    const bool live = inside && batch.live(i);
    const int64_t next_row = live && rank != nullptr ? rank[i] - 1 : i;
    const bool known = live && next_row < batch.next_q.rows;
    Best<W> best;
    if (known) {
      const Stored* const x = static_cast<const Stored*>(choice.values.values.data) + choice.values.offset(next_row);
      const uint8_t* legal_ones = nullptr;
      if (choice.legal) {
        legal_ones = static_cast<const uint8_t*>(choice.legal.values.data) + choice.legal.offset(next_row);
      }
#pragma unroll 4
      for (int64_t j = lane; j < K; j += lanes) {
        if (legal_ones != nullptr && legal_ones[j * choice.legal.stride_action] == 0) continue;
        const W value = static_cast<W>(x[j * choice.values.stride_action]);
        if (INDEXED) {
          best.look(value, j);
        } else {
          best.value = nan_max(best.value, value);
        }
      }
    }
    best.template combine<INDEXED>(lanes);
    if (!inside) continue;

    T next_value = static_cast<T>(best.value);
    if (batch.next_legal && best.value == -infinity<W>()) {
      next_value = nan<T>();
    } else if (INDEXED && known && best.value == best.value) {
      const int64_t j = best.index == Best<W>::NOWHERE ? 0 : best.index;
      next_value = batch.next_q.at<T>(next_row, choice.index == nullptr ? j : choice.index[next_row * K + j]);
    }
    const int64_t action = batch.actions.at<int64_t>(i);
    const bool taken = legal(action, A);
    const T error = taken && known == live ? td_error<T>(batch, i, action, live, next_value) : nan<T>();
    if (lane == 0) {
      td[i] = error;
      T value = loss_value(options, error);
      if (batch.weights) value *= batch.weights.at<T>(i);
      if (options.reduction == NONE) {
        loss[i] = value;
      } else {
        sum += value;
      }
    }
    if (grad_q != nullptr) {
      const T slope = coefficient(options, batch.weights, i, T(1), error, count);
      for (int64_t j = lane; j < A; j += lanes) {
        store(grad_q, batch.q.values.type, i * A + j, j == action ? slope : T(0));
      }
    }
  }
  if (options.reduction == NONE) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = sum / static_cast<T>(divisor);
}

// The sum of n partial sums over count, in a fixed order: one block.
template <class T>
__global__ void __launch_bounds__(FORWARD_THREADS, 2) sum_kernel(T* loss, const T* partial, int64_t n, int64_t count) {
  T sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += FORWARD_THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = sum / static_cast<T>(count);
}

// One dense store of where(column == action, coefficient, 0) over grad_q as a flat array of `size` elements: every
// store is aligned, whatever A is. grad_loss is empty for ones.
template <class T, class Stored>
__global__ void __launch_bounds__(THREADS, 4)  // left alone, ptxas spills
    backward_kernel(Stored* grad_q, const T* grad_loss, const T* td, Column actions, Column weights, Options options,
                    int64_t A, int64_t size, int64_t count) {
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * (THREADS * SIZE);
  const int64_t here = start + threadIdx.x * SIZE;
  if (here >= size) return;
  // The 64-bit division is the block's; from its first row on 32 bits will do.
  int64_t row = start / A;
  int64_t column = start - row * A + threadIdx.x * SIZE;
  if (column >= A) {
    if (A < THREADS * SIZE) {
      const uint32_t rows = static_cast<uint32_t>(column) / static_cast<uint32_t>(A);
      row += rows;
      column -= rows * A;
    } else {
      ++row;
      column -= A;
    }
  }
  int64_t action = actions.at<int64_t>(row);
  Vector<Stored> vector;
#pragma unroll
  for (int k = 0; k < SIZE; ++k) {
    T value = 0;
    if (column == action && here + k < size) {
      const T upstream = grad_loss == nullptr ? T(1) : grad_loss[options.reduction == NONE ? row : 0];
      value = coefficient(options, weights, row, upstream, td[row], count);
    }
    vector.values[k] = static_cast<Stored>(value);
    if (++column == A) {
      column = 0;
      ++row;
      if (here + k + 1 < size) action = actions.at<int64_t>(row);
    }
  }
  if (here + SIZE <= size) {
    *reinterpret_cast<Vector<Stored>*>(grad_q + here) = vector;
  } else {
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      if (here + k < size) grad_q[here + k] = vector.values[k];
    }
  }
}

}  // namespace dqn_fused::cuda
