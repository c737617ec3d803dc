"""Triton kernel: backward of the distributional losses, one dense store of the gradient, (n, A, K)."""

import triton
import triton.language as tl

from .flat import block_of_rows
from .samples import legal_action, sample_scale


@triton.jit
def row_taken(
    row, action, grad_loss, actions, weights, n, A, count,
    PER_ROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Whether a row of K values is that of the action taken, and the factor of its slopes."""
    inside = row < n
    taken = inside & (legal_action(tl.load(actions + row, mask=inside, other=-1), A) == action)
    scale = sample_scale(grad_loss, weights, row, taken, count, PER_ROW, ACC)
    return taken, tl.where(taken, scale, 0.0)


@triton.jit(do_not_specialize=["n", "A", "count"])
def rows_bwd_kernel(
    grad,  # (n, A, K), contiguous
    grad_loss, slopes, actions, weights,  # (), (n,) or None for ones, (n, K), (n,), (n,) or None
    n, A, K, count,
    PER_ROW: tl.constexpr, FAR: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One dense store over the gradient as a flat array of n * A rows of K elements: every store is aligned."""
    ACC: tl.constexpr = slopes.dtype.element_ty
    start, line, column, second, here = block_of_rows(K, FAR, RUN, BLOCK)
    row_a = line // A
    action_a = (line - row_a * A).to(tl.int32)
    last = action_a + 1 == A
    row_b = tl.where(last, row_a + 1, row_a)
    action_b = tl.where(last, 0, action_a + 1)
    taken_a, scale_a = row_taken(row_a, action_a, grad_loss, actions, weights, n, A, count, PER_ROW, ACC)
    taken_b, scale_b = row_taken(row_b, action_b, grad_loss, actions, weights, n, A, count, PER_ROW, ACC)

    taken = tl.where(second, taken_b[:, None], taken_a[:, None])
    row = tl.where(second, row_b[:, None], row_a[:, None])
    # In rows behind the last nothing is taken, so nothing is read.
    slope = tl.load(slopes + row.to(tl.int64) * K + column, mask=taken, other=0.0)
    value = tl.where(taken, slope * tl.where(second, scale_b[:, None], scale_a[:, None]), 0.0)

    size = n.to(tl.int64) * A * K
    # A mask for every element would split the 16-byte store.
    if start + BLOCK <= size:
        tl.store(grad + here, value.to(grad.dtype.element_ty))
    else:
        tl.store(grad + here, value.to(grad.dtype.element_ty), mask=here < size)
