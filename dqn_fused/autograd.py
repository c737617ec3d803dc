"""The one autograd.Function between the public functions and the backends."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec
from dqn_fused.reference import legal_actions


class TDLoss(torch.autograd.Function):
    """(loss, td_error) of a batch; only q receives a gradient.

    Both outputs are differentiable inside the graph. A plain backward runs the backend's kernel; a backward that is
    itself recorded (create_graph) is written in differentiable operations on the saved td_error, whose own derivative
    leads back here. So the second order is right, and q itself need not be saved.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, batch: Batch, spec: LossSpec, backend: ModuleType) -> tuple[Tensor, Tensor]:
        """Run the backend's forward; save (n,) values."""
        loss, td_error = backend.forward(batch, spec)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(td_error, batch.actions)
        ctx.q_shape, ctx.q_dtype, ctx.spec, ctx.backend = q.shape, q.dtype, spec, backend
        return loss, td_error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Dense gradient of q, zero but for the action taken in each row."""
        grad_loss, grad_td_error = grads
        td_error, actions = ctx.saved_tensors
        # Traced by torch.compile, grad mode is on and grad_td_error zeros; PyTorch refuses a second order there.
        recorded = torch.is_grad_enabled() or grad_td_error is not None
        if recorded and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_loss, grad_td_error, td_error, actions), None, None, None
        if grad_loss is None:
            return None, None, None, None
        grad_q = ctx.backend.backward(grad_loss.contiguous(), td_error, actions, ctx.q_shape, ctx.q_dtype, ctx.spec)
        return grad_q, None, None, None


def _differentiable_backward(
    ctx: Any, grad_loss: Tensor | None, grad_td_error: Tensor | None, td_error: Tensor, actions: Tensor
) -> Tensor | None:
    terms = [] if grad_td_error is None else [grad_td_error]
    if grad_loss is not None:
        terms.append(td_loss_coefficient(grad_loss, td_error, ctx.spec))
    if not terms:
        return None
    coefficient = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return scatter_taken(coefficient, actions, ctx.q_shape, ctx.q_dtype)


def td_loss_coefficient(grad_loss: Tensor, td_error: Tensor, spec: LossSpec) -> Tensor:
    """Derivative of the reduced loss by the Q-value of the action taken, N."""
    scale = 2.0 / max(td_error.numel(), 1) if spec.reduction == "mean" else 2.0
    return td_error * (grad_loss * scale)


def scatter_taken(coefficient: Tensor, actions: Tensor, q_shape: torch.Size, q_dtype: torch.dtype) -> Tensor:
    """Zeros of q's shape with the coefficient at each action taken; a row with an illegal action stays zero."""
    index, legal = legal_actions(actions, q_shape[-1])
    if legal is not None:
        coefficient = torch.where(legal.view(coefficient.shape), coefficient, 0)
    index = index.view(*q_shape[:-1], 1)
    value = coefficient.to(q_dtype).view(index.shape)
    # value's own zeros: inside vmap they are as batched as value is, and can be written in place.
    return value.new_zeros(q_shape).scatter_(-1, index, value)
