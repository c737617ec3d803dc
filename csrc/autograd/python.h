// Between Python and the ops: a batch as its tuple of arguments, results as a tuple, errors.

#pragma once

#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <utility>

#include "ops.h"

namespace dqn_fused::autograd {

// The fields of arguments.Batch that an op is given.
enum Argument {
  Q,
  ACTIONS,
  REWARDS,
  NEXT_Q,
  TERMINATED,
  GAMMA,
  NON_FINAL_MASK,
  NEXT_Q_ONLINE,
  NEXT_ACTION_MASK,
  WEIGHTS,
  TARGET_Q,
  ACTION_MASK
};

// The sets' own operator - would leave the bits of the devices.
inline bool within(c10::DispatchKeySet keys, c10::DispatchKeySet all) {
  return (keys.raw_repr() & ~all.raw_repr()) == 0;
}

// A dense tensor on the CPU and nothing more: no subclass, no lazy conjugate, no batched tensor of vmap.
inline bool ordinary(PyObject* x) {
  using c10::DispatchKey;
  static constexpr c10::DispatchKeySet keys(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  return THPVariable_CheckExact(x) && within(THPVariable_Unpack(x).key_set(), keys);
}

// Whether nothing intercepts operations: no transform of torch.func, no mode.
inline bool undisturbed() {
  return within(c10::impl::tls_local_dispatch_key_set().included_,
                c10::autocast_dispatch_keyset | c10::default_included_set);
}

// Whether everything in a batch that should be a tensor is one, of the kind asked for.
inline bool tensors(PyObject* const* given, bool (*kind)(PyObject*)) {
  for (const Argument i : {Q, ACTIONS, REWARDS})
    if (!kind(given[i])) return false;
  for (const Argument i :
       {NEXT_Q, TERMINATED, NON_FINAL_MASK, NEXT_Q_ONLINE, NEXT_ACTION_MASK, WEIGHTS, TARGET_Q, ACTION_MASK})
    if (given[i] != Py_None && !kind(given[i])) return false;
  PyObject* const gamma = given[GAMMA];
  return PyFloat_CheckExact(gamma) || PyLong_CheckExact(gamma) || kind(gamma);
}

// Whether q and next_q may be swapped: hints.warn_if_swapped.
inline bool swapped(PyObject* const* given) {
  return given[NEXT_Q] != Py_None && !THPVariable_Unpack(given[Q]).requires_grad() &&
         THPVariable_Unpack(given[NEXT_Q]).requires_grad() && at::GradMode::is_enabled();
}

// Whether a batch can go to an op as it is, which checks it; otherwise Python must look at it first.
inline bool takes(PyObject* const* given) {
  return tensors(given, ordinary) && undisturbed() && !swapped(given) &&
         !torch::autograd::isFwGradDefined(THPVariable_Unpack(given[Q]));
}

inline Maybe maybe(PyObject* x) { return x == Py_None ? std::nullopt : Maybe(THPVariable_Unpack(x)); }

// Of a batch of tensors. A Python error is set where gamma does not fit a double.
inline Inputs read_batch(PyObject* const* given, bool check) {
  PyObject* const gamma = given[GAMMA];
  Inputs in;
  in.q = THPVariable_Unpack(given[Q]);
  in.actions = THPVariable_Unpack(given[ACTIONS]);
  in.rewards = THPVariable_Unpack(given[REWARDS]);
  in.next_q = maybe(given[NEXT_Q]);
  in.terminated = maybe(given[TERMINATED]);
  in.non_final_mask = maybe(given[NON_FINAL_MASK]);
  if (THPVariable_Check(gamma))
    in.gammas = THPVariable_Unpack(gamma);
  else
    in.gamma = PyFloat_AsDouble(gamma);
  in.next_q_online = maybe(given[NEXT_Q_ONLINE]);
  in.next_action_mask = maybe(given[NEXT_ACTION_MASK]);
  in.weights = maybe(given[WEIGHTS]);
  in.target_q = maybe(given[TARGET_Q]);
  in.action_mask = maybe(given[ACTION_MASK]);
  in.check = check;
  return in;
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct WithGil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~WithGil() { PyGILState_Release(state); }
};

inline PyObject* none_if_empty(Tensor x) {
  if (x.defined()) return THPVariable_Wrap(std::move(x));
  Py_RETURN_NONE;
}

inline PyObject* none_if_empty(const Maybe& x) { return none_if_empty(x.value_or(Tensor())); }

template <class... Tensors>
PyObject* tuple(Tensors... tensors) {
  PyObject* const found = PyTuple_New(sizeof...(tensors));
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(found, i++, none_if_empty(std::move(tensors))), ...);
  return found;
}

// What a Python function has returned, or raised.
inline Tensor returned(THPObjectPtr found) {
  if (!found) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  return THPVariable_Unpack(found.get());
}

// None where what() throws because an op refuses its arguments: Python then says what is wrong.
template <class What>
PyObject* none_if_refused(What&& what) {
  try {
    return what();
  } catch (python_error& error) {  // of a hook
    error.restore();
    return nullptr;
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
}

// The batch of a call whose arguments nothing has checked; empty where Python must look at it first.
inline std::optional<Inputs> ordinary_batch(PyObject* const* given) {
  if (!takes(given)) return std::nullopt;
  Inputs in = read_batch(given, true);
  if (PyErr_Occurred() == nullptr) return in;
  PyErr_Clear();
  return std::nullopt;
}

// Whether a loss leaves a node in the graph.
inline bool recorded(const Inputs& in) { return in.q.requires_grad() && at::GradMode::is_enabled(); }

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyCFunction method(Fast function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); }

}  // namespace dqn_fused::autograd
