"""The ops compiled from csrc/: a library for the CPU and one for CUDA, each of which may be missing."""

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from dqn_fused import _distributional_ops, _ops, node
from dqn_fused._backends import boxed
from dqn_fused._backends.boxed import backward_arguments, shaped, shaped_forward
from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.head.sweep import sweep
from dqn_fused.head.sweep_backward import sweep_backward
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.row_loss import SavedRows

__all__ = ["sweep", "sweep_backward"]

auto_sweep, auto_sweep_backward = sweep, sweep_backward  # the matrix products are PyTorch's
CAPABILITIES = ("default", "avx2", "avx512")  # instruction sets that the CPU's functions are compiled for
CHECKS_CPU = True  # on CUDA a look at the values would cost a synchronisation
COUNTS_MASK = False
NODE = True


def _load(device: str, folder: Path = Path(__file__).parents[1]) -> str | None:
    """Load a library; say why it cannot be loaded."""
    wanted = os.environ.get("DQN_FUSED_CPU_CAPABILITY")
    if device == "cpu" and wanted and wanted not in CAPABILITIES:
        return f"DQN_FUSED_CPU_CAPABILITY: expected one of {', '.join(CAPABILITIES)}, got {wanted!r}"
    path = folder / f"_C_{device}.so"
    how = f"in a source tree, DQN_FUSED_BUILD={device} pip install --no-build-isolation . builds it"
    if not path.exists():
        return f"not built for {device} ({how})"
    try:
        if device == "cuda":
            # import torch does not make these symbols global, and a library built with a CPU torch does not link them.
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(path)
    except OSError as error:
        return f"the {device} library does not fit torch {torch.__version__}: {error.__cause__ or error} ({how})"
    return None


_REASONS = {device: _load(device) for device in ("cpu", "cuda")}
PARTLY = "; ".join(reason for reason in _REASONS.values() if reason)
if not _REASONS["cpu"]:
    node.start()


def cpu_capability() -> str | None:
    """Instruction set in use on the CPU: the best, or what DQN_FUSED_CPU_CAPABILITY names; None without a library."""
    if _REASONS["cpu"]:
        return None
    ask = ctypes.CDLL(str(Path(__file__).parents[1] / "_C_cpu.so")).dqn_fused_cpu_capability
    ask.restype = ctypes.c_char_p
    return ask().decode()


def unavailable() -> str | None:
    """Say why neither library can be used."""
    return PARTLY if all(_REASONS.values()) else None


def refuses(device: torch.device) -> str | None:
    """Serve the devices whose library is loaded."""
    return _REASONS.get(device.type, f"expected tensors on cpu or cuda, got {device}")


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser)."""
    loss, td_error, normaliser = _ops.td_loss(*_arguments(batch, spec))
    return shaped_forward(loss, td_error, normaliser, batch, spec)


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q."""
    grad_q = _ops.td_loss_backward(*backward_arguments(grad_loss, saved, spec))
    return grad_q if len(saved.q_shape) == 2 else shaped(grad_q, saved.q_shape)


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser)."""
    loss, grad_q, td_error, normaliser = _ops.td_loss_and_grad(*_arguments(batch, spec))
    loss, td_error, normaliser = shaped_forward(loss, td_error, normaliser, batch, spec)
    if len(batch.shape) != 1:
        grad_q = shaped(grad_q, (*batch.shape, grad_q.shape[-1]))
    return loss, grad_q, td_error, normaliser


def _arguments(batch: Batch, spec: LossSpec) -> tuple[object, ...]:
    if len(batch.shape) == 1:
        # With more leading dimensions some matrices may merge them and others not, so the op takes both.
        for x in (batch.next_q_online, batch.next_action_mask, batch.target_q, batch.action_mask):
            if x is not None and x.dim() != 2:
                raise RuntimeError(f"expected matrices of two dimensions, as q, got {x.dim()}")
    return boxed.arguments(batch, spec)


def quantile_loss(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, td_error, slopes)."""
    loss, td_error, slopes = _distributional_ops.quantile_loss(*boxed.quantile_arguments(batch, spec))
    return *boxed.shaped_values(loss, td_error, batch, spec.reduction), slopes


def quantile_loss_and_grad(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, td_error)."""
    loss, grad, td_error = _distributional_ops.quantile_loss_and_grad(*boxed.quantile_arguments(batch, spec))
    loss, td_error = boxed.shaped_values(loss, td_error, batch, spec.reduction)
    return loss, grad if len(batch.shape) == 1 else shaped(grad, (*batch.shape, *grad.shape[1:])), td_error


def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes)."""
    loss, values, slopes = _distributional_ops.categorical_loss(*boxed.categorical_arguments(batch, spec))
    return *boxed.shaped_values(loss, values, batch, spec.reduction), slopes


def categorical_loss_and_grad(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, values)."""
    loss, grad, values = _distributional_ops.categorical_loss_and_grad(*boxed.categorical_arguments(batch, spec))
    loss, values = boxed.shaped_values(loss, values, batch, spec.reduction)
    return loss, grad if len(batch.shape) == 1 else shaped(grad, (*batch.shape, *grad.shape[1:])), values


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss."""
    return shaped(_distributional_ops.rows_backward(grad_loss, *boxed.rows_arguments(saved)), saved.shape)
