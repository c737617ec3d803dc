"""Triton kernels and helpers of the losses of distributions, (n, A, K): samples, the choice of the next action, sums.

Shapes in the comments: n samples, m next states, A actions.
"""

import triton
import triton.language as tl

from .atoms import atom_values, expectation_of_rows
from .rows import NO_COLUMN, combine, reduce_columns, scalar
from .td_loss import legal_action


@triton.jit
def load_sample(
    actions, final, non_final, checked, row, inside, fits, before, A, m,
):  # fmt: skip
    """Of samples, [rows], the action (-1: illegal), whether there is a next state, and its row; see td_loss.py."""
    action = legal_action(tl.load(actions + row, mask=inside, other=-1), A)
    live = inside
    next_row = row
    if non_final is not None:
        action = tl.where(fits, action, -1)
        if checked is not None:
            tl.store(checked + row, action.to(tl.int64), mask=inside)
        goes_on = tl.load(non_final + row, mask=inside, other=0).to(tl.int32)
        live = live & (goes_on != 0)
        next_row = before + tl.cumsum(goes_on, 0) - 1
    elif final is not None:
        live = live & (tl.load(final + row, mask=inside, other=1) == 0)
    return action, live & (next_row < m), next_row


@triton.jit
def load_discount(gamma, row, inside, GAMMA: tl.constexpr, ACC: tl.constexpr):
    """The discount of each sample, [rows] or one for all: GAMMA says what gamma is."""
    if GAMMA == "number":
        discount = scalar(gamma, ACC)
    elif GAMMA == "scalar":
        discount = tl.load(gamma).to(ACC)
    else:
        discount = tl.load(gamma + row, mask=inside, other=0.0).to(ACC)
    return discount


@triton.jit
def mean_of_rows(x, offset, stride, inside, K, COLUMNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr):
    """Means of rows of K elements, which begin at the offsets [rows, actions]."""
    total = tl.zeros([offset.shape[0], offset.shape[1], COLUMNS], ACC)  # [rows, actions, columns]
    for first in range(0, K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        # Compared by vector, not by element: a mask that is constant over 16 bytes keeps the load whole.
        here = inside[:, :, None] & (column // VEC < K // VEC)[None, None, :]
        where = offset[:, :, None] + (column.to(tl.int64) * stride)[None, None, :]
        total += tl.load(x + where, mask=here, other=0.0).to(ACC)
    return tl.sum(total, 2) / K.to(ACC)


@triton.jit
def greedy(
    x, strides, mask, mask_strides, row, live, A, K, z,
    VALUES: tl.constexpr, ACTIONS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """First largest legal action of each row, [rows], and whether it is known.

    x: (m, A, K), whose means over K choose, or, where there are atoms z, [columns], the expectations of their softmax;
    or with VALUES (m, A). It is not known where no action is legal, as which -inf counts beside a mask, or where a
    legal one is NaN.
    """
    best = tl.full([row.shape[0]], float("-inf"), ACC)
    index = tl.full([row.shape[0]], NO_COLUMN, tl.int32)
    start = row.to(tl.int64) * strides[0] * VEC
    for first in range(0, A, ACTIONS):
        action = first + tl.arange(0, ACTIONS)
        legal = live[:, None] & (action < A)[None, :]  # [rows, actions]
        wide = action.to(tl.int64)
        if mask is not None:
            where = (row.to(tl.int64) * mask_strides[0])[:, None] + (wide * mask_strides[1])[None, :]
            legal = legal & (tl.load(mask + where, mask=legal, other=0) != 0)
        offset = start[:, None] + (wide * strides[1] * VEC)[None, :]
        if VALUES:
            value = tl.load(x + offset, mask=legal, other=0.0).to(ACC)
        elif z is not None:
            value = expectation_of_rows(x, offset, strides[2], legal, z, K, VEC, ACC)
        else:
            value = mean_of_rows(x, offset, strides[2], legal, K, COLUMNS, VEC, ACC)
        value = tl.where(legal, value, float("-inf"))
        found, column = reduce_columns(value, action[None, :], 1.0, "argmax")
        best, index = combine(best, index, found, column, 1.0, "argmax")
    known = best == best
    if mask is not None:
        known = known & (best != float("-inf"))
    return tl.where(known & (index < A), index, 0), known


@triton.jit(do_not_specialize=["m", "A", "K", "action_tiles"])
def values_kernel(
    values,  # (m, A)
    x, final,  # (m, A, K), (m,) or None: rows that are not read
    support, v_min, v_max, step,  # as atom_values has them, or None for means
    m, A, K, action_tiles,
    stride_row, stride_action, stride_column, support_stride,
    ROWS: tl.constexpr, ACTIONS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Means or expectations: what chooses, where a row is too long for the program of a sample to read all of it."""
    row = tl.program_id(0) // action_tiles * ROWS + tl.arange(0, ROWS)
    action = tl.program_id(0) % action_tiles * ACTIONS + tl.arange(0, ACTIONS)
    live = row < m
    if final is not None:
        live = live & (tl.load(final + row, mask=live, other=1) == 0)
    inside = live[:, None] & (action < A)[None, :]
    offset = (row.to(tl.int64) * stride_row * VEC)[:, None] + (action.to(tl.int64) * stride_action * VEC)[None, :]
    if support is None and v_min is None:
        value = mean_of_rows(x, offset, stride_column, inside, K, COLUMNS, VEC, ACC)
    else:
        z = atom_values(tl.arange(0, COLUMNS), support, support_stride, v_min, v_max, step, K, ACC)
        value = expectation_of_rows(x, offset, stride_column, inside, z, K, VEC, ACC)
    here = row.to(tl.int64)[:, None] * A + action[None, :]
    tl.store(values + here, value, mask=(row < m)[:, None] & (action < A)[None, :])


@triton.jit(do_not_specialize=["n", "splits"])
def sum_rows_kernel(sums, x, n, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Sums of the rows of (n, splits), in a fixed order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, SPLITS], x.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (row < n)[:, None] & (split < splits)[None, :]
        total += tl.load(x + row.to(tl.int64)[:, None] * splits + split[None, :], mask=inside, other=0.0)
    tl.store(sums + row, tl.sum(total, 1), mask=row < n)
