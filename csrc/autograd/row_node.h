// The node that a recorded distributional loss leaves in the graph: row_loss.RowLoss in C++.

#pragma once

#include "row_ops.h"

namespace dqn_fused::autograd::rows {

// A backward in operations that can be differentiated themselves; (n, A, K).
using DifferentiableRows = Tensor (*)(const Tensor& grad_loss, const Tensor& grad_slopes, const SavedRows& saved);

// Records loss and slopes, the results of a forward, as results of q.
void record(const Inputs& in, const RowOutputs& out, int64_t reduction, DifferentiableRows differentiable);

}  // namespace dqn_fused::autograd::rows
