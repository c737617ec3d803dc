#include "ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace dqn_fused::autograd {
namespace {

using torch::jit::Stack;

class Op {
 public:
  explicit Op(const char* name) : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "")) {}

  template <class... Arguments>
  Stack operator()(Arguments&&... arguments) const {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Stack stack;
    stack.reserve(sizeof...(arguments));
    (stack.emplace_back(std::forward<Arguments>(arguments)), ...);
    handle_.callBoxed(stack);
    return stack;
  }

 private:
  c10::OperatorHandle handle_;
};

Tensor tensor(Stack& results, size_t i) { return std::move(results[i]).toTensor(); }

}  // namespace

Outputs forward(const Inputs& in, const Numbers& numbers, bool with_grad) {
  static const Op alone("dqn_fused::td_loss"), both("dqn_fused::td_loss_and_grad");
  Stack found = (with_grad ? both : alone)(in.q, in.actions, in.rewards, in.next_q, in.terminated, in.non_final_mask,
                                           in.gammas, in.gamma, in.next_q_online, in.next_action_mask, in.weights,
                                           in.target_q, in.action_mask, numbers, in.check);
  Outputs out;
  size_t i = 0;
  out.loss = tensor(found, i++);
  if (with_grad) out.grad_q = tensor(found, i++);
  out.td_error = tensor(found, i++);
  if (!found[i].isNone()) out.normaliser = tensor(found, i);
  return out;
}

Tensor backward(const Tensor& grad_loss, const Saved& s, const Numbers& numbers) {
  static const Op op("dqn_fused::td_loss_backward");
  Stack found = op(grad_loss, s.td_error, s.actions, s.weights, s.normaliser, s.q, s.action_mask, s.A,
                   static_cast<int64_t>(s.type), numbers);
  return tensor(found, 0);
}

}  // namespace dqn_fused::autograd
