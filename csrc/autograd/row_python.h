// The functions of _C_autograd for the distributional losses.

#pragma once

#include "python.h"

namespace dqn_fused::autograd {

extern PyMethodDef row_methods[];

}  // namespace dqn_fused::autograd
