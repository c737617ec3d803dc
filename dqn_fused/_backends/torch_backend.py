"""Plain PyTorch: every device, no compiler. The formulas are the reference's."""

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved, loss_gradient
from dqn_fused.head import sweep
from dqn_fused.reference import loss_of_td_error, normaliser_of, td_error

__all__ = ["sweep"]

auto_sweep = sweep
CHECKS_CPU = False
COUNTS_MASK = False
NODE = False
PARTLY = ""


def unavailable() -> str | None:
    """Available everywhere."""
    return None


def refuses(device: torch.device) -> str | None:
    """Serve every device."""
    return None


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser)."""
    td = td_error(batch, spec)
    normaliser = normaliser_of(batch) if spec.cql else None
    return loss_of_td_error(td, normaliser, batch, spec), td, normaliser


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q."""
    return loss_gradient(grad_loss, saved, spec)


@torch.no_grad()
def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser): forward and backward, one after the other."""
    loss, td, normaliser = forward(batch, spec)
    saved = Saved.of(batch, spec, td, normaliser)
    return loss, backward(torch.ones((), dtype=td.dtype, device=td.device), saved, spec), td, normaliser
