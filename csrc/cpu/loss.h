// The loss of a batch and its gradient on the CPU; T is the accumulation dtype.

#pragma once

#include "../tensors.h"

namespace dqn_fused::cpu {

// Fills td, loss, and with options.cql normaliser, (2, n): the two parts of each row's SoftValue; returns whether every
// action is legal and the mask has as many true entries as next_q has rows.
template <class T>
bool forward(const Batch& b, const Options& options, T* loss, T* td, T* normaliser);

// Fills grad_q; grad_loss is null for ones.
template <class T>
void backward(const Saved& saved, const Options& options, const T* grad_loss, const T* td, const T* normaliser,
              const Tensor& grad_q);

}  // namespace dqn_fused::cpu
