// Finds the lane at fault, and the number of passes over the banks of shared memory that an access takes.

#pragma once

#include <algorithm>

#include "warp.h"

namespace ptx {

template <class F>
void on_lane(int lane, const F& f) {
  try {
    f();
  } catch (Fault& fault) {
    fault.lane = lane;
    throw;
  }
}

// 32 banks of 4 bytes: a pass serves one word of each. Accesses of 8 and 16 bytes a lane go by 16 and 8 lanes.
inline void count_wavefronts(Warp& w, const uint64_t* addresses, int lanes, int size) {
  Counts& counts = w.launch().counts;
  const int together = size <= 4 ? LANES : LANES * 4 / size;
  for (int first = 0; first < lanes; first += together) {
    uint64_t words[LANES * 2];
    int n = 0;
    for (int i = first; i < std::min(first + together, lanes); ++i) {
      for (uint64_t word = addresses[i] / 4; word * 4 < addresses[i] + size; ++word) words[n++] = word;
    }
    std::sort(words, words + n);
    n = static_cast<int>(std::unique(words, words + n) - words);
    int of_bank[32] = {}, most = 0;
    for (int k = 0; k < n; ++k) most = std::max(most, ++of_bank[words[k] % 32]);
    counts.wavefronts += most;
    counts.conflicts += most - (n + 31) / 32;
  }
}

}  // namespace ptx
