#include "ops.h"

#include "op.h"

namespace dqn_fused::autograd {

Outputs forward(const Inputs& in, const Numbers& numbers, bool with_grad) {
  const Options o = unpack(numbers);
  Stack found;
  const bool more = in.next_q_online || in.next_action_mask || in.weights || in.target_q || in.action_mask;
  if (o.plain() && in.next_q && !more) {
    static const Op alone("dqn_fused::td_loss"), both("dqn_fused::td_loss_and_grad");
    found = (with_grad ? both : alone)(in.q, in.actions, in.rewards, *in.next_q, in.terminated, in.non_final_mask,
                                       in.gammas, in.gamma, o.reduction, in.check);
  } else {
    static const Op alone("dqn_fused::general_td_loss"), both("dqn_fused::general_td_loss_and_grad");
    found = (with_grad ? both : alone)(in.q, in.actions, in.rewards, in.next_q, in.terminated, in.non_final_mask,
                                       in.gammas, in.gamma, in.next_q_online, in.next_action_mask, in.weights,
                                       in.target_q, in.action_mask, numbers, in.check);
  }
  Outputs out;
  size_t i = 0;
  out.loss = tensor(found, i++);
  if (with_grad) out.grad_q = tensor(found, i++);
  out.td_error = tensor(found, i++);
  if (o.cql) out.normaliser = tensor(found, i);
  return out;
}

Tensor backward(const Tensor& grad_loss, const Saved& s, const Numbers& numbers) {
  const Options o = unpack(numbers);
  static const Op plain("dqn_fused::td_loss_backward"), general("dqn_fused::general_td_loss_backward");
  const auto type = static_cast<int64_t>(s.type);
  Stack found = o.loss == MSE && !s.weights && !s.q ? plain(grad_loss, s.td_error, s.actions, s.A, type, o.reduction)
                                                    : general(grad_loss, s.td_error, s.actions, s.weights, s.normaliser,
                                                              s.q, s.action_mask, s.A, type, numbers);
  return tensor(found, 0);
}

}  // namespace dqn_fused::autograd
