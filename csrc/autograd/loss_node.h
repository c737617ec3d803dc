// What the nodes of all losses share: the tensors that they save, of which the first is a result of the node itself,
// and the layout of the gradient that they return.

#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>

namespace dqn_fused::autograd {

using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

template <size_t N>
class LossNode : public torch::autograd::Node {
 public:
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& x : saved_) x.reset_data();
  }

  // For a backward that torch.compile traces: the constants and the inputs of its graph.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < N; ++i) args.collect(saved_[i], i == 0);
    for (const int64_t size : sizes_) args.collect(size);
    args.collect(type_);
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    for (auto& x : saved_) swap.before(x);
    variable_list found = apply(variable_list(grads));
    for (auto& x : saved_) swap.after(x);
    return found;
  }

 protected:
  void save(size_t i, const at::Tensor& x) { saved_[i] = torch::autograd::SavedVariable(x, i == 0); }

  void save(size_t i, const std::optional<at::Tensor>& x) {
    if (x) save(i, *x);
  }

  // Undefined where nothing was saved.
  std::array<at::Tensor, N> unpack() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::array<at::Tensor, N> found;
    for (size_t i = 0; i < N; ++i) found[i] = i == 0 ? saved_[i].unpack(getptr()) : saved_[i].unpack();
    return found;
  }

  // Makes this the node of its input q and of the results that are differentiated.
  void record(const at::Tensor& q, std::initializer_list<at::Tensor> results) {
    sizes_ = q.sizes();
    type_ = q.scalar_type();
    set_next_edges(torch::autograd::collect_next_edges(q));
    for (const at::Tensor& x : results) torch::autograd::set_history(x, getptr());
  }

  c10::DimVector sizes_;  // of q
  at::ScalarType type_ = at::ScalarType::Undefined;

 private:
  std::array<torch::autograd::SavedVariable, N> saved_;
};

// Nodes as this version of torch holds them: older ones by std::shared_ptr.
template <class T, class Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<T>();
  else
    return c10::make_intrusive<T>();
}

// Whether a transform of torch.func is active.
inline bool transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

inline std::optional<at::Tensor> maybe(at::Tensor x) {
  return x.defined() ? std::optional<at::Tensor>(std::move(x)) : std::nullopt;
}

}  // namespace dqn_fused::autograd
