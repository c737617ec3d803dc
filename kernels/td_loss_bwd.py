"""Triton kernel: TD loss backward, one dense store of the gradient by q."""

import triton
import triton.language as tl

from .flat import block_of_rows
from .rows import load_legal, row_offset, scalar
from .samples import legal_action, sample_scale
from .td_loss import policy_gradient, td_loss_grad


@triton.jit
def row_gradient(
    row, grad_loss, td_error, actions, weights, normaliser, margin, pull, n, A, count,
    LOSS: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Action of each row, the gradient there, and scale and normaliser of the conservative term everywhere."""
    inside = row < n
    action = legal_action(tl.load(actions + row, mask=inside, other=-1), A)
    td = tl.load(td_error + row, mask=inside, other=0.0)
    scale = sample_scale(grad_loss, weights, row, inside, count, PER_ROW, ACC)
    largest = td
    rest = td
    if normaliser is not None:
        largest = tl.load(normaliser + row, mask=inside, other=0.0)
        rest = tl.load(normaliser + n.to(tl.int64) + row, mask=inside, other=0.0)
    everywhere = tl.where(inside, scale * pull, 0.0)
    return action, scale * (td_loss_grad(td, margin, LOSS) - pull), everywhere, largest, rest


@triton.jit(do_not_specialize=["n", "count", "q_inner", "mask_inner"])
def td_loss_bwd_kernel(
    grad_q,  # (n, A), contiguous
    grad_loss, td_error, actions, weights,  # (), (n,) or None for ones, (n,), (n,), (n,) or None
    normaliser, q, action_mask,  # (2, n), (n, A), (n, A) or None: None without the conservative term
    delta, cql_alpha,
    n, A, count,
    q_inner, q_stride_outer, q_stride_inner, q_stride_action,  # None where q is contiguous, too
    mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action,
    LOSS: tl.constexpr, PER_ROW: tl.constexpr, FAR: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One dense store over grad_q as a flat array of rows of A elements: every store is aligned."""
    ACC: tl.constexpr = td_error.dtype.element_ty
    margin = 0.0
    if LOSS != "mse":
        margin = scalar(delta, ACC)
    pull = 0.0
    if cql_alpha is not None:
        pull = scalar(cql_alpha, ACC)
    start, row, column, second, here = block_of_rows(A, FAR, RUN, BLOCK)
    a, taken_a, scale_a, largest_a, rest_a = row_gradient(
        row, grad_loss, td_error, actions, weights, normaliser, margin, pull, n, A, count, LOSS, PER_ROW, ACC
    )
    b, taken_b, scale_b, largest_b, rest_b = row_gradient(
        row + 1, grad_loss, td_error, actions, weights, normaliser, margin, pull, n, A, count, LOSS, PER_ROW, ACC
    )
    action = tl.where(second, b[:, None], a[:, None])
    value = tl.where(column == action, tl.where(second, taken_b[:, None], taken_a[:, None]), 0.0)

    size = n.to(tl.int64) * A
    q_offset = here
    mask_offset = here
    if cql_alpha is not None:
        scale = tl.where(second, scale_b[:, None], scale_a[:, None])
        largest = tl.where(second, largest_b[:, None], largest_a[:, None])
        rest = tl.where(second, rest_b[:, None], rest_a[:, None])
        row = row[:, None] + second
        if q_stride_action is not None:
            q_offset = row_offset(row, (q_inner, q_stride_outer, q_stride_inner, q_stride_action))
            q_offset += column.to(tl.int64) * q_stride_action
        if mask_stride_action is not None:
            mask_offset = row_offset(row, (mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action))
            mask_offset += column.to(tl.int64) * mask_stride_action
    # A mask for every element would split the 16-byte store.
    if start + BLOCK <= size:
        if cql_alpha is not None:
            x, allowed = load_legal(q, action_mask, q_offset, mask_offset, None, ACC)
            value += policy_gradient(x, largest, rest, scale, allowed & (action >= 0))
        tl.store(grad_q + here, value.to(grad_q.dtype.element_ty))
    else:
        if cql_alpha is not None:
            x, allowed = load_legal(q, action_mask, q_offset, mask_offset, here < size, ACC)
            value += policy_gradient(x, largest, rest, scale, allowed & (action >= 0))
        tl.store(grad_q + here, value.to(grad_q.dtype.element_ty), mask=here < size)
