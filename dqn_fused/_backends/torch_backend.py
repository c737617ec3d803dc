"""Plain PyTorch: every device, no compiler. The formulas are the reference's."""

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import scatter_taken, td_loss_coefficient
from dqn_fused.reference import loss_of_td_error, td_error

CHECKS_CPU = False
PARTLY = ""


def unavailable() -> str | None:
    """Available everywhere."""
    return None


def refuses(device: torch.device) -> str | None:
    """Serve every device."""
    return None


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return (loss, td_error)."""
    td = td_error(batch)
    return loss_of_td_error(td, spec), td


def backward(
    grad_loss: Tensor, td_error: Tensor, actions: Tensor, q_shape: torch.Size, q_dtype: torch.dtype, spec: LossSpec
) -> Tensor:
    """Return grad_q."""
    return scatter_taken(td_loss_coefficient(grad_loss, td_error, spec), actions, q_shape, q_dtype)


@torch.no_grad()
def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, grad_q, td_error): forward and backward, one after the other."""
    loss, td = forward(batch, spec)
    one = torch.ones((), dtype=td.dtype, device=td.device)
    return (
        loss,
        backward(one, td, batch.actions, torch.Size((*batch.shape, batch.q.shape[-1])), batch.q.dtype, spec),
        td,
    )
