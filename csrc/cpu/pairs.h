// Functions of rows of quantiles: reading, averaging, and sums over the pairs of predicted and target quantiles.

#pragma once

#include "rows.h"

namespace dqn_fused::cpu {

// This many predicted quantiles are processed at a time, and their rows are padded to a multiple of it.
constexpr int64_t PAIR_WIDTH = 16;

// Mean of a row, added up in an order that depends only on its length.
using Mean = double (*)(const Row& row);

Mean mean_of(ScalarType type);

// The row as T: out[j] = offset + factor * row[j].
template <class T>
using Affine = void (*)(const Row& row, T offset, T factor, T* out);

template <class T>
Affine<T> affine(ScalarType type);

// For each predicted quantile i the sums over targets j of |tau_i - 1{u < 0}| times huber(u) / kappa, and times its
// derivative by predicted_i; u = target_j - predicted_i. above is |tau - 1|, below |tau|. kappa may be 0.
template <class T>
using Pairs = void (*)(const T* predicted, const T* above, const T* below, int64_t padded, const T* target, int64_t n,
                       T kappa, T* losses, T* slopes);

template <class T>
Pairs<T> pairs(double kappa);

}  // namespace dqn_fused::cpu
