// The largest element of a row, NaN if one is NaN.

#pragma once

#include <cstdint>

#include "../td_loss.h"

namespace dqn_fused::cpu {

// Of n >= 1 elements; the function is chosen once by the dtype and the processor.
using RowMax = double (*)(const void* row, int64_t n, int64_t stride);

RowMax row_max(ScalarType type, bool contiguous);

}  // namespace dqn_fused::cpu
