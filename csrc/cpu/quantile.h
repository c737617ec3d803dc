// The quantile loss on the CPU; T is the accumulation dtype.

#pragma once

#include "distributions.h"

namespace dqn_fused::cpu {

struct QuantileOptions {
  int64_t reduction = MEAN;
  double kappa = 1;
  bool mean = false;  // over the predicted quantiles; else the sum
  Matrix taus;        // (n, K), or empty for the midpoints
};

// Where results go. slopes, (n, K), may be null, and so may grad, (n, A, K).
template <class T>
struct QuantileOutputs {
  T *loss, *td, *slopes;
  void* grad;
};

// Fills what is not null. Returns as reduce_samples.
template <class T>
bool quantile(const Distributions& d, const QuantileOptions& options, const QuantileOutputs<T>& out);

}  // namespace dqn_fused::cpu
