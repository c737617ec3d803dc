"""Rows of a matrix taken by index, and added up by index in a fixed order: each is the other's derivative."""

from typing import Any

import torch
from torch import Tensor

from dqn_fused import _ops
from dqn_fused.arguments import accumulation_dtype


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, (n, D). The derivative is add_rows, because that of index_select uses atomic additions on a GPU."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        taken: Tensor = TakeRows.apply(x, index)
        return taken
    return x.index_select(0, index)


def add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
    """Sums of the rows of values by their index, (A, D), in a fixed order; differentiable any number of times."""
    if torch.compiler.is_compiling():
        return _ops.add_rows(values, index, A, dtype)
    if torch.is_grad_enabled():
        total: Tensor = AddRows.apply(values, index, A, dtype)
        return total
    return _sum_rows(values, index, A, dtype)


class TakeRows(torch.autograd.Function):
    """take_rows, recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """Gather rows."""
        ctx.save_for_backward(index)
        ctx.about = x.shape[0], x.dtype
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum of the gradients of each row, in the accumulation dtype."""
        (index,) = ctx.saved_tensors
        (grad,) = grads
        A, dtype = ctx.about
        return add_rows(grad.to(accumulation_dtype(grad)), index, A, dtype), None


class AddRows(torch.autograd.Function):
    """add_rows, recorded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
        """Add up rows."""
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return _sum_rows(values, index, A, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the row that each was added to."""
        (index,) = ctx.saved_tensors
        (grad,) = grads
        return take_rows(grad, index).to(ctx.dtype), None, None, None


def _sum_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
    """add_rows. Sums are kept in the dtype of values, and rounded once where ``dtype`` is narrower.

    The number of different indices is not computed, since that would synchronise.
    """
    if dtype is values.dtype:
        return torch.ops.aten.embedding_dense_backward(values, index, A, -1, False)
    order = index.argsort(stable=True)
    index = index[order]
    segment = torch.cat([index.new_zeros(1), (index[1:] != index[:-1]).cumsum(0)])[: index.shape[0]]
    sums = torch.ops.aten.embedding_dense_backward(values[order], segment, max(index.shape[0], 1), -1, False)
    total = torch.zeros((A, values.shape[1]), dtype=dtype, device=values.device)
    # An index that occurs several times is written several times, with the same sum.
    return total.index_copy_(0, index, sums.to(dtype)[segment])


torch.library.impl("dqn_fused::add_rows", "CompositeExplicitAutograd", _sum_rows)
