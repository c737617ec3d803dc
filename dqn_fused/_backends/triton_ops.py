"""The Triton backend for torch.compile: ops that call it, which a graph holds whole.

A launch asks for addresses and devices, of which a trace has none. torch.library.triton_op and wrap_triton would show
the kernels to Inductor, but it launches them by its own rules: of the options of a launch it knows num_warps and
num_stages, and drops enable_fp_fusion=False without a word (torch 2.13), on which results rest; where a matrix begins
within 16 bytes, which the launch plan asks, a trace cannot say; and a plan made from symbolic sizes is a guard for each
power of two of the batch. A small problem, where a call of Python would cost, is left to PyTorch's operations instead
(see _backends.TRACED).
"""

from torch import Tensor
from torch.library import Library

from dqn_fused import _ops
from dqn_fused._backends import boxed
from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved
from dqn_fused.head import sweep_backward as backwards
from dqn_fused.head.sweep import Statistics, Sweep, pack, unpack
from dqn_fused.head.sweep_backward import Gradients, SweepBackward

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
    return unpack(work.kind, *_ops.triton_sweep(*work, auto))


def sweep_backward(work: SweepBackward, auto: bool) -> Gradients:
    """Return gradients of hidden, weight and bias."""
    return backwards.unpack(work.needs, *_ops.triton_sweep_backward(*backwards.pack(work), auto))


def _forward(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    from dqn_fused._backends import triton_backend  # which imports this module

    batch, spec = boxed.unpack(*given)  # type: ignore[arg-type]
    loss, td_error, normaliser = triton_backend.forward(batch, spec)
    return loss, td_error, td_error.new_empty(0) if normaliser is None else normaliser


def _loss_and_grad(*given: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dqn_fused._backends import triton_backend

    batch, spec = boxed.unpack(*given)  # type: ignore[arg-type]
    loss, grad_q, td_error, normaliser = triton_backend.loss_and_grad(batch, spec)
    return loss, grad_q, td_error, td_error.new_empty(0) if normaliser is None else normaliser


def _backward(grad_loss: Tensor, *given: object) -> Tensor:
    from dqn_fused._backends import triton_backend

    saved, spec = boxed.unpack_backward(*given)  # type: ignore[arg-type]
    return triton_backend.backward(grad_loss, saved, spec)


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    temperature: float,
    auto: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from dqn_fused._backends import triton_sweep

    run = triton_sweep.auto_sweep if auto else triton_sweep.sweep
    return pack(run(Sweep(hidden, weight, bias, mask, kind, temperature)))


def _sweep_backward(*given: object) -> tuple[Tensor, Tensor, Tensor]:
    from dqn_fused._backends import triton_sweep_backward

    *rest, auto = given
    run = triton_sweep_backward.auto_sweep_backward if auto else triton_sweep_backward.sweep_backward
    return backwards.run_packed(run, *rest)  # type: ignore[arg-type]


for _name, _call in {
    "triton_td_loss": _forward,
    "triton_td_loss_and_grad": _loss_and_grad,
    "triton_td_loss_backward": _backward,
    "triton_sweep": _sweep,
    "triton_sweep_backward": _sweep_backward,
}.items():
    _library.impl(_name, _call, "CompositeExplicitAutograd")
