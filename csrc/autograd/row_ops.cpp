#include "row_ops.h"

#include "op.h"

namespace dqn_fused::autograd {
namespace {

template <class... Own>
RowOutputs call(const Op& op, const Inputs& in, bool with_grad, const Own&... own) {
  Stack found = op(in.q, in.actions, in.rewards, in.next_q, in.terminated, in.non_final_mask, in.gammas, in.gamma,
                   in.next_q_online, in.next_action_mask, in.weights, own..., in.check);
  if (with_grad) return {tensor(found, 0), tensor(found, 2), {}, tensor(found, 1)};
  return {tensor(found, 0), tensor(found, 1), tensor(found, 2), {}};
}

}  // namespace

RowOutputs forward(const Inputs& in, const Quantile& o, bool with_grad) {
  static const Op alone("dqn_fused::quantile_loss"), both("dqn_fused::quantile_loss_and_grad");
  return call(with_grad ? both : alone, in, with_grad, o.taus, o.kappa, o.mean, o.reduction);
}

RowOutputs forward(const Inputs& in, const Categorical& o, bool with_grad) {
  static const Op alone("dqn_fused::categorical_loss"), both("dqn_fused::categorical_loss_and_grad");
  return call(with_grad ? both : alone, in, with_grad, o.support, o.v_min, o.v_max, o.sigma, o.reduction);
}

Tensor backward(const Tensor& grad_loss, const SavedRows& s) {
  static const Op op("dqn_fused::rows_backward");
  Stack found = op(grad_loss, s.slopes, s.actions, s.weights, s.A, static_cast<int64_t>(s.type), s.reduction);
  return tensor(found, 0);
}

}  // namespace dqn_fused::autograd
