// A compiled op, called boxed through the dispatcher, below autograd.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace dqn_fused::autograd {

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

inline at::Tensor tensor(Stack& results, size_t i) { return std::move(results[i]).toTensor(); }

}  // namespace dqn_fused::autograd
