"""The autograd.Function of the distributional losses: in (n, A, K) only the row of the action taken has a gradient."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dqn_fused.arguments import Batch
from dqn_fused.autograd import inside_transform, refuse_forward_mode
from dqn_fused.reference import legal_actions


class SavedRows(NamedTuple):
    """What a backward needs."""

    slopes: Tensor  # (n, K): the derivative of each sample's loss by the row of its action, in the accumulation dtype
    actions: Tensor  # (n,)
    weights: Tensor | None  # (n,)
    shape: torch.Size  # of the input, (*N, A, K)
    dtype: torch.dtype  # of the input
    reduction: str  # "mean", "sum" or "none"

    @classmethod
    def of(cls, batch: Batch, slopes: Tensor, reduction: str) -> "SavedRows":
        """What a backward needs, taken right after the forward of a batch."""
        shape = torch.Size((*batch.shape, *batch.q.shape[1:]))
        return cls(slopes, batch.saved_actions(), batch.weights, shape, batch.q.dtype, reduction)


# A backend's forward: (loss, td_error, slopes) of a checked batch.
Forward = Callable[[], tuple[Tensor, Tensor, Tensor]]


def row_loss(x: Tensor, batch: Batch, reduction: str, backend: ModuleType, forward: Forward) -> tuple[Tensor, Tensor]:
    """Run a backend's forward, through RowLoss if x needs a gradient: the user's tensor, whose rows batch.q holds."""
    forward_mode = forward_ad._current_level >= 0
    if forward_mode and torch.compiler.is_compiling():
        refuse_forward_mode()
    if (x.requires_grad and torch.is_grad_enabled()) or forward_mode:
        loss, td_error, _ = RowLoss.apply(x, batch, reduction, backend, forward)
    else:
        loss, td_error, _ = forward()
    return loss, td_error


class RowLoss(torch.autograd.Function):
    """(loss, td_error, slopes) of a batch; only x receives a gradient, through the loss.

    slopes is an output so that a second derivative, which would need more than was saved, leads back here and raises.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, batch: Batch, reduction: str, backend: ModuleType, forward: Forward
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend's forward; save (n, K) slopes and (n,) values."""
        loss, td_error, slopes = forward()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(td_error)
        ctx.about = x.shape, x.dtype, reduction, backend
        given = () if batch.weights is None else (batch.weights,)
        ctx.save_for_backward(slopes, batch.saved_actions(), *given)
        return loss, td_error, slopes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        """Dense gradient of x: zero except in the row of the action taken."""
        grad_loss, _, grad_slopes = grads
        slopes, actions, *given = ctx.saved_tensors
        shape, dtype, reduction, backend = ctx.about
        saved = SavedRows(slopes, actions, given[0] if given else None, shape, dtype, reduction)
        if torch.compiler.is_compiling():  # grad mode is on, grad_slopes zeros; PyTorch refuses a second order there
            return backend.rows_backward(grad_loss, saved), None, None, None, None
        if grad_slopes is not None or torch.is_grad_enabled() or inside_transform():
            return differentiable_backward(grad_loss, grad_slopes, saved), None, None, None, None
        if grad_loss is None:
            return None, None, None, None, None
        return backend.rows_backward(grad_loss.contiguous(), saved), None, None, None, None


def differentiable_backward(grad_loss: Tensor | None, grad_slopes: Tensor | None, saved: SavedRows) -> Tensor | None:
    """Gradient of x, by what comes upstream of the loss, in operations that can be differentiated once."""
    if grad_slopes is not None:
        raise NotImplementedError(
            "the second derivative of a distributional loss is not implemented; that of its reference is, such as "
            "dqn_fused.quantile_reference.quantile_loss"
        )
    return None if grad_loss is None else rows_gradient(grad_loss, saved)


def rows_gradient(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Gradient of the reduced loss by x, of x's shape and dtype, in operations that can be differentiated."""
    slopes, actions, weights, shape, dtype, reduction = saved
    n, (*_, A, K) = slopes.shape[0], shape
    scale = grad_loss.reshape(-1) / max(n, 1) if reduction == "mean" else grad_loss.reshape(-1)  # (n,) or (1,)
    if weights is not None:
        scale = scale * weights.detach().reshape(-1).to(slopes.dtype)  # they are (n, 1) if an op has checked them
    rows = slopes * scale.unsqueeze(1)
    index, legal = legal_actions(actions.reshape(-1), A)
    if legal is not None:
        rows = torch.where(legal.unsqueeze(1), rows, 0)
    zeros = rows.new_zeros((n, A, K), dtype=dtype)
    index = index.view(-1, 1, 1).expand(-1, 1, K)
    return zeros.scatter_(1, index, rows.to(dtype).unsqueeze(1)).view(shape)
