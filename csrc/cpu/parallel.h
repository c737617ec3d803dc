// How work is cut up for the threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace dqn_fused::cpu {

constexpr int64_t GRAIN = 1 << 16;  // elements that pay for waking a thread: 64 K read in 4 us

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Run f on ranges of items, of `size` elements each, on several threads if there are enough.
template <class F>
void for_each_block(int64_t items, int64_t size, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(size, 1));
  if (items <= grain) return f(0, items);  // parallel_for would find that out for 0.1 us
  torch::stable::parallel_for(0, items, grain, f);
}

}  // namespace dqn_fused::cpu
