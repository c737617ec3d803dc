"""Triton kernels and helpers of the distributional losses, (n, A, K): samples, the choice of the next action, sums.

Shapes in the comments: n samples, m next states, A actions.
"""

import triton
import triton.language as tl

from .atoms import atom_values, expectation_of_rows
from .mask import count_before
from .rows import NO_COLUMN, combine, reduce_columns
from .samples import load_action, load_next


@triton.jit
def load_samples(
    start, actions, rewards, final, non_final, counts, checked, n, m, A,
    ROWS: tl.constexpr, COUNTED: tl.constexpr, COUNT_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Load ROWS samples: (row, inside, action, live, next_row, reward), each of them [rows].

    inside says whether the sample exists, live whether it has a next state, which is in next_row of the next states. An
    illegal action is -1.
    """
    row = start + tl.arange(0, ROWS)
    inside = row < n
    before = 0
    fits = True
    if non_final is not None:
        true, before = count_before(non_final, counts, start, n, COUNTED, COUNT_BLOCK)
        fits = true == m
    action = load_action(actions, non_final, checked, fits, row, inside, A)
    live, next_row, _ = load_next(final, non_final, row, inside, before)
    live = live & (next_row < m)  # a mask that does not fit makes every action illegal
    return row, inside, action, live, next_row, tl.load(rewards + row, mask=inside, other=0).to(ACC)


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
    """The first largest legal action of each row, [rows], and whether it is known.

    x is (m, A, K) and is compared by its means over K or, if atoms z, [columns], are given, by the expectations of its
    softmax; with VALUES it is (m, A). The action is not known if none is legal (beside a mask, -inf counts as illegal)
    or if a legal one is NaN.
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
    x, final,  # (m, A, K), (m,) or None: true for rows that are not read
    support, v_min, v_max, step,  # as in atom_values, or None for means
    m, A, K, action_tiles,
    stride_row, stride_action, stride_column, support_stride,
    ROWS: tl.constexpr, ACTIONS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Means or expectations, by which actions are chosen where one program a sample would read too long."""
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
