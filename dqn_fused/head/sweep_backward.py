"""Gradients of a layer through the softmax of its Q-values, whose tiles are multiplied again and used in the cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused import _ops
from dqn_fused.arguments import accumulation_dtype
from dqn_fused.checks import has_autocast
from dqn_fused.head.sweep import column_blocks, origin, row_blocks, tile

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class SweepBackward(NamedTuple):
    """The work of ``sweep_backward``: coefficients of each sample, in the accumulation dtype, and the gradients needed.

    The gradient of the Q-values is ``policy * exp(q - largest)``, plus ``taken`` at the action taken.
    """

    hidden: Tensor  # (n, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    mask: Tensor | None  # (n, A), true where an action is legal
    largest: Tensor  # (n,), of the legal Q-values
    policy: Tensor  # (n,), the upstream gradient divided by the sum of exp(q - largest)
    actions: Tensor  # (n,) int64; one outside of [0, A) has no part in the gradient
    taken: Tensor  # (n,)
    needs: tuple[bool, bool, bool]  # hidden, weight and bias


# Gradient of a tile of Q-values, (rows, columns), in hidden's dtype, and its sum over the rows, in the accumulation
# dtype, from the rows of hidden and of the weight.
TileGradient = Callable[[SweepBackward, Tensor, Tensor, slice, slice], tuple[Tensor, Tensor]]


def sweep_backward(work: SweepBackward) -> Gradients:
    """Gradients of hidden, (n, D), weight, (A, D), and bias, (A,), in their dtypes; None where none is needed.

    The gradient of a tile is rounded as nn.Linear's backward rounds that of the matrix. Products are added up in the
    accumulation dtype, in a fixed order. Each tile writes its own rows of the weight's gradient, so all are written.
    """
    if torch.compiler.is_compiling():
        return unpack(work.needs, *_ops.sweep_backward(*pack(work)))
    return sweep_backward_by(_tile_gradient, work)


def sweep_backward_by(tile_gradient: TileGradient, work: SweepBackward) -> Gradients:
    """sweep_backward with another function for the gradient of a tile."""
    with without_autocast(work.hidden.device):
        return _by_tiles(tile_gradient, work)


def _by_tiles(tile_gradient: TileGradient, work: SweepBackward) -> Gradients:
    hidden, weight, bias, needs = work.hidden, work.weight, work.bias, work.needs
    dtype, (n, D), A = accumulation_dtype(hidden), hidden.shape, weight.shape[0]
    grad_hidden = hidden.new_zeros((n, D), dtype=dtype) if needs[0] else None
    grad_weight = torch.empty((A, D), dtype=weight.dtype, device=weight.device) if needs[1] else None
    grad_bias = None if bias is None or not needs[2] else bias.new_empty(A)
    rows_at_once = list(row_blocks(n))
    for columns in column_blocks(hidden[rows_at_once[0]], A):
        w = weight[columns].to(hidden.dtype)
        of_weight, of_bias = None, hidden.new_zeros(columns.stop - columns.start, dtype=dtype)
        if grad_weight is not None:
            of_weight = grad_weight[columns]
            if weight.dtype is not dtype:
                of_weight = torch.empty_like(of_weight, dtype=dtype)
        for rows in rows_at_once:
            h = hidden[rows]
            grad, sums = tile_gradient(work, h, w, rows, columns)
            of_bias += sums
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], grad, w)
            if of_weight is not None:
                _add_product(of_weight, grad.T, h, first=rows.start == 0)
        if grad_weight is not None and of_weight is not None and of_weight.dtype is not grad_weight.dtype:
            grad_weight[columns] = of_weight
        if grad_bias is not None:
            grad_bias[columns] = of_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _tile_gradient(work: SweepBackward, h: Tensor, w: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    q = tile(h, w, work.bias, None if work.mask is None else work.mask[rows], columns).to(accumulation_dtype(h))
    shift, policy = origin(work.largest[rows]).unsqueeze(1), work.policy[rows].unsqueeze(1)
    grad = q.sub_(shift).exp_().mul_(policy)  # in its place
    column = (work.actions[rows] - columns.start).unsqueeze(1)
    inside = (column >= 0) & (column < columns.stop - columns.start)
    column = column.clamp(0, columns.stop - columns.start - 1)
    # One action a row: no two of them are the same element.
    grad.scatter_(1, column, grad.gather(1, column) + torch.where(inside, work.taken[rows].unsqueeze(1), 0))
    return grad.to(h.dtype), grad.sum(0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, or total = a @ b the first time; the product is rounded to the dtype of its factors."""
    if total.dtype is a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)  # with beta=0, NaN in total is ignored
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, if it is on: a backward that is called under it multiplies in the dtypes of its factors."""
    if has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def pack(work: SweepBackward) -> tuple[object, ...]:
    """Arguments of an op."""
    return *work[:-1], list(work.needs)


def unpack(needs: tuple[bool, bool, bool], *grads: Tensor) -> Gradients:
    """Gradients from the outputs of an op, where (0,) stands for None."""
    hidden, weight, bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return hidden, weight, bias


def run_packed(
    run: Callable[[SweepBackward], Gradients],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    largest: Tensor,
    policy: Tensor,
    actions: Tensor,
    taken: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an op on arguments from pack."""
    for_hidden, for_weight, for_bias = needs
    grads = run(
        SweepBackward(
            hidden, weight, bias, mask, largest, policy, actions, taken, (for_hidden, for_weight, for_bias)
        )
    )  # fmt: skip
    a, b, c = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return a, b, c


torch.library.impl("dqn_fused::sweep_backward", "CompositeExplicitAutograd", partial(run_packed, sweep_backward))
