"""The ops compiled from csrc/: a library for the CPU and one for CUDA, either of which may be missing."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dqn_fused import arguments
from dqn_fused._ops import REDUCTIONS, td_loss, td_loss_and_grad, td_loss_backward
from dqn_fused.arguments import Batch, LossSpec

CHECKS_CPU = True  # on CUDA a look at the values would cost a synchronisation


def _load(device: str, folder: Path = Path(__file__).parents[1]) -> str | None:
    """Load a library; say why it cannot be."""
    path = folder / f"_C_{device}.so"
    how = f"in a source tree, DQN_FUSED_BUILD={device} pip install --no-build-isolation . builds it"
    if not path.exists():
        return f"not built for {device} ({how})"
    try:
        if device == "cuda":
            # import torch keeps these symbols to itself, and a library built beside a CPU torch does not ask for them.
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(path)
    except OSError as error:
        return f"the {device} library does not fit torch {torch.__version__}: {error.__cause__ or error} ({how})"
    return None


_REASONS = {device: _load(device) for device in ("cpu", "cuda")}
PARTLY = "; ".join(reason for reason in _REASONS.values() if reason)


def unavailable() -> str | None:
    """Say why neither library is there."""
    return PARTLY if all(_REASONS.values()) else None


def refuses(device: torch.device, spec: LossSpec) -> str | None:
    """Serve the devices whose library is loaded."""
    return _REASONS.get(device.type, f"expected tensors on cpu or cuda, got {device}")


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return (loss, td_error)."""
    loss, td_error = _call(td_loss, batch, spec)
    if len(batch.shape) == 1:  # 1 us of comparing shapes
        return loss, td_error
    return _shaped(loss, batch.shape if spec.reduction == "none" else loss.shape), _shaped(td_error, batch.shape)


def backward(
    grad_loss: Tensor, td_error: Tensor, actions: Tensor, q_shape: torch.Size, q_dtype: torch.dtype, spec: LossSpec
) -> Tensor:
    """Return grad_q."""
    grad_q = td_loss_backward(grad_loss, td_error, actions, q_shape[-1], q_dtype, REDUCTIONS[spec.reduction])
    return _shaped(grad_q, q_shape)


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, grad_q, td_error)."""
    loss, grad_q, td_error = _call(td_loss_and_grad, batch, spec)
    if len(batch.shape) == 1:
        return loss, grad_q, td_error
    loss = _shaped(loss, batch.shape if spec.reduction == "none" else loss.shape)
    return loss, _shaped(grad_q, (*batch.shape, grad_q.shape[-1])), _shaped(td_error, batch.shape)


def _shaped(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Give an op's result its leading dimensions; not as a view, which autograd would not let users change in place."""
    return x if x.shape == shape else torch.ops.aten._unsafe_view.default(x, shape)


def _call(op: torch._ops.OpOverload, batch: Batch, spec: LossSpec) -> tuple[Tensor, ...]:
    q, actions, rewards, next_q, terminated, gamma, non_final_mask, _ = batch
    gammas = None
    if isinstance(gamma, Tensor):
        gammas, gamma = gamma, 0.0
    look = arguments.looks_at_values(q.device)
    return op(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, REDUCTIONS[spec.reduction], look)
