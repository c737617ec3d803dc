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

// Where results go. values, (2, n): the TD errors and the expectations of the actions taken. slopes, (n, K), may be
// null, and so may grad, (n, A, K).
template <class T>
struct CategoricalOutputs {
  T *loss, *values, *slopes;
  void* grad;
};

// Fills what is not null; atoms is padded as atoms.h has it. Returns as reduce_samples.
template <class T>
bool categorical(const Distributions& d, const CategoricalOptions& options, const std::vector<T>& atoms,
                 const CategoricalOutputs<T>& out);

}  // namespace dqn_fused::cpu
