// How a batch is cut into blocks of samples. A block depends on the shape alone, and its sum is added in its turn: any
// number of threads gives the same bits.

#pragma once

#include <algorithm>
#include <vector>

#include "../td_loss.h"
#include "parallel.h"

namespace dqn_fused::cpu {

constexpr int64_t BLOCK = 8192;  // elements of next_q in a block of samples: the unit of work and of the partial sums

// How many next rows come before each block of rows, (blocks + 1,).
inline std::vector<int64_t> first_next_rows(const Batch& b, int64_t blocks, int64_t block_rows) {
  std::vector<int64_t> first(blocks + 1, 0);
  for (int64_t k = 0; k < blocks; ++k) {
    int64_t count = 0;
    for (int64_t i = k * block_rows; i < std::min(b.n, (k + 1) * block_rows); ++i) count += b.live(i);
    first[k + 1] = first[k] + count;
  }
  return first;
}

}  // namespace dqn_fused::cpu
