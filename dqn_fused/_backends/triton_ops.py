"""The Triton backend for torch.compile: ops that call it, which a graph holds whole.

A launch asks for addresses and devices, of which a trace has none. torch.library.triton_op and wrap_triton would show
the kernels to Inductor, but it launches them by its own rules: of the options of a launch it knows num_warps and
num_stages, and silently drops enable_fp_fusion=False (torch 2.13), on which results depend; a trace cannot say where a
matrix begins within 16 bytes, which the launch plan needs; and a plan made from symbolic sizes is a guard for each
power of two of the batch. A small problem, for which a call of Python is expensive, is left to PyTorch's operations
(see _backends.TRACED).
"""

from typing import Any

from torch import Tensor
from torch.library import Library

from dqn_fused import _distributional_ops, _ops
from dqn_fused._backends import (
    boxed,
    triton_categorical,
    triton_quantile,
    triton_rows,
    triton_sweep,
    triton_sweep_backward,
    triton_td_loss,
)
from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.head import sweep_backward as backwards
from dqn_fused.head.sweep import Statistics, Sweep, pack, unpack
from dqn_fused.head.sweep_backward import Gradients, SweepBackward
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.row_loss import SavedRows

_library = Library("dqn_fused", "IMPL")


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser)."""
    loss, td_error, normaliser = _ops.triton_td_loss(*boxed.arguments(batch, spec))
    return boxed.shaped_forward(loss, td_error, normaliser, batch, spec)


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q."""
    return boxed.shaped(_ops.triton_td_loss_backward(*boxed.backward_arguments(grad_loss, saved, spec)), saved.q_shape)


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser)."""
    loss, grad_q, td_error, normaliser = _ops.triton_td_loss_and_grad(*boxed.arguments(batch, spec))
    loss, td_error, normaliser = boxed.shaped_forward(loss, td_error, normaliser, batch, spec)
    return loss, boxed.shaped(grad_q, (*batch.shape, grad_q.shape[-1])), td_error, normaliser


def sweep(work: Sweep, auto: bool) -> Statistics:
    """Return statistics of all actions."""
    return unpack(work, *_ops.triton_sweep(*work, auto))


def sweep_backward(work: SweepBackward, auto: bool) -> Gradients:
    """Return gradients of hidden, weight and bias."""
    return backwards.unpack(work.needs, *_ops.triton_sweep_backward(*backwards.pack(work), auto))


def quantile_loss(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, td_error, slopes)."""
    loss, td_error, slopes = _distributional_ops.triton_quantile_loss(*boxed.quantile_arguments(batch, spec))
    return *boxed.shaped_values(loss, td_error, batch, spec.reduction), slopes


def quantile_loss_and_grad(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, td_error)."""
    given = boxed.quantile_arguments(batch, spec)
    loss, gradient, td_error = _distributional_ops.triton_quantile_loss_and_grad(*given)
    loss, td_error = boxed.shaped_values(loss, td_error, batch, spec.reduction)
    return loss, boxed.shaped(gradient, (*batch.shape, *gradient.shape[1:])), td_error


def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes)."""
    loss, values, slopes = _distributional_ops.triton_categorical_loss(*boxed.categorical_arguments(batch, spec))
    return *boxed.shaped_values(loss, values, batch, spec.reduction), slopes


def categorical_loss_and_grad(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, values)."""
    given = boxed.categorical_arguments(batch, spec)
    loss, gradient, values = _distributional_ops.triton_categorical_loss_and_grad(*given)
    loss, values = boxed.shaped_values(loss, values, batch, spec.reduction)
    return loss, boxed.shaped(gradient, (*batch.shape, *gradient.shape[1:])), values


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss."""
    return boxed.shaped(_distributional_ops.triton_rows_backward(grad_loss, *boxed.rows_arguments(saved)), saved.shape)


def _forward(*given: object) -> tuple[Tensor, Tensor, Tensor | None]:
    return triton_td_loss.forward(*boxed.unpack(*given))


def _loss_and_grad(*given: object) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return triton_td_loss.loss_and_grad(*boxed.unpack(*given))


def _backward(grad_loss: Tensor, *given: object) -> Tensor:
    return triton_td_loss.backward(grad_loss, *boxed.unpack_backward(*given))


def _sweep(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *work, auto = given
    run = triton_sweep.auto_sweep if auto else triton_sweep.sweep
    return pack(run(Sweep(*work)))


def _sweep_backward(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    *rest, auto = given
    run = triton_sweep_backward.auto_sweep_backward if auto else triton_sweep_backward.sweep_backward
    return backwards.run_packed(run, *rest)  # type: ignore[arg-type]


def _quantile_loss(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    return triton_quantile.quantile_loss(*boxed.unpack_quantile(*given))


def _quantile_loss_and_grad(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    return triton_quantile.quantile_loss_and_grad(*boxed.unpack_quantile(*given))


def _categorical_loss(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    return triton_categorical.categorical_loss(*boxed.unpack_categorical(*given))


def _categorical_loss_and_grad(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    return triton_categorical.categorical_loss_and_grad(*boxed.unpack_categorical(*given))


def _rows_backward(grad_loss: Tensor, *given: object) -> Tensor:
    return triton_rows.rows_backward(grad_loss, boxed.unpack_rows(*given))  # type: ignore[arg-type]


for _name, _call in {
    "triton_td_loss": _forward,
    "triton_td_loss_and_grad": _loss_and_grad,
    "triton_td_loss_backward": _backward,
    "triton_sweep": _sweep,
    "triton_sweep_backward": _sweep_backward,
    "triton_quantile_loss": _quantile_loss,
    "triton_quantile_loss_and_grad": _quantile_loss_and_grad,
    "triton_categorical_loss": _categorical_loss,
    "triton_categorical_loss_and_grad": _categorical_loss_and_grad,
    "triton_rows_backward": _rows_backward,
}.items():
    _library.impl(_name, _call, "CompositeExplicitAutograd")
