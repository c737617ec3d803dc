// The module _C_autograd: calls of the compiled ops with the gradient recorded by a node in C++.

#include "python.h"

#include "node.h"
#include "row_python.h"

namespace dqn_fused::autograd {
namespace {

// What Python hands over at the start: a function, and FIELD_CODES of dqn_fused/options.py.
PyObject *recorded_backward = nullptr, *codes = nullptr;

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
    numbers = std::move(fresh);  // another list: a node may hold the one before
    Py_INCREF(spec);
    Py_XDECREF(std::exchange(last, spec));
  }
  found = numbers;
  return true;
}

bool matrices(PyObject* const* given) {
  for (const Argument i : {Q, NEXT_Q, NEXT_Q_ONLINE, NEXT_ACTION_MASK, TARGET_Q, ACTION_MASK})
    if (given[i] != Py_None && THPVariable_Unpack(given[i]).dim() != 2) return false;
  return true;
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
  return returned(std::move(found));
}

template <bool with_grad>
Outputs run(const Inputs& in, const Numbers& numbers) {
  const WithoutGil released;
  if (with_grad || !recorded(in)) return forward(in, numbers, with_grad);
  return record(in, numbers, differentiable);
}

template <bool with_grad>
PyObject* call(PyObject*, PyObject* const* spec_and_batch, Py_ssize_t) {
  return none_if_refused([&]() -> PyObject* {
    PyObject* const* const given = PySequence_Fast_ITEMS(spec_and_batch[1]);
    Numbers numbers;
    if (!read(spec_and_batch[0], numbers)) Py_RETURN_NONE;
    const std::optional<Inputs> in = ordinary_batch(given);
    if (!in || !matrices(given)) Py_RETURN_NONE;
    Outputs out = run<with_grad>(*in, numbers);
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
  Outputs out = run<false>(read_batch(batch, given[2] == Py_True), numbers);
  return tuple(std::move(out.loss), std::move(out.td_error), std::move(out.normaliser));
  END_HANDLE_TH_ERRORS
}

// (recorded_backward, FIELD_CODES).
PyObject* prepare(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO!", &recorded_backward, &PyTuple_Type, &codes)) return nullptr;
  if (PyTuple_GET_SIZE(codes) != static_cast<Py_ssize_t>(OPTIONS)) {
    PyErr_SetString(PyExc_ValueError, "expected the codes of as many options as csrc/td_loss.h has");
    return nullptr;
  }
  for (PyObject* x : {recorded_backward, codes}) Py_INCREF(x);  // for good
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"td_loss", method(call<false>), METH_FASTCALL, "(loss, td_error, normaliser), or None: see dqn_fused.node."},
    {"td_loss_and_grad", method(call<true>), METH_FASTCALL, "(loss, grad_q, td_error, normaliser), or None."},
    {"record", method(record_checked), METH_FASTCALL, "(loss, td_error, normaliser) of a checked batch."},
    {"prepare", prepare, METH_VARARGS, "What a backward calls that is itself recorded, and the codes of the options."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, methods};

}  // namespace
}  // namespace dqn_fused::autograd

PyMODINIT_FUNC PyInit__C_autograd() {
  PyObject* const module = PyModule_Create(&dqn_fused::autograd::definition);
  if (module != nullptr && PyModule_AddFunctions(module, dqn_fused::autograd::rows::methods) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
