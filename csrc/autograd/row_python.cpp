#include "row_python.h"

#include "row_node.h"

namespace dqn_fused::autograd::rows {
namespace {

// What Python hands over at the start: a function, and REDUCTIONS of dqn_fused/options.py.
PyObject *recorded_backward = nullptr, *reductions = nullptr;

using Kind = bool (*)(PyObject*);

// False for the weighted mean, of which Python makes a sum.
bool read_reduction(PyObject* name, int64_t& found) {
  PyObject* const code = PyDict_GetItem(reductions, name);
  if (code == nullptr) return false;
  found = PyLong_AsLongLong(code);
  return true;
}

// A QuantileSpec, or a CategoricalSpec.
bool read(PyObject* spec, Kind kind, Quantile& found) {
  PyObject* const taus = PyTuple_GET_ITEM(spec, 3);
  if (taus != Py_None && !kind(taus)) return false;
  found.taus = maybe(taus);
  found.kappa = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 0));
  found.mean = PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(spec, 1), "mean") == 0;
  return read_reduction(PyTuple_GET_ITEM(spec, 2), found.reduction);
}

bool read(PyObject* spec, Kind kind, Categorical& found) {
  PyObject* const support = PyTuple_GET_ITEM(spec, 0);
  if (PyTuple_CheckExact(support)) {
    found.v_min = PyFloat_AsDouble(PyTuple_GET_ITEM(support, 0));
    found.v_max = PyFloat_AsDouble(PyTuple_GET_ITEM(support, 1));
  } else {
    if (!kind(support)) return false;
    found.support = THPVariable_Unpack(support);
  }
  found.sigma = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 1));
  return read_reduction(PyTuple_GET_ITEM(spec, 2), found.reduction);
}

Tensor differentiable(const Tensor& grad_loss, const Tensor& grad_slopes, const SavedRows& s) {
  const WithGil gil;
  PyObject* const type = reinterpret_cast<PyObject*>(torch::getTHPDtype(s.type));
  return returned(THPObjectPtr(
      PyObject_CallFunction(recorded_backward, "NNNNNLOL", none_if_empty(grad_loss), none_if_empty(grad_slopes),
                            none_if_empty(s.slopes), none_if_empty(s.actions), none_if_empty(s.weights),
                            static_cast<long long>(s.A), type, static_cast<long long>(s.reduction))));
}

template <bool with_grad, class Options>
PyObject* run(const Inputs& in, const Options& options) {
  RowOutputs out;
  {
    const WithoutGil released;
    out = forward(in, options, with_grad);
    if (!with_grad && recorded(in)) record(in, out, options.reduction, differentiable);
  }
  if constexpr (with_grad) return tuple(std::move(out.loss), std::move(out.grad_q), std::move(out.values));
  return tuple(std::move(out.loss), std::move(out.values));
}

// (spec, batch).
template <class Options, bool with_grad>
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t) {
  return none_if_refused([&]() -> PyObject* {
    Options options;
    if (!read(given[0], ordinary, options)) Py_RETURN_NONE;
    const std::optional<Inputs> in = ordinary_batch(PySequence_Fast_ITEMS(given[1]));
    if (!in || in->q.dim() != 3) Py_RETURN_NONE;
    return run<with_grad>(*in, options);
  });
}

// (spec, batch, check) of a batch that is checked.
template <class Options>
PyObject* record_checked(PyObject*, PyObject* const* given, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Options options;
  PyObject* const* const batch = PySequence_Fast_ITEMS(given[1]);
  TORCH_CHECK_TYPE(read(given[0], THPVariable_Check, options) && tensors(batch, THPVariable_Check),
                   "expected what is checked");
  return run<false>(read_batch(batch, given[2] == Py_True), options);
  END_HANDLE_TH_ERRORS
}

// (recorded_backward, REDUCTIONS).
PyObject* prepare(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO!", &recorded_backward, &PyDict_Type, &reductions)) return nullptr;
  for (PyObject* x : {recorded_backward, reductions}) Py_INCREF(x);  // for good
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef methods[] = {
    {"quantile_loss", method(call<Quantile, false>), METH_FASTCALL, "(loss, td_error), or None: see dqn_fused.node."},
    {"quantile_loss_and_grad", method(call<Quantile, true>), METH_FASTCALL, "(loss, gradient, td_error), or None."},
    {"categorical_loss", method(call<Categorical, false>), METH_FASTCALL, "(loss, values), or None."},
    {"categorical_loss_and_grad", method(call<Categorical, true>), METH_FASTCALL, "(loss, gradient, values), or None."},
    {"record_quantile", method(record_checked<Quantile>), METH_FASTCALL, "(loss, td_error) of a checked batch."},
    {"record_categorical", method(record_checked<Categorical>), METH_FASTCALL, "(loss, values) of a checked batch."},
    {"prepare_rows", prepare, METH_VARARGS, "What a backward calls that is itself recorded, and the reductions."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace dqn_fused::autograd::rows
