// The ops of dqn_fused/_distributional_ops.py as C++ functions.

#pragma once

#include "ops.h"

namespace dqn_fused::autograd {

// What each family of ops takes beside the batch and `check`.
struct Quantile {
  Maybe taus;
  double kappa = 0;
  bool mean = false;  // over the predicted quantiles
  int64_t reduction = 0;
};

struct Categorical {
  Maybe support;
  double v_min = 0, v_max = 0, sigma = 0;
  int64_t reduction = 0;
};

// slopes, (n, K), is undefined with a gradient, and grad_q without. values is (n,) or (2, n).
struct RowOutputs {
  Tensor loss, values, slopes, grad_q;
};

RowOutputs forward(const Inputs& in, const Quantile& options, bool with_grad);
RowOutputs forward(const Inputs& in, const Categorical& options, bool with_grad);

// row_loss.SavedRows, without K.
struct SavedRows {
  Tensor slopes, actions;
  Maybe weights;
  int64_t A = 0;
  at::ScalarType type = at::ScalarType::Undefined;
  int64_t reduction = 0;
};

// (n, A, K).
Tensor backward(const Tensor& grad_loss, const SavedRows& saved);

}  // namespace dqn_fused::autograd
