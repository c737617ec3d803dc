// The node that a recorded loss leaves in the graph: autograd.TDLoss in C++, where the engine calls it without Python.

#pragma once

#include <torch/csrc/autograd/function.h>

#include "ops.h"

namespace dqn_fused::autograd {

// A backward in operations that are themselves differentiable. The result has q's shape.
using Differentiable = Tensor (*)(const Tensor& grad_loss, const Tensor& grad_td_error, const Saved& saved,
                                  const Numbers& numbers);

// The forward; loss and td_error are recorded as results of q.
Outputs record(const Inputs& in, const Numbers& numbers, Differentiable differentiable);

}  // namespace dqn_fused::autograd
