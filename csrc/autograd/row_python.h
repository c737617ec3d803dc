// The functions of _C_autograd for the distributional losses.

#pragma once

#include "python.h"

namespace dqn_fused::autograd::rows {

extern PyMethodDef methods[];

}  // namespace dqn_fused::autograd::rows
