"""The value of the action taken: one dot product a sample, and a gradient for one row of the weight."""

from typing import Any

import torch
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype
from dqn_fused.head.rows import add_rows, take_rows
from dqn_fused.reference import legal_actions


def taken_values(hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor) -> Tensor:
    """Q-values of one action a row, (n,): dot products in the accumulation dtype."""
    dtype = accumulation_dtype(hidden)
    value = (hidden.to(dtype) * weight.index_select(0, actions).to(dtype)).sum(-1)
    return value if bias is None else value + bias.index_select(0, actions).to(dtype)


class TakenValues(torch.autograd.Function):
    """taken_values, NaN where the action is illegal, with gradients for hidden, weight and bias.

    The rows of the weight's gradient are added up in a fixed order, in the accumulation dtype, where several samples
    took the same action. A backward that is itself recorded is written in differentiable operations.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, sparse: bool) -> Tensor:
        """Gather the rows and multiply."""
        index, legal = legal_actions(actions, weight.shape[0])
        ctx.save_for_backward(hidden, weight, actions)
        ctx.bias_dtype, ctx.sparse = None if bias is None else bias.dtype, sparse
        value = taken_values(hidden, weight, bias, index)
        return value if legal is None else torch.where(legal, value, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of hidden, (n, D), of weight, (A, D), and of bias, (A,)."""
        hidden, weight, actions = ctx.saved_tensors
        (grad,) = grads
        A = weight.shape[0]
        index, legal = legal_actions(actions, A)
        if legal is not None:
            grad = torch.where(legal, grad, 0)
        grad = grad.unsqueeze(1)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad * take_rows(weight, index).to(grad.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _add_rows(grad * hidden.to(grad.dtype), index, A, weight.dtype, ctx.sparse)
        if ctx.needs_input_grad[2]:
            grad_bias = _add_rows(grad, index, A, ctx.bias_dtype, ctx.sparse, column=True)
        return grad_hidden, grad_weight, grad_bias, None, None


def _add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype, sparse: bool, column: bool = False) -> Tensor:
    """Rows added up by their index, (A, D), or (A,) of a column; equal indices in the order of the samples."""
    if sparse:
        values = (values.squeeze(1) if column else values).to(dtype)
        return torch.sparse_coo_tensor(index.unsqueeze(0), values, (A, *values.shape[1:]), check_invariants=False)
    total = add_rows(values, index, A, dtype)
    return total.squeeze(1) if column else total
