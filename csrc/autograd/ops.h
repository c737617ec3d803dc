// The ops of dqn_fused/_ops.py as C++ functions on the tensors of the torch at hand, called through the dispatcher.

#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "../td_loss.h"

namespace dqn_fused::autograd {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// arguments.Batch; gamma is a number where gammas is empty. check: whether the op looks at the values.
struct Inputs {
  Tensor q, actions, rewards;
  Maybe next_q, terminated, non_final_mask, gammas;
  double gamma = 0;
  Maybe next_q_online, next_action_mask, weights, target_q, action_mask;
  bool check = false;
};

// normaliser is undefined without the conservative term, grad_q unless it was asked for.
struct Outputs {
  Tensor loss, td_error, normaliser, grad_q;
};

// autograd.Saved, without its shape. q, its mask and the normaliser are there if every action gets a gradient.
struct Saved {
  Tensor td_error, actions;
  Maybe weights, normaliser, q, action_mask;
  int64_t A = 0;
  at::ScalarType type = at::ScalarType::Undefined;
};

// The options as an op is given them, at most OPTIONS.
using Numbers = c10::List<double>;

inline Options unpack(const Numbers& numbers) {
  double x[OPTIONS];
  for (size_t i = 0; i < numbers.size(); ++i) x[i] = numbers.get(i);
  return dqn_fused::unpack(x, numbers.size());
}

Outputs forward(const Inputs& in, const Numbers& numbers, bool with_grad);

// (n, A).
Tensor backward(const Tensor& grad_loss, const Saved& saved, const Numbers& numbers);

}  // namespace dqn_fused::autograd
