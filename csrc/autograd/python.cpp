// The module _C_autograd: calls of the compiled ops with the gradient recorded by a node in C++.

#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <utility>

#include "node.h"

namespace dqn_fused::autograd {
namespace {

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

// What Python hands over at the start: a function, and FIELD_CODES and DEFAULTS of dqn_fused/options.py.
PyObject *recorded_backward = nullptr, *codes = nullptr, *defaults = nullptr;

// A LossSpec in numbers. The last one is kept, since most calls use it again. False for the weighted mean, which Python
// turns into another reduction.
bool read(PyObject* spec, Numbers& found) {
  static PyObject* last = nullptr;
  static Numbers numbers;
  if (spec != last) {
    Numbers fresh;
    fresh.reserve(OPTIONS);
    for (size_t i = 0; i < OPTIONS; ++i) {
      PyObject* x = PyTuple_GET_ITEM(spec, i);
      PyObject* const known = PyTuple_GET_ITEM(codes, i);
      if (known != Py_None) x = PyDict_GetItem(known, x);
      if (x == nullptr) return false;
      fresh.push_back(PyFloat_AsDouble(x));
    }
    while (!fresh.empty() &&
           fresh.get(fresh.size() - 1) == PyFloat_AsDouble(PyTuple_GET_ITEM(defaults, fresh.size() - 1)))
      fresh.pop_back();
    numbers = std::move(fresh);  // another list: a node may hold the one before
    Py_INCREF(spec);
    Py_XDECREF(std::exchange(last, spec));
  }
  found = numbers;
  return true;
}

using c10::DispatchKey;
using c10::DispatchKeySet;

// The sets' own operator - would leave the bits of the devices.
bool within(DispatchKeySet keys, DispatchKeySet all) { return (keys.raw_repr() & ~all.raw_repr()) == 0; }

// A dense tensor on the CPU and nothing more: no subclass, no lazy conjugate, no batched tensor of vmap.
bool ordinary(PyObject* x) {
  static constexpr DispatchKeySet keys(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  return THPVariable_CheckExact(x) && within(THPVariable_Unpack(x).key_set(), keys);
}

// Whether nothing intercepts operations: no transform of torch.func, no mode.
bool undisturbed() {
  return within(c10::impl::tls_local_dispatch_key_set().included_,
                c10::autocast_dispatch_keyset | c10::default_included_set);
}

// Whether everything that should be a tensor is one, of the kind asked for.
bool tensors(PyObject* const* given, bool (*kind)(PyObject*)) {
  for (const Argument i : {Q, ACTIONS, REWARDS})
    if (!kind(given[i])) return false;
  for (const Argument i :
       {NEXT_Q, TERMINATED, NON_FINAL_MASK, NEXT_Q_ONLINE, NEXT_ACTION_MASK, WEIGHTS, TARGET_Q, ACTION_MASK})
    if (given[i] != Py_None && !kind(given[i])) return false;
  PyObject* const gamma = given[GAMMA];
  return PyFloat_CheckExact(gamma) || PyLong_CheckExact(gamma) || kind(gamma);
}

// Whether q and next_q may be swapped: hints.warn_if_swapped.
bool swapped(PyObject* const* given) {
  return given[NEXT_Q] != Py_None && !THPVariable_Unpack(given[Q]).requires_grad() &&
         THPVariable_Unpack(given[NEXT_Q]).requires_grad() && at::GradMode::is_enabled();
}

// Whether the op takes the arguments as they are and checks them; false where Python must look at them first.
bool takes(PyObject* const* given) {
  if (!tensors(given, ordinary) || swapped(given)) return false;
  for (const Argument i : {Q, NEXT_Q, NEXT_Q_ONLINE, NEXT_ACTION_MASK, TARGET_Q, ACTION_MASK})
    if (given[i] != Py_None && THPVariable_Unpack(given[i]).dim() != 2) return false;
  return undisturbed() && !torch::autograd::isFwGradDefined(THPVariable_Unpack(given[Q]));
}

Maybe maybe(PyObject* x) { return x == Py_None ? std::nullopt : Maybe(THPVariable_Unpack(x)); }

Inputs read(PyObject* const* given, bool check) {
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

PyObject* none_if_empty(Tensor x) {
  if (x.defined()) return THPVariable_Wrap(std::move(x));
  Py_RETURN_NONE;
}

PyObject* none_if_empty(const Maybe& x) { return none_if_empty(x.value_or(Tensor())); }

template <class... Tensors>
PyObject* tuple(Tensors... tensors) {
  PyObject* const found = PyTuple_New(sizeof...(tensors));
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(found, i++, none_if_empty(std::move(tensors))), ...);
  return found;
}

PyObject* list(const Numbers& numbers) {
  PyObject* const found = PyList_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t i = 0; i < numbers.size(); ++i) PyList_SET_ITEM(found, i, PyFloat_FromDouble(numbers.get(i)));
  return found;
}

Tensor differentiable(const Tensor& grad_loss, const Tensor& grad_td_error, const Saved& s, const Numbers& numbers) {
  const WithGil gil;
  PyObject* const type = reinterpret_cast<PyObject*>(torch::getTHPDtype(s.type));
  THPObjectPtr found(PyObject_CallFunction(
      recorded_backward, "NNNNNNNNLON", none_if_empty(grad_loss), none_if_empty(grad_td_error),
      none_if_empty(s.td_error), none_if_empty(s.actions), none_if_empty(s.weights), none_if_empty(s.normaliser),
      none_if_empty(s.q), none_if_empty(s.action_mask), static_cast<long long>(s.A), type, list(numbers)));
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

template <bool with_grad>
Outputs run(const Inputs& in, const Numbers& numbers) {
  const WithoutGil released;
  if (with_grad || !in.q.requires_grad() || !at::GradMode::is_enabled()) return forward(in, numbers, with_grad);
  return record(in, numbers, differentiable);
}

template <bool with_grad>
PyObject* call(PyObject*, PyObject* const* spec_and_batch, Py_ssize_t) {
  return none_if_refused([&]() -> PyObject* {
    PyObject* const* const given = PySequence_Fast_ITEMS(spec_and_batch[1]);
    Numbers numbers;
    if (!read(spec_and_batch[0], numbers) || !takes(given)) Py_RETURN_NONE;
    const Inputs in = read(given, true);
    if (PyErr_Occurred() != nullptr) {  // gamma does not fit a double
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    Outputs out = run<with_grad>(in, numbers);
    if constexpr (with_grad)
      return tuple(std::move(out.loss), std::move(out.grad_q), std::move(out.td_error), std::move(out.normaliser));
    return tuple(std::move(out.loss), std::move(out.td_error), std::move(out.normaliser));
  });
}

// (spec, batch, check) of a batch that is checked, on any device.
PyObject* record_checked(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Numbers numbers;
  PyObject* const* const batch = PySequence_Fast_ITEMS(given[1]);
  TORCH_CHECK_TYPE(read(given[0], numbers) && tensors(batch, THPVariable_Check), "expected what is checked");
  Outputs out = run<false>(read(batch, given[2] == Py_True), numbers);
  return tuple(std::move(out.loss), std::move(out.td_error), std::move(out.normaliser));
  END_HANDLE_TH_ERRORS
}

// (recorded_backward, FIELD_CODES, DEFAULTS).
PyObject* prepare(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO!O!", &recorded_backward, &PyTuple_Type, &codes, &PyTuple_Type, &defaults))
    return nullptr;
  if (PyTuple_GET_SIZE(codes) != static_cast<Py_ssize_t>(OPTIONS) ||
      PyTuple_GET_SIZE(defaults) != PyTuple_GET_SIZE(codes)) {
    PyErr_SetString(PyExc_ValueError, "expected the codes of as many options as csrc/td_loss.h has");
    return nullptr;
  }
  for (PyObject* x : {recorded_backward, codes, defaults}) Py_INCREF(x);  // for good
  Py_RETURN_NONE;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction method(Fast function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); }

PyMethodDef methods[] = {
    {"td_loss", method(call<false>), METH_FASTCALL, "(loss, td_error, normaliser), or None: see dqn_fused.node."},
    {"td_loss_and_grad", method(call<true>), METH_FASTCALL, "(loss, grad_q, td_error, normaliser), or None."},
    {"record", method(record_checked), METH_FASTCALL, "(loss, td_error, normaliser) of a checked batch."},
    {"prepare", prepare, METH_VARARGS, "What a backward calls that is itself recorded, and the codes of the options."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, methods};

}  // namespace
}  // namespace dqn_fused::autograd

PyMODINIT_FUNC PyInit__C_autograd() { return PyModule_Create(&dqn_fused::autograd::definition); }
