// The kernel that reduces wide rows: 16 bytes at a time, a warp for each row and range of columns.

#pragma once

#include <type_traits>

#include "reduce.cuh"

namespace dqn_fused::cuda {

template <class Stored>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(Stored);
  Stored values[SIZE];
};

// Flags of as many elements as a Vector has: one load where they are aligned.
template <int SIZE>
struct alignas(SIZE) Flags {
  uint8_t values[SIZE];
};

template <int SIZE>
__device__ Flags<SIZE> load_flags(const uint8_t* legal, bool aligned) {
  Flags<SIZE> flags;
  if (aligned) {
    flags = *reinterpret_cast<const Flags<SIZE>*>(legal);
  } else {
#pragma unroll
    for (int k = 0; k < SIZE; ++k) flags.values[k] = legal[k];
  }
  return flags;
}

// Add neighbouring elements at once: one comparison where they are all below the largest, or one rescaling.
template <int SIZE, class W>
__device__ void add_vector(Largest<W>& found, const W (&values)[SIZE], int64_t, W) {
#pragma unroll
  for (int k = 0; k < SIZE; ++k) found.largest = nan_max(found.largest, values[k]);
}

template <int SIZE, class W>
__device__ void add_vector(FirstLargest<W>& found, const W (&values)[SIZE], int64_t column, W scale) {
  W largest = values[0];
#pragma unroll
  for (int k = 1; k < SIZE; ++k) largest = nan_max(largest, values[k]);
  if (largest <= found.largest) return;  // often, after the first vectors
#pragma unroll
  for (int k = 0; k < SIZE; ++k) found.add(values[k], column + k, scale);
}

template <int SIZE, class W>
__device__ void add_vector(Exponentials<W>& found, const W (&values)[SIZE], int64_t, W scale) {
  using P = Exponentials<W>;
  P vector{values[0]};
#pragma unroll
  for (int k = 1; k < SIZE; ++k) vector.largest = nan_max(vector.largest, values[k]);
#pragma unroll
  for (int k = 0; k < SIZE; ++k) vector.total += P::exp_of_gap(vector.largest, values[k], scale);
  found.combine(vector, scale);
}

// Fills best[row, split] and aux[row, split] for the rows of x, whose columns are contiguous. A terminated row is
// neither read nor written.
template <class Stored, class Pair, bool MASKED>
__global__ void __launch_bounds__(THREADS, sizeof(typename Pair::Value) == 4 ? 4 : 2)
    rows_kernel(typename Pair::Value* best, typename Pair::Aux* aux, Matrix x, Matrix legal, Column terminated,
                typename Pair::Value scale, int64_t splits, int64_t chunk) {
  using W = typename Pair::Value;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t row = warp / splits, split = warp % splits;
  if (row >= x.rows || (terminated && terminated.at<bool>(row))) return;

  const int64_t first = split * chunk, left = x.A - first, n = left < chunk ? left : chunk;
  const Stored* const values = static_cast<const Stored*>(x.values.data) + x.offset(row) + first;
  const uint8_t* flags = nullptr;
  if (MASKED) flags = static_cast<const uint8_t*>(legal.values.data) + legal.offset(row) + first;
  // Elements before the first 16-byte boundary and after the last are read one by one.
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values) / sizeof(Stored) % SIZE);
  const int64_t head = misaligned == 0 ? 0 : (SIZE - misaligned < n ? SIZE - misaligned : n);
  const int64_t vectors = (n - head) / SIZE, tail = head + vectors * SIZE;

  Pair found;
  const auto add = [&](int64_t j) {
    found.add(!MASKED || flags[j] != 0 ? static_cast<W>(values[j]) : -INFINITE<W>, first + j, scale);
  };
  if (lane < head) add(lane);
  const Vector<Stored>* const body = reinterpret_cast<const Vector<Stored>*>(values + head);
  const bool aligned = MASKED && reinterpret_cast<uintptr_t>(flags + head) % SIZE == 0;
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += WARP) {
    const Vector<Stored> vector = body[v];
    const int64_t here = head + v * SIZE;
    Flags<SIZE> allowed;
    if (MASKED) allowed = load_flags<SIZE>(flags + here, aligned);
    W wide[SIZE];
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      wide[k] = !MASKED || allowed.values[k] != 0 ? static_cast<W>(vector.values[k]) : -INFINITE<W>;
    }
    add_vector(found, wide, first + here, scale);
  }
  if (lane < n - tail) add(tail + lane);
  combine_lanes(found, WARP, scale);
  if (lane == 0) found.store(best, aux, warp);
}

}  // namespace dqn_fused::cuda
