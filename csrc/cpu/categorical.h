// The categorical losses on the CPU: a distribution is K probabilities on K evenly spaced atoms, the support. T is the
// accumulation dtype.

#pragma once

#include <vector>

#include "distributions.h"

namespace dqn_fused::cpu {

struct CategoricalOptions {
  int64_t reduction = MEAN;
  double sigma = 0;  // of HL-Gauss, in units of the distance of two atoms; 0 for two-hot
};

// Fills the outputs that are not null; values, (2, n), are the TD errors and the expectations of the actions taken.
// atoms is padded as in atoms.h. Returns what reduce_samples returns.
template <class T>
bool categorical(const Distributions& d, const CategoricalOptions& options, const std::vector<T>& atoms,
                 const Outputs<T>& out);

}  // namespace dqn_fused::cpu
