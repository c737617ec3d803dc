#include "node.h"

#include <ATen/ops/_unsafe_view.h>

#include "loss_node.h"

namespace dqn_fused::autograd {
namespace {

enum { TD_ERROR, ACTIONS, WEIGHTS, NORMALISER, Q, ACTION_MASK, SAVED };

class TDLossBackward : public LossNode<SAVED> {
 public:
  std::string name() const override { return "TDLossBackward"; }

  void record(const Inputs& in, const Numbers& numbers, const Outputs& out, Differentiable differentiable) {
    LossNode::record(in.q, {out.loss, out.td_error});
    save(TD_ERROR, out.td_error);
    save(ACTIONS, in.actions);
    save(WEIGHTS, in.weights);
    if (autograd::unpack(numbers).cql_alpha != 0) {
      save(NORMALISER, out.normaliser);
      save(Q, in.q);
      save(ACTION_MASK, in.action_mask);
    }
    numbers_ = numbers;
    differentiable_ = differentiable;
  }

  variable_list apply(variable_list&& grads) override {
    auto x = unpack();
    const Saved saved{x[TD_ERROR],          x[ACTIONS],  maybe(x[WEIGHTS]),
                      maybe(x[NORMALISER]), maybe(x[Q]), maybe(x[ACTION_MASK]),
                      sizes_.back(),        type_};
    const Tensor &grad_loss = grads[0], &grad_td_error = grads[1];
    if (at::GradMode::is_enabled() || grad_td_error.defined() || transformed()) {
      if (!grad_loss.defined() && !grad_td_error.defined()) return {Tensor()};
      return {differentiable_(grad_loss, grad_td_error, saved, numbers_).view(sizes_)};
    }
    if (!grad_loss.defined()) return {Tensor()};
    Tensor grad_q = backward(grad_loss.contiguous(), saved, numbers_);
    return {sizes_.size() == 2 ? grad_q : at::_unsafe_view(grad_q, sizes_)};
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    LossNode::compiled_args(args);
    args.collect(numbers_.vec());
  }

 private:
  Numbers numbers_;  // the options
  Differentiable differentiable_ = nullptr;
};

}  // namespace

Outputs record(const Inputs& in, const Numbers& numbers, Differentiable differentiable) {
  Outputs out = forward(in, numbers, false);
  make_node<TDLossBackward>()->record(in, numbers, out, differentiable);
  return out;
}

}  // namespace dqn_fused::autograd
