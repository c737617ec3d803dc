"""Triton kernel and helpers that reduce the legal actions of each row to a pair (best, aux), by KIND:

- "max": the maximum, NaN if there is one; aux means nothing;
- "argmax": the maximum and the first column it stands in;
- "sum_exp": the maximum and the sum of exp((x - maximum) / temperature), which is stable for any temperature.

Such pairs combine again: the halves of a row, the lanes of a block, the splits of a wide matrix.
"""

import triton
import triton.language as tl

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def nan_max(a, b):
    """Elementwise maximum in which NaN wins, as in torch.max (tl.max drops it)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scalar(x, ACC: tl.constexpr):
    """A number of the call. As an argument it arrives as float32, so for float64 arithmetic it is in memory."""
    return tl.load(x) if tl.float64 == ACC else tl.full([], x, ACC)


@triton.jit
def row_offset(row, strides):
    """Offset of each row; strides are (inner, outer's, inner's, action's), where inner is None for an (n, A) tensor."""
    # int64 before the multiplication: the last row of a large matrix lies behind 2^31 elements.
    inner = strides[0]
    if inner is None:
        offset = row.to(tl.int64) * strides[2]
    else:
        offset = (row // inner).to(tl.int64) * strides[1] + (row % inner).to(tl.int64) * strides[2]
    return offset


@triton.jit
def load_legal(x, mask, offset, mask_offset, inside, ACC: tl.constexpr):
    """Load elements, -inf where they are not inside (None: all are) or not legal, and say which are legal.

    The value of an illegal element is never used.
    """
    if inside is None:
        value = tl.load(x + offset).to(ACC)
    else:
        value = tl.load(x + offset, mask=inside, other=float("-inf")).to(ACC)
    legal = tl.full([], 1, tl.int1)
    if mask is not None:
        if inside is None:
            legal = tl.load(mask + mask_offset) != 0
        else:
            legal = tl.load(mask + mask_offset, mask=inside, other=0) != 0
        value = tl.where(legal, value, float("-inf"))
    return value, legal


@triton.jit
def exp_of_gap(a, b, inverse_temperature):
    """exp(-|a - b| / temperature); 1 for equal infinities."""
    return tl.exp(-tl.abs(tl.where(a == b, 0.0, a - b)) * inverse_temperature)


@triton.jit
def combine(best, aux, x, x_aux, inverse_temperature, KIND: tl.constexpr):
    """Combine pairs elementwise."""
    # The sum beside a maximum of -inf, as of masked elements, does not matter: it is scaled by exp(-inf), or unused.
    if KIND == "argmax":
        aux = tl.where((x > best) | ((x == best) & (x_aux < aux)), x_aux, aux)
    elif KIND == "sum_exp":
        shrunk = exp_of_gap(best, x, inverse_temperature)
        aux = tl.where(x > best, aux * shrunk + x_aux, aux + x_aux * shrunk)
    return nan_max(best, x), aux


@triton.jit
def reduce_columns(x, aux, inverse_temperature, KIND: tl.constexpr):
    """Combine the columns of each row, [rows, columns] to [rows]."""
    best = tl.reduce(x, 1, nan_max)
    if KIND == "argmax":
        result = tl.min(tl.where(x == best[:, None], aux, NO_COLUMN), 1)  # NO_COLUMN under NaN
    elif KIND == "sum_exp":
        result = tl.sum(exp_of_gap(best[:, None], x, inverse_temperature) * aux, 1)
    else:
        result = best
    return best, result


@triton.jit
def reduce_tile(
    x, strides, mask, mask_strides, row, live, A, inverse_temperature,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce live rows of (n, A), each of them in one block."""
    column = tl.arange(0, BLOCK)
    inside = live[:, None] & (column < A)[None, :]
    wide = column.to(tl.int64)
    offset = row_offset(row, strides)[:, None] + wide[None, :] * strides[3]
    mask_offset = offset
    if mask is not None:
        mask_offset = row_offset(row, mask_strides)[:, None] + wide[None, :] * mask_strides[3]
    value, _ = load_legal(x, mask, offset, mask_offset, inside, ACC)
    if KIND == "argmax":
        best, aux = reduce_columns(value, column[None, :], inverse_temperature, KIND)
    else:
        best, aux = reduce_columns(value, 1.0, inverse_temperature, KIND)
    return best, aux


@triton.jit
def reduce_partials(
    best, aux, splits, m, row, live, inverse_temperature,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Combine what row_fwd_kernel left of live rows, (splits, m)."""
    split = tl.arange(0, BLOCK)
    inside = live[:, None] & (split < splits)[None, :]
    offset = row.to(tl.int64)[:, None] + split.to(tl.int64)[None, :] * m
    value = tl.load(best + offset, mask=inside, other=float("-inf")).to(ACC)
    pairs = value
    if KIND != "max":
        pairs = tl.load(aux + offset, mask=inside, other=0)
    return reduce_columns(value, pairs, inverse_temperature, KIND)


@triton.jit(do_not_specialize=["m", "inner", "shift", "mask_inner", "splits", "chunk"])
def row_fwd_kernel(
    best, aux,  # (splits, m), aux None for "max"
    x, mask, terminated,  # (m, A), (m, A) or None, (m,) or None
    inverse_temperature,
    m, A,
    inner, stride_outer, stride_inner, stride_action, shift,
    mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action,  # read only where WIDE is not set
    splits, chunk,  # columns of a split, a multiple of BLOCK
    KIND: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce ROWS rows over a range of columns, all of them where splits is 1.

    With WIDE (unit column stride, and a mask that lies as x does) columns are counted from the row's first 16-byte
    boundary, so that rows of any width are read 16 bytes at a time; the up to VEC - 1 columns before and behind that
    body are read one by one. The pointer x lies on such a boundary; where the tensor does not begin there, the caller
    has moved the pointers of x and mask back by shift elements.
    """
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    live = row < m
    if terminated is not None:
        live = live & (tl.load(terminated + row, mask=live, other=1) == 0)
    # Spelt as a multiple of BLOCK, so that the compiler sees the alignment of the columns.
    start = split * (chunk // BLOCK) * BLOCK
    stop = tl.minimum(start + chunk, A)
    scale = 1.0
    if KIND == "sum_exp":
        scale = scalar(inverse_temperature, ACC)

    value = tl.full([ROWS, BLOCK], float("-inf"), ACC)  # [rows, columns]
    pairs = tl.zeros([ROWS, BLOCK], tl.int32) if KIND == "argmax" else tl.zeros([ROWS, BLOCK], ACC)
    offset = row_offset(row, (inner, stride_outer, stride_inner, stride_action)) + shift  # [rows]
    mask_offset = offset
    if not WIDE and mask is not None:
        mask_offset = row_offset(row, (mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action))
    body = (offset + (VEC - 1)) // VEC * VEC
    head = (body - offset).to(tl.int32)
    vectors = (A - head) // VEC
    for first in range(start, stop, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        if WIDE:
            # Compared by vector, not by element: a mask that is constant over 16 bytes keeps the load whole.
            inside = live[:, None] & ((lane // VEC)[None, :] < vectors[:, None])
            column = head[:, None] + lane[None, :]
            here = body[:, None] + lane[None, :]
            mask_here = here
        else:
            inside = live[:, None] & (lane < A)[None, :]
            column = lane[None, :]
            here = offset[:, None] + lane.to(tl.int64)[None, :] * stride_action
            mask_here = here
            if mask is not None:
                mask_here = mask_offset[:, None] + lane.to(tl.int64)[None, :] * mask_stride_action
        loaded, _ = load_legal(x, mask, here, mask_here, inside, ACC)
        if KIND == "argmax":
            value, pairs = combine(value, pairs, loaded, column, scale, KIND)
        else:
            value, pairs = combine(value, pairs, loaded, 1.0, scale, KIND)
    value, pairs = reduce_columns(value, pairs, scale, KIND)

    if WIDE:
        lane = tl.arange(0, 2 * VEC)[None, :]
        tail = head + vectors * VEC
        column = tl.where(lane < VEC, lane, tail[:, None] + (lane - VEC))
        end = tl.where(lane < VEC, head[:, None], A)
        once = tl.where(split == 0, A, 0)  # by the first split only: a sum must not count them again
        inside = live[:, None] & (column < end) & (column < once)
        here = offset[:, None] + column
        loaded, _ = load_legal(x, mask, here, here, inside, ACC)
        if KIND == "argmax":
            edges, edge_pairs = reduce_columns(loaded, column, scale, KIND)
        else:
            edges, edge_pairs = reduce_columns(loaded, 1.0, scale, KIND)
        value, pairs = combine(value, pairs, edges, edge_pairs, scale, KIND)
    here = split.to(tl.int64) * m + row
    tl.store(best + here, value, mask=row < m)
    if KIND != "max":
        tl.store(aux + here, pairs, mask=row < m)
