"""The Triton backend: where it runs, and its functions, as ops in a graph of torch.compile."""

from functools import cache

import torch
import triton
from torch import Tensor

from dqn_fused._backends import (
    capturing,
    triton_categorical,
    triton_launch,
    triton_ops,
    triton_quantile,
    triton_rows,
    triton_sweep,
    triton_sweep_backward,
    triton_td_loss,
)
from dqn_fused._backends.triton_program import OLDEST, VERSION
from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.head.sweep import Statistics, Sweep
from dqn_fused.head.sweep_backward import Gradients, SweepBackward
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.row_loss import SavedRows

_FAKE = torch._C._TorchDispatchModeKey.FAKE
CHECKS_CPU = False
COUNTS_MASK = True
NODE = False
PARTLY = ""


def unavailable() -> str | None:
    """Say why Triton cannot run here."""
    if VERSION < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if triton_launch.INTERPRETED:
        return None
    if torch.cuda.is_available():
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # of many types: no C compiler for its launcher, no Python headers, an old driver
            return f"triton's driver does not start: {error}"
        return refuses(torch.device("cuda", torch.cuda.current_device()))
    return "no CUDA or ROCm device (TRITON_INTERPRET=1, set before the first import, runs them on the CPU, slowly)"


def refuses(device: torch.device) -> str | None:
    """Serve CUDA tensors, and CPU tensors in the interpreter."""
    expected = "cpu" if triton_launch.INTERPRETED else "cuda"
    if device.type != expected:
        return f"expected tensors on {expected}, got {device}"
    return None if triton_launch.INTERPRETED else _fails(device)


def _fails(device: torch.device) -> str | None:
    """Say why no kernel can be compiled and launched there; not during a capture, where that would be recorded."""
    if not torch.cuda.is_available() or capturing():
        return None
    return _probe(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))


# Asked while torch.compile traces, not traced itself.
_fails._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _probe(device: torch.device) -> str | None:
    try:
        with triton_launch.on(device):
            loss, partial = torch.zeros((), device=device), torch.zeros(1, device=device)
            triton_launch.launch_sum(triton_launch.run, loss, partial, 1, torch.float32)
    except Exception as error:  # of many types: a device that this Triton does not know, no ptxas, a full disk
        return f"triton cannot run a kernel on {device}: {type(error).__name__}: {error}"
    return None


def _without_values() -> bool:
    """Whether there is nothing to launch on: torch.compile traces, or the tensors are fakes. Then an op is called."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser)."""
    return (triton_ops if _without_values() else triton_td_loss).forward(batch, spec)


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q."""
    return (triton_ops if _without_values() else triton_td_loss).backward(grad_loss, saved, spec)


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser)."""
    return (triton_ops if _without_values() else triton_td_loss).loss_and_grad(batch, spec)


def sweep(work: Sweep) -> Statistics:
    """As head.sweep.sweep."""
    return triton_ops.sweep(work, auto=False) if _without_values() else triton_sweep.sweep(work)


def auto_sweep(work: Sweep) -> Statistics:
    """As head.sweep.sweep, by the kernel where that pays."""
    return triton_ops.sweep(work, auto=True) if _without_values() else triton_sweep.auto_sweep(work)


def sweep_backward(work: SweepBackward) -> Gradients:
    """As head.sweep_backward.sweep_backward."""
    if _without_values():
        return triton_ops.sweep_backward(work, auto=False)
    return triton_sweep_backward.sweep_backward(work)


def auto_sweep_backward(work: SweepBackward) -> Gradients:
    """As head.sweep_backward.sweep_backward, by the kernel where the sweep was."""
    if _without_values():
        return triton_ops.sweep_backward(work, auto=True)
    return triton_sweep_backward.auto_sweep_backward(work)


def quantile_loss(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, td_error, slopes)."""
    return (triton_ops if _without_values() else triton_quantile).quantile_loss(batch, spec)


def quantile_loss_and_grad(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, td_error)."""
    return (triton_ops if _without_values() else triton_quantile).quantile_loss_and_grad(batch, spec)


def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes)."""
    return (triton_ops if _without_values() else triton_categorical).categorical_loss(batch, spec)


def categorical_loss_and_grad(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, values)."""
    return (triton_ops if _without_values() else triton_categorical).categorical_loss_and_grad(batch, spec)


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss."""
    return (triton_ops if _without_values() else triton_rows).rows_backward(grad_loss, saved)
