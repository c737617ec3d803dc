// Functions of a row of K atoms. Rows are padded to a multiple of WIDTH: logits with -inf, the others with zeros.

#pragma once

#include "rows.h"

namespace dqn_fused::cpu {

template <class T>
struct Support {
  static constexpr int64_t WIDTH = 16;  // atoms that are processed at a time

  const T* atoms;
  int64_t K, padded;
};

// The largest of a row of logits, which is not finite if they are no distribution, and the sum of exp(logit - largest).
template <class T>
struct Softmax {
  T largest, total;
};

template <class T>
struct CrossEntropy {
  T loss, expectation, target_expectation, mass;
};

// The rows of logits of a state, `step` elements apart: that of its first action, and a flag for each action. legal is
// null if every action is legal.
struct ActionRows {
  Row first;
  int64_t A, step;
  const uint8_t* legal;
  int64_t legal_stride;
};

// Expectations of the softmaxes of the legal actions' logits, NaN where there is none; the scratch is one row. One call
// computes all of them, and none depends on another, so that a processor works on several at a time.
template <class T>
using Expectations = void (*)(const Support<T>& support, const ActionRows& logits, double* expectations, T* scratch);

template <class T>
Expectations<T> expectations(ScalarType type);

// Fills two rows, the logits and exp(logit - largest).
template <class T>
using Exponentials = Softmax<T> (*)(const Support<T>& support, const Row& row, T* logits, T* exponentials);

template <class T>
Exponentials<T> exponentials(ScalarType type);

template <class T>
struct AtomFunctions {
  // Shares the probabilities exponentials / total, which lie at reward + gamma * atoms, between the atoms beside them.
  void (*project)(const Support<T>& support, T reward, T gamma, const T* exponentials, T total, T* target, T* scratch);
  // A value shared between the atoms beside it.
  void (*two_hot)(const Support<T>& support, T value, T* target);
  // A normal distribution around a value, cut into bins around the atoms; scale is 1 / (sqrt(2) sigma).
  void (*gauss)(const Support<T>& support, T value, T scale, T* target, T* scratch);
  CrossEntropy<T> (*cross_entropy)(const Support<T>& support, const T* target, const T* logits, const T* exponentials,
                                   const Softmax<T>& softmax);
  // softmax * mass - target, (K,), not padded: the derivative of the cross-entropy by the logits.
  void (*slopes)(const Support<T>& support, const T* target, const T* exponentials, T total, T mass, T* slopes);

  static constexpr int64_t SCRATCH = 4;  // rows
};

template <class T>
AtomFunctions<T> atom_functions();

}  // namespace dqn_fused::cpu
