// The loss of a batch and its gradient on the CPU; T is the accumulation dtype.

#pragma once

#include "../tensors.h"

namespace dqn_fused::cpu {

// Writes the gradient of q, contiguous, from TD errors; grad_loss is null for an upstream gradient of ones.
template <class T>
struct Gradient {
  const Saved& saved;
  const Options& options;
  const T *grad_loss, *td, *normaliser;
  void* grad_q;
  ScalarType type;

  // The cost of an element, where reading one costs 1.
  int64_t cost() const { return options.cql_alpha != 0 ? 8 : 1; }

  // Elements [begin, end) of the flat gradient. The TD errors and normalisers of their rows must be known.
  void write(int64_t begin, int64_t end) const;

  // All of it, by all threads.
  void write() const;
};

// Fills td, loss, and with options.cql normaliser, (2, n): the two parts of each row's SoftValue; and the gradient, if
// it is not null. Returns whether every action is legal and the mask has as many true entries as next_q has rows.
template <class T>
bool forward(const Batch& b, const Options& options, T* loss, T* td, T* normaliser, const Gradient<T>* gradient);

}  // namespace dqn_fused::cpu
