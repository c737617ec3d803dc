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

// Fills the outputs that are not null; values are the TD errors, (n,). Returns what reduce_samples returns.
template <class T>
bool quantile(const Distributions& d, const QuantileOptions& options, const Outputs<T>& out);

}  // namespace dqn_fused::cpu
