"""Plain PyTorch: every device, no compiler. The formulas are the reference's."""

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.autograd import Saved, loss_gradient
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.categorical_reference import atoms, cross_entropy, slopes_of, target_distribution, values_of
from dqn_fused.distributional import taken
from dqn_fused.head.sweep import sweep
from dqn_fused.head.sweep_backward import sweep_backward
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.quantile_reference import loss_of_pairs, slopes_of_pairs, target_quantiles
from dqn_fused.quantile_reference import td_error as quantile_td_error
from dqn_fused.reference import loss_of_td_error, normaliser_of, reduced, td_error
from dqn_fused.row_loss import SavedRows, rows_gradient

__all__ = ["sweep", "sweep_backward"]

auto_sweep, auto_sweep_backward = sweep, sweep_backward
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


@torch.no_grad()
def quantile_loss(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, td_error, slopes)."""
    predicted, target = taken(batch), target_quantiles(batch)
    loss = reduced(loss_of_pairs(predicted, target, spec), batch, spec.reduction)
    return loss, quantile_td_error(predicted, target, batch), slopes_of_pairs(predicted, target, spec)


@torch.no_grad()
def quantile_loss_and_grad(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, td_error)."""
    loss, td, slopes = quantile_loss(batch, spec)
    return (
        loss,
        rows_backward(torch.ones((), dtype=td.dtype, device=td.device), SavedRows.of(batch, slopes, spec.reduction)),
        td,
    )


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss."""
    return rows_gradient(grad_loss, saved)


@torch.no_grad()
def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes)."""
    logits, support = taken(batch), atoms(batch, spec)
    target = target_distribution(batch, spec, support)
    loss = reduced(cross_entropy(logits, target), batch, spec.reduction)
    return loss, values_of(logits, target, support, batch), slopes_of(logits, target)


@torch.no_grad()
def categorical_loss_and_grad(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, values)."""
    loss, values, slopes = categorical_loss(batch, spec)
    upstream = torch.ones((), dtype=slopes.dtype, device=slopes.device)
    return loss, rows_backward(upstream, SavedRows.of(batch, slopes, spec.reduction)), values
