#include "row_node.h"

#include "loss_node.h"

namespace dqn_fused::autograd::rows {
namespace {

enum { SLOPES, ACTIONS, WEIGHTS, SAVED };

class RowLossBackward : public LossNode<SAVED> {
 public:
  std::string name() const override { return "RowLossBackward"; }

  // The slopes are a result, so that a second derivative, which would need more than is saved, leads back here.
  void record(const Inputs& in, const RowOutputs& out, int64_t reduction, DifferentiableRows differentiable) {
    LossNode::record(in.q, {out.loss, out.slopes});
    save(SLOPES, out.slopes);
    save(ACTIONS, in.actions);
    save(WEIGHTS, in.weights);
    reduction_ = reduction;
    differentiable_ = differentiable;
  }

  variable_list apply(variable_list&& grads) override {
    auto x = unpack();
    const SavedRows saved{x[SLOPES], x[ACTIONS], maybe(x[WEIGHTS]), sizes_[1], type_, reduction_};
    const Tensor &grad_loss = grads[0], &grad_slopes = grads[1];
    if (!grad_loss.defined() && !grad_slopes.defined()) return {Tensor()};
    if (at::GradMode::is_enabled() || grad_slopes.defined() || transformed())
      return {differentiable_(grad_loss, grad_slopes, saved)};
    return {backward(grad_loss.contiguous(), saved)};
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    LossNode::compiled_args(args);
    args.collect(reduction_);
  }

 private:
  int64_t reduction_ = 0;
  DifferentiableRows differentiable_ = nullptr;
};

}  // namespace

void record(const Inputs& in, const RowOutputs& out, int64_t reduction, DifferentiableRows differentiable) {
  make_node<RowLossBackward>()->record(in, out, reduction, differentiable);
}

}  // namespace dqn_fused::autograd::rows
