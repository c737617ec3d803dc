// Launch sizes: how rows and columns are dealt out to blocks, warps and lanes. Plain arithmetic without a CUDA header,
// so that the host can test it.
//
// The figures are reasoned, not measured on a GPU. A second launch costs 2 to 3 us and its first load 0.7 us; a round
// of forward_kernel is two loads that depend on each other, 1.4 us.

#pragma once

#include <algorithm>
#include <cstdint>

namespace dqn_fused::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;              // of a block, where many of them share the work
constexpr int64_t NARROW = 64;            // most actions of rows that forward_kernel reads itself
constexpr int COLUMNS = 8;                // loads in flight per lane, there
constexpr int64_t SINGLE_COLUMNS = 4096;  // of a strided row, or partial results of one, that one block may reduce
constexpr int64_t SINGLE_ROUNDS = 3;      // rows that a group of lanes takes in turn before a second launch is cheaper
constexpr int64_t MOST_BLOCKS = 4096;     // whose partial sums sum_kernel adds, 8 per thread
constexpr int64_t RESIDENT = 132 * 8;     // blocks of THREADS that an H200 holds
constexpr int64_t MIN_CHUNK = 2048;       // columns of a split, at least: 8 vectors of 16 bytes a lane and more
constexpr int64_t MOST_VECTORS = 4;       // of 16 bytes that a thread of backward_kernel stores

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launch of rows_kernel: a warp for each row and range of `chunk` columns.
struct RowsLaunch {
  int64_t splits, chunk, blocks;
};

inline RowsLaunch rows_launch(int64_t rows, int64_t A) {
  constexpr int64_t WARPS = 2 * RESIDENT * (THREADS / WARP);
  const int64_t most = std::min(ceil_div(A, MIN_CHUNK), ceil_div(WARPS, std::max<int64_t>(rows, 1)));
  const int64_t chunk = ceil_div(ceil_div(A, most), MIN_CHUNK) * MIN_CHUNK, splits = ceil_div(A, chunk);
  return {splits, chunk, ceil_div(rows * splits, THREADS / WARP)};
}

// Launch of forward_kernel: `lanes` neighbouring lanes for each row, block_rows rows for each block.
struct ForwardLaunch {
  int lanes, threads;
  int64_t block_rows, blocks;
};

// K: columns, or partial results, of the widest row that it reads; most_threads: of a block.
inline ForwardLaunch forward_launch(int64_t n, int64_t K, int most_threads) {
  int lanes = 1;
  while (lanes < WARP && lanes * COLUMNS < K) lanes *= 2;
  if (n * lanes <= most_threads * SINGLE_ROUNDS && K <= SINGLE_COLUMNS) {
    const int64_t threads = std::max<int64_t>(ceil_div(n * lanes, WARP), 1) * WARP;
    return {lanes, static_cast<int>(std::min<int64_t>(threads, most_threads)), std::max<int64_t>(n, 1), 1};
  }
  const int64_t groups = THREADS / lanes, rows = groups * std::max<int64_t>(ceil_div(n, groups * MOST_BLOCKS), 1);
  return {lanes, THREADS, rows, std::max<int64_t>(ceil_div(n, rows), 1)};
}

// Launch of backward_kernel: `block` elements of the gradient, of `rows` rows at most.
struct BackwardLaunch {
  int64_t block, blocks, rows;
};

inline BackwardLaunch backward_launch(int64_t size, int64_t A, int64_t itemsize) {
  const int64_t least = THREADS * (16 / itemsize);
  // Several vectors per thread where enough blocks remain, but not where a block would hold many rows of few actions.
  const int64_t vectors = A < 16 ? 1 : std::clamp<int64_t>(size / (least * RESIDENT), 1, MOST_VECTORS);
  const int64_t block = least * vectors;
  return {block, ceil_div(size, block), (block - 2) / A + 2};
}

}  // namespace dqn_fused::cuda
