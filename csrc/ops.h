// The ops of dqn_fused/_ops.py for a Device that has
// - run: the forward, with the gradient if it is asked for; normaliser is there where options.cql is set,
// - gradient: the backward.

#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "tensors.h"

namespace dqn_fused {

using Maybe = std::optional<Tensor>;

struct Outputs {
  Tensor loss, td;
  Maybe normaliser, grad_q;
};

template <class Device>
struct Ops {
  template <bool with_grad>
  static auto td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q,
                      const Maybe& terminated, const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                      const Maybe& next_q_online, const Maybe& next_action_mask, const Maybe& weights,
                      const Maybe& target_q, const Maybe& action_mask, const std::vector<double>& options, bool check) {
    const Options o = checked(options);
    const Batch b = batch(o, q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                          next_action_mask, weights, target_q, action_mask);
    Outputs out = Device::run(b, o, q, non_final_mask, check, with_grad);
    if constexpr (with_grad)
      return std::make_tuple(std::move(out.loss), std::move(*out.grad_q), std::move(out.td), std::move(out.normaliser));
    else
      return std::make_tuple(std::move(out.loss), std::move(out.td), std::move(out.normaliser));
  }

  static Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td_error, const Tensor& actions,
                                 const Maybe& weights, const Maybe& normaliser, const Maybe& q,
                                 const Maybe& action_mask, int64_t A, ScalarType dtype,
                                 const std::vector<double>& options) {
    const Options o = checked(options);
    const Saved s = saved(o, grad_loss, td_error, actions, weights, normaliser, q, action_mask, A, dtype);
    return Device::gradient(s, o, grad_loss, td_error, normaliser, dtype);
  }

  static Options checked(const std::vector<double>& options) {
    fits(options.size() <= OPTIONS, "options");
    return unpack(options.data(), options.size());
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("td_loss", TORCH_BOX(&Ops::td_loss<false>));
    m.impl("td_loss_and_grad", TORCH_BOX(&Ops::td_loss<true>));
    m.impl("td_loss_backward", TORCH_BOX(&Ops::td_loss_backward));
  }
};

}  // namespace dqn_fused
