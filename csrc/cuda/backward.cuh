// The kernel that stores the gradient: one dense store, 16 bytes at a time.

#pragma once

#include "reduce.cuh"
#include "rows.cuh"

namespace dqn_fused::cuda {

// What the gradient of a row is made of: its action, -1 if that is illegal, the scaled slope of the TD loss, and with
// the conservative term its scaled weight and normaliser.
template <class T, bool DENSE>
struct RowGradient;

template <class T>
struct RowGradient<T, false> {
  int64_t action;
  T slope;
};

template <class T>
struct RowGradient<T, true> {
  int64_t action;
  T slope, pull;
  SoftValue<T> normaliser;
};

// Stores grad_q as a flat array of n * A elements, so that every store is aligned, whatever A is. A block first
// collects what it needs of its rows. grad_loss is null for an upstream gradient of ones. DENSE: every action gets a
// gradient, that of the conservative term.
template <class T, class Stored, bool DENSE>
__global__ void __launch_bounds__(THREADS, DENSE ? 3 : 4)
    backward_kernel(Stored* grad_q, const T* grad_loss, const T* td, const T* normaliser, Saved saved, Options options,
                    int64_t block, int64_t count, bool flat, bool flat_legal) {
  using Row = RowGradient<T, DENSE>;
  extern __shared__ __align__(16) unsigned char shared[];
  Row* const rows = reinterpret_cast<Row*>(shared);
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t A = saved.A, size = saved.n * A;
  const int64_t start = blockIdx.x * block, stop = start + block < size ? start + block : size;
  const int64_t first = start / A, skipped = start - first * A;
  const int64_t last = first + (skipped + (stop - start) - 1) / A;
  for (int64_t i = first + threadIdx.x; i <= last; i += THREADS) {
    const int64_t action = saved.actions.template at<int64_t>(i);
    const T upstream = grad_loss == nullptr ? T(1) : grad_loss[options.reduction == NONE ? i : 0];
    Row row;
    row.action = legal(action, A) ? action : -1;
    row.slope = scaled(loss_slope(options, td[i]), upstream, saved.weights, i, count);
    if constexpr (DENSE) {
      row.pull = scaled(static_cast<T>(options.cql_alpha), upstream, saved.weights, i, count);
      row.normaliser = {normaliser[i], normaliser[saved.n + i]};
    }
    rows[i - first] = row;
  }
  __syncthreads();

  const Stored* const q = static_cast<const Stored*>(saved.q.values.data);
  const uint8_t* const flags = static_cast<const uint8_t*>(saved.legal.values.data);
  for (int64_t here = start + threadIdx.x * SIZE; here < stop; here += THREADS * SIZE) {
    int64_t column = skipped + (here - start), local = 0;
    if (column >= A) {
      if (A < block) {  // then 32 bits will do
        const uint32_t passed = static_cast<uint32_t>(column) / static_cast<uint32_t>(A);
        local = passed;
        column -= passed * A;
      } else {
        local = 1;
        column -= A;
      }
    }
    const bool whole = here + SIZE <= size;
    [[maybe_unused]] Vector<Stored> x;
    [[maybe_unused]] Flags<SIZE> allowed;
    if constexpr (DENSE) {
      const bool q_at_once = flat && whole, flags_at_once = flat_legal && whole;
      if (q_at_once) x = *reinterpret_cast<const Vector<Stored>*>(q + here);
      if (flags_at_once) allowed = *reinterpret_cast<const Flags<SIZE>*>(flags + here);
      int64_t row = first + local, j = column;
#pragma unroll
      for (int k = 0; k < SIZE; ++k) {
        if (!q_at_once && here + k < size) x.values[k] = q[saved.q.offset(row) + j * saved.q.stride_action];
        if (!saved.legal) {
          allowed.values[k] = 1;
        } else if (!flags_at_once && here + k < size) {
          allowed.values[k] = flags[saved.legal.offset(row) + j * saved.legal.stride_action];
        }
        if (++j == A) {
          j = 0;
          ++row;
        }
      }
    }
    Vector<Stored> result;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      T value = 0;
      const Row& row = rows[local];
      if constexpr (DENSE) {
        const bool finite = std::fabs(row.normaliser.largest) < INFINITE<T>;
        T policy = finite ? std::exp(row.normaliser.log_policy(static_cast<T>(x.values[k]))) : NOT_A_NUMBER<T>;
        if (allowed.values[k] == 0) policy = 0;
        const bool taken = column == row.action;
        if (row.action >= 0) value = taken ? row.slope + row.pull * (policy - 1) : row.pull * policy;
      } else {
        if (column == row.action) value = row.slope;
      }
      result.values[k] = static_cast<Stored>(value);
      if (++column == A && here + k + 1 < stop) {
        column = 0;
        ++local;
      }
    }
    if (whole) {
      *reinterpret_cast<Vector<Stored>*>(grad_q + here) = result;
    } else {
#pragma unroll
      for (int k = 0; k < SIZE; ++k) {
        if (here + k < size) grad_q[here + k] = result.values[k];
      }
    }
  }
}

}  // namespace dqn_fused::cuda
