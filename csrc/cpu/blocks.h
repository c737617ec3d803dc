// How a batch is cut into blocks of samples. A block depends only on the shape, and the sums of the blocks are added in
// order: any number of threads gives the same bits.

#pragma once

#include <algorithm>
#include <vector>

#include "columns.h"
#include "parallel.h"

namespace dqn_fused::cpu {

constexpr int64_t BLOCK = 8192;  // elements of next_q in a block of samples: the unit of work and of the partial sums

// How many next rows come before each block of rows, (blocks + 1,).
inline std::vector<int64_t> first_next_rows(const Batch& b, int64_t blocks, int64_t block_rows) {
  std::vector<int64_t> first(blocks + 1, 0);
  bool live[MOST_ROWS];
  for (int64_t k = 0; k < blocks; ++k) {
    first[k + 1] = first[k];
    const int64_t end = std::min(b.n, (k + 1) * block_rows);
    for (int64_t i = k * block_rows; i < end; i += MOST_ROWS) {
      const int64_t n = std::min(MOST_ROWS, end - i);
      read_live(b, i, n, live);
      first[k + 1] += std::count(live, live + n, true);
    }
  }
  return first;
}

}  // namespace dqn_fused::cpu
