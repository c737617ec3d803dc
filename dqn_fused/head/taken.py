"""The value of the action taken: one dot product per sample, whose gradient goes to one row of the weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype
from dqn_fused.head.rows import add_rows, take_rows
from dqn_fused.head.whole import WHOLE, Whole


def taken_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    shards: Whole = WHOLE,
    mask: Tensor | None = None,
) -> Tensor:
    """Q-values of one action per row, (n,): dot products in the accumulation dtype.

    NaN where the action is out of range, -inf where it is illegal by the mask, (n, A).
    """
    dtype = accumulation_dtype(hidden)
    index, here = shards.locate(actions, weight.shape[0])
    if weight.shape[0] == 0:
        weight, bias, mask = _with_a_row(weight), None, None
    value = (hidden.to(dtype) * weight.index_select(0, index).to(dtype)).sum(-1)
    value = value if bias is None else value + bias.index_select(0, index).to(dtype)
    if mask is not None:
        value = torch.where(mask.gather(1, index.unsqueeze(1)).squeeze(1), value, -torch.inf)
    return shards.select(value, here)


def _with_a_row(weight: Tensor) -> Tensor:
    """Give a rank without rows a row of zeros, which no action has, so that it takes part in the backward."""
    return weight if weight.shape[0] else F.pad(weight, (0, 0, 0, 1))


class TakenValues(torch.autograd.Function):
    """taken_values, with gradients for hidden, weight and bias.

    Where several samples took the same action, the rows of the weight's gradient are added up in a fixed order, in the
    accumulation dtype. The backward consists of differentiable operations.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, sparse: bool, shards: Whole
    ) -> Tensor:
        """Gather the rows and multiply."""
        ctx.save_for_backward(hidden, weight, actions)
        ctx.bias_dtype, ctx.sparse, ctx.shards = None if bias is None else bias.dtype, sparse, shards
        return taken_values(hidden, weight, bias, actions, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Gradients of hidden, (n, D), of weight, (A, D), and of bias, (A,)."""
        hidden, weight, actions = ctx.saved_tensors
        A = weight.shape[0]
        index, here = ctx.shards.locate(actions, A)
        grad = ctx.shards.enter(grads[0]).unsqueeze(1)

        def of_rows(values: Tensor, dtype: torch.dtype, column: bool = False) -> Tensor:
            values, rows = _selected(values, here), index
            if A == 0:
                values, rows = values[:0], rows[:0]
            elif ctx.sparse:
                values, rows = ctx.shards.present(here, values, rows)
            return _add_rows(values, rows, A, dtype, ctx.sparse, column)

        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            of_hidden = grad * take_rows(_with_a_row(weight), index).to(grad.dtype)
            grad_hidden = _selected(of_hidden, here).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = of_rows(grad * hidden.to(grad.dtype), weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = of_rows(grad, ctx.bias_dtype, column=True)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _selected(x: Tensor, here: Tensor | None) -> Tensor:
    """Rows of the samples whose action is here, and zeros: for others a product with any row may be inf or NaN."""
    return x if here is None else torch.where(here.unsqueeze(1), x, 0)


def _add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype, sparse: bool, column: bool = False) -> Tensor:
    """Rows added up by their index, (A, D), or (A,) for a column; equal indices in the order of the samples."""
    if sparse:
        values = (values.squeeze(1) if column else values).to(dtype)
        return torch.sparse_coo_tensor(index.unsqueeze(0), values, (A, *values.shape[1:]), check_invariants=False)
    total = add_rows(values, index, A, dtype)
    return total.squeeze(1) if column else total
