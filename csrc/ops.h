// The ops of dqn_fused/_ops.py for a device, which has
// - run: the forward, if asked for with the gradient; normaliser is filled where options.cql is set,
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
  Maybe normaliser, grad_q;  // what is not given costs no empty tensor
};

template <class Device>
struct Ops {
  static Options plain(int64_t reduction) {
    Options options;
    options.reduction = reduction;
    return options;
  }

  static std::tuple<Tensor, Tensor> td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                            const Tensor& next_q, const Maybe& terminated, const Maybe& non_final_mask,
                                            const Maybe& gammas, double gamma, int64_t reduction, bool check) {
    const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
    Outputs out = Device::run(b, plain(reduction), q, non_final_mask, check, false);
    return {std::move(out.loss), std::move(out.td)};
  }

  static std::tuple<Tensor, Tensor, Tensor> td_loss_and_grad(const Tensor& q, const Tensor& actions,
                                                             const Tensor& rewards, const Tensor& next_q,
                                                             const Maybe& terminated, const Maybe& non_final_mask,
                                                             const Maybe& gammas, double gamma, int64_t reduction,
                                                             bool check) {
    const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
    Outputs out = Device::run(b, plain(reduction), q, non_final_mask, check, true);
    return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td)};
  }

  static Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, int64_t A,
                                 ScalarType type, int64_t reduction) {
    return Device::gradient(saved(grad_loss, td, actions, A, type, reduction), plain(reduction), grad_loss, td, {},
                            type);
  }

  static Options checked(const std::vector<double>& options) {
    fits(options.size() == OPTIONS, "options");
    return unpack(options.data());
  }

  static Outputs general(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q,
                         const Maybe& terminated, const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                         const Maybe& next_q_online, const Maybe& next_action_mask, const Maybe& weights,
                         const Maybe& target_q, const Maybe& action_mask, const Options& options, bool check,
                         bool with_grad) {
    Batch b = batch(q, actions, rewards, next_q ? &*next_q : nullptr, terminated, non_final_mask, gammas, gamma);
    extend(b, options, q, next_q_online, next_action_mask, weights, target_q, action_mask);
    Outputs out = Device::run(b, options, q, non_final_mask, check, with_grad);
    if (!options.cql) out.normaliser = empty({0}, accumulation_type(b.q.values.type), q);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> general_td_loss(
      const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
      const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
      const Maybe& next_action_mask, const Maybe& weights, const Maybe& target_q, const Maybe& action_mask,
      const std::vector<double>& options, bool check) {
    Outputs out = general(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                          next_action_mask, weights, target_q, action_mask, checked(options), check, false);
    return {std::move(out.loss), std::move(out.td), std::move(*out.normaliser)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> general_td_loss_and_grad(
      const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
      const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
      const Maybe& next_action_mask, const Maybe& weights, const Maybe& target_q, const Maybe& action_mask,
      const std::vector<double>& options, bool check) {
    Outputs out = general(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                          next_action_mask, weights, target_q, action_mask, checked(options), check, true);
    return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td), std::move(*out.normaliser)};
  }

  static Tensor general_td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions,
                                         const Maybe& weights, const Maybe& normaliser, const Maybe& q,
                                         const Maybe& action_mask, int64_t A, ScalarType type,
                                         const std::vector<double>& numbers) {
    const Options options = checked(numbers);
    Saved s = saved(grad_loss, td, actions, A, type, options.reduction);
    extend(s, options, td, type, weights, normaliser, q, action_mask);
    return Device::gradient(s, options, grad_loss, td, normaliser, type);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("td_loss", TORCH_BOX(&Ops::td_loss));
    m.impl("td_loss_and_grad", TORCH_BOX(&Ops::td_loss_and_grad));
    m.impl("td_loss_backward", TORCH_BOX(&Ops::td_loss_backward));
    m.impl("general_td_loss", TORCH_BOX(&Ops::general_td_loss));
    m.impl("general_td_loss_and_grad", TORCH_BOX(&Ops::general_td_loss_and_grad));
    m.impl("general_td_loss_backward", TORCH_BOX(&Ops::general_td_loss_backward));
  }
};

}  // namespace dqn_fused
