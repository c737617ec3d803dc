// Runs a kernel over a grid.

#pragma once

#include "warp.h"

namespace ptx {

struct Options {
  uint64_t seed = 0;
  uint64_t most_instructions = 1000000000;  // of all warps
};

void execute(Launch& launch, const Options& options);

}  // namespace ptx
