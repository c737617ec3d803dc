// The kernels on CUDA: row maximum, TD loss forward, its backward, and a fixed-order sum.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// Maximum over `lanes` neighbouring lanes, a power of two; every lane has the result.
template <class T>
__device__ T lanes_max(T x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x = nan_max(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

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

// partial[row, split]: the maximum of a range of columns, for a warp. Rows that are not live are left out.
template <class T, class Stored>
__global__ void __launch_bounds__(THREADS) row_max_kernel(T* partial, Batch batch, int64_t splits, int64_t chunk) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t row = warp / splits, split = warp % splits;
  if (row >= batch.next_q.rows || (!batch.compacted && !batch.live(row))) return;

  const Stored* const start = static_cast<const Stored*>(batch.next_q.values.data) + batch.next_q.offset(row);
  const int64_t first = split * chunk, left = batch.next_q.A - first;
  const Stored* const x = start + first;
  const int64_t n = left < chunk ? left : chunk;
  // Elements before the first 16-byte boundary and behind the last are read one by one.
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(Stored) % SIZE);
  const int64_t head = misaligned == 0 ? 0 : (SIZE - misaligned < n ? SIZE - misaligned : n);
  const int64_t vectors = (n - head) / SIZE, tail = head + vectors * SIZE;

  T best = -infinity<T>();
  if (lane < head) best = static_cast<T>(x[lane]);
  if (lane < n - tail) best = nan_max(best, static_cast<T>(x[tail + lane]));
  const Vector<Stored>* const body = reinterpret_cast<const Vector<Stored>*>(x + head);
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += WARP) {
    const Vector<Stored> vector = body[v];
#pragma unroll
    for (int k = 0; k < SIZE; ++k) best = nan_max(best, static_cast<T>(vector.values[k]));
  }
  best = lanes_max(best, WARP);
  if (lane == 0) partial[warp] = best;
}

template <class T>
__device__ T coefficient(T upstream, T td, int64_t count) {
  return upstream * loss_slope(Options{}, td) / static_cast<T>(count);
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
// NONE, else one sum a block, divided by divisor. grad_q is null, or (n, A), contiguous.
template <class T, class Stored>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(T* loss, T* td, void* grad_q, Batch batch, const int64_t* rank, int lanes, int64_t block_rows,
                   int64_t reduction, int64_t divisor, int64_t count) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = FORWARD_THREADS / lanes;
  const int64_t A = batch.q.A, K = batch.next_q.A, first = blockIdx.x * block_rows;
  const int64_t stop = first + block_rows < batch.n ? first + block_rows : batch.n;
  T sum = 0;
  // Every lane makes every round: the shuffles below need them all.
  for (int64_t round = first; round < stop; round += groups) {
    const int64_t i = round + group;
    const bool inside = i < stop;
    const bool live = inside && batch.live(i);
    const int64_t next_row = live && rank != nullptr ? rank[i] - 1 : i;
    const bool known = live && next_row < batch.next_q.rows;
    T next_value = -infinity<T>();
    if (known) {
      const Stored* const x = static_cast<const Stored*>(batch.next_q.values.data) + batch.next_q.offset(next_row);
#pragma unroll 4
      for (int64_t j = lane; j < K; j += lanes) {
        next_value = nan_max(next_value, static_cast<T>(x[j * batch.next_q.stride_action]));
      }
    }
    next_value = lanes_max(next_value, lanes);
    if (!inside) continue;

    const int64_t action = batch.actions.at<int64_t>(i);
    const bool taken = legal(action, A);
    const T error = taken && known == live ? td_error<T>(batch, i, action, live, next_value) : nan<T>();
    if (lane == 0) {
      td[i] = error;
      const T value = loss_value(Options{}, error);
      if (reduction == NONE) {
        loss[i] = value;
      } else {
        sum += value;
      }
    }
    if (grad_q != nullptr) {
      const T slope = coefficient(T(1), error, count);
      for (int64_t j = lane; j < A; j += lanes) {
        store(grad_q, batch.q.values.type, i * A + j, j == action ? slope : T(0));
      }
    }
  }
  if (reduction == NONE) return;
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
__global__ void __launch_bounds__(THREADS)
    backward_kernel(Stored* grad_q, const T* grad_loss, const T* td, Column actions, int64_t A, int64_t size,
                    bool per_row, int64_t count) {
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
      const T upstream = grad_loss == nullptr ? T(1) : grad_loss[per_row ? row : 0];
      value = coefficient(upstream, td[row], count);
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
