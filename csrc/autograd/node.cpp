#include "node.h"

#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <type_traits>

namespace dqn_fused::autograd {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// Nodes as this version of torch holds them: older ones by std::shared_ptr.
template <class T, class Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::make_shared<T>();
  else
    return c10::make_intrusive<T>();
}

// Whether a transform of torch.func is active.
bool transformed() { return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode); }

Maybe maybe(Tensor x) { return x.defined() ? Maybe(std::move(x)) : std::nullopt; }

struct TDLossBackward : Node {
  SavedVariable td_error, actions, weights, normaliser, q, action_mask;
  c10::DimVector sizes;  // of q
  at::ScalarType type;
  Numbers numbers;  // the options
  Differentiable differentiable;

  std::string name() const override { return "TDLossBackward"; }

  Saved unpack() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {td_error.unpack(getptr()),
            actions.unpack(),
            maybe(weights.unpack()),
            maybe(normaliser.unpack()),
            maybe(q.unpack()),
            maybe(action_mask.unpack()),
            sizes.back(),
            type};
  }

  variable_list apply(variable_list&& grads) override {
    const Saved saved = unpack();
    const Tensor &grad_loss = grads[0], &grad_td_error = grads[1];
    if (at::GradMode::is_enabled() || grad_td_error.defined() || transformed()) {
      if (!grad_loss.defined() && !grad_td_error.defined()) return {Tensor()};
      return {differentiable(grad_loss, grad_td_error, saved, numbers).view(sizes)};
    }
    return {grad_loss.defined() ? dense(grad_loss, saved) : Tensor()};
  }

  Tensor dense(const Tensor& grad_loss, const Saved& saved) const {
    Tensor grad_q = backward(grad_loss.contiguous(), saved, numbers);
    return sizes.size() == 2 ? grad_q : at::_unsafe_view(grad_q, sizes);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* x : saved()) x->reset_data();
  }

  std::array<SavedVariable*, 6> saved() { return {&td_error, &actions, &weights, &normaliser, &q, &action_mask}; }

  // For a backward that torch.compile traces: the constants and the inputs of its graph.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(td_error, true);
    for (const SavedVariable* x : {&actions, &weights, &normaliser, &q, &action_mask}) args.collect(*x, false);
    for (const int64_t size : sizes) args.collect(size);
    args.collect(type);
    args.collect(numbers.vec());
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    for (SavedVariable* x : saved()) swap.before(*x);
    variable_list found = apply(variable_list(grads));
    for (SavedVariable* x : saved()) swap.after(*x);
    return found;
  }
};

}  // namespace

Outputs record(const Inputs& in, const Numbers& numbers, Differentiable differentiable) {
  Outputs out = forward(in, numbers, false);
  const auto node = make_node<TDLossBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(in.q));
  torch::autograd::set_history(out.loss, node);
  torch::autograd::set_history(out.td_error, node);
  node->td_error = SavedVariable(out.td_error, true);
  node->actions = SavedVariable(in.actions, false);
  if (in.weights) node->weights = SavedVariable(*in.weights, false);
  if (unpack(numbers).cql_alpha != 0) {
    node->normaliser = SavedVariable(out.normaliser, false);
    node->q = SavedVariable(in.q, false);
    if (in.action_mask) node->action_mask = SavedVariable(*in.action_mask, false);
  }
  node->sizes = in.q.sizes();
  node->type = in.q.scalar_type();
  node->numbers = numbers;
  node->differentiable = differentiable;
  return out;
}

}  // namespace dqn_fused::autograd
