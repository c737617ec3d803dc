"""Triton kernels: a linear layer over many actions, reduced over the actions while it is multiplied.

Shapes in the comments: m rows, D features, A actions. The Q-values of a tile stay in registers. Only one or two numbers
a row, best and aux, leave the program; by KIND they are

- "max": the maximum, NaN if there is one;
- "argmax": the maximum and the first action that has it;
- "soft": the maximum and the sum of 2^((q - maximum) * scale).
"""

import triton
import triton.language as tl

from .rows import nan_max

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def reduce_tile(best, aux, x, x_aux, scale, KIND: tl.constexpr):
    """Reduce a tile x, [rows, columns], into best and aux, [rows]; "max" has no aux.

    x_aux is the columns of "argmax", the sums of "soft" or None for ones.
    """
    largest = tl.reduce(x, 1, nan_max)
    if KIND == "argmax":
        better = (largest > best) | ((largest != largest) & (best == best))
        column = tl.min(tl.where((x == largest[:, None]) | (x != x), x_aux, NO_COLUMN), 1)
        aux = tl.where(better, column, aux)
    largest = nan_max(best, largest)
    if KIND == "soft":
        origin = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)  # inf - inf would be NaN
        power = tl.exp2((x - origin[:, None]) * scale)
        if x_aux is not None:
            power *= x_aux
        aux = tl.sum(power, 1) + aux * tl.exp2((best - origin) * scale)
    return largest, aux


@triton.jit
def load_features(x, stride, mask, feature, D, EVEN: tl.constexpr, FEATURES: tl.constexpr):
    """Features of the rows that begin at x, [rows, 1], and zeros behind the last feature; [rows, features]."""
    k = feature + tl.arange(0, FEATURES)
    if not EVEN:
        mask = mask & (k < D)[None, :]
    return tl.load(x + k.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def load_legal(mask, stride_row, stride_action, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile of the mask that begins at the pointer, 32 columns to a word; [rows, words], int32."""
    row = tl.arange(0, ROWS)[:, None, None]
    lane = tl.arange(0, 32)[None, None, :]
    column = tl.arange(0, COLUMNS // 32)[None, :, None] * 32 + lane  # [1, words, 32]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_action  # a view's strides have no bound
    legal = tl.load(mask + offset, mask=inside, other=0)
    return tl.sum((legal != 0).to(tl.int32) << lane, 2)


@triton.jit
def unpack_legal(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether each action is legal, [rows, columns]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, COLUMNS]) != 0


@triton.jit(do_not_specialize=["m", "row_tiles", "group", "chunk"])
def sweep_fwd_kernel(
    out, out_aux,  # (splits, m); of "max" no aux
    hidden, weight, bias, mask,  # (m, D), (A, D), (A,) or None, (m, A) or None
    m, A, units,  # units * VEC = D
    hidden_stride, weight_stride_action, weight_stride_feature, bias_stride, mask_stride_row, mask_stride_action,
    row_tiles, group, chunk,  # row tiles of a group; columns of a split, a multiple of COLUMNS
    scale,
    KIND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of rows over the columns of a split.

    The first two strides count units of VEC elements: multiplied by VEC in the kernel, they show the compiler that rows
    are aligned. EVEN: FEATURES divides D. ONCE: it is no less than D, and the tile of hidden is read once for all.
    """
    # The programs that run at once are a group of row tiles, the fastest index, by all splits: they read a row of the
    # weight from memory once, and their rows of hidden stay in the cache.
    splits = tl.num_programs(0) // row_tiles
    first_of_group = tl.program_id(0) // (group * splits) * group
    among_group = tl.program_id(0) - first_of_group * splits
    size = tl.minimum(row_tiles - first_of_group, group)
    first_row = (first_of_group + among_group % size) * ROWS
    row = first_row + tl.arange(0, ROWS)  # [rows]
    inside = row < m
    split = among_group // size
    start = split * (chunk // COLUMNS) * COLUMNS
    stop = tl.minimum(start + chunk, A)
    D = units * VEC
    hidden_row = hidden + row.to(tl.int64)[:, None] * hidden_stride * VEC
    best = tl.full([ROWS], float("-inf"), tl.float32)
    aux = tl.zeros([ROWS], tl.int32) + start if KIND == "argmax" else tl.zeros([ROWS], tl.float32)
    scale = tl.full([], scale, tl.float32)
    q = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ONCE:
        h = load_features(hidden_row, 1, inside[:, None], 0, D, EVEN, FEATURES).to(OPERAND)
    words = tl.zeros([ROWS, COLUMNS // 32], tl.int32)
    # One loop over actions and features, so that the next tile is being loaded while this one is reduced. If they were
    # hoisted out of it, the addresses within a tile of the mask would spill.
    steps = 1 if ONCE else tl.cdiv(D, FEATURES)
    for i in tl.range(0, tl.cdiv(stop - start, COLUMNS) * steps, disable_licm=True):
        first = start + i // steps * COLUMNS
        feature = 0 if ONCE else i % steps * FEATURES
        last = True if ONCE else feature + FEATURES >= D
        column = first + tl.arange(0, COLUMNS)  # [columns]
        exists = column < A
        if mask is not None:
            # Before the product, and as bits: loaded behind it, the mask would decide in which layout q is reduced, and
            # q would go through shared memory to get there.
            corner = mask + (first_row.to(tl.int64) * mask_stride_row + first.to(tl.int64) * mask_stride_action)
            if last:
                words = load_legal(corner, mask_stride_row, mask_stride_action, m - first_row, A - first, ROWS, COLUMNS)
        if not ONCE:
            h = load_features(hidden_row, 1, inside[:, None], feature, D, EVEN, FEATURES).to(OPERAND)
        weight_row = weight + column.to(tl.int64)[:, None] * weight_stride_action * VEC
        w = load_features(weight_row, weight_stride_feature, exists[:, None], feature, D, EVEN, FEATURES)
        q = tl.dot(h, tl.trans(w.to(hidden.dtype.element_ty).to(OPERAND)), q, input_precision=PRECISION)
        if last:
            if bias is not None:
                shift = tl.load(bias + column.to(tl.int64) * bias_stride, mask=exists, other=0.0)
                q += shift.to(tl.float32)[None, :]
            legal = exists[None, :]
            if mask is not None:
                legal = unpack_legal(words, ROWS, COLUMNS)
            q = tl.where(legal, q, float("-inf"))
            best, aux = reduce_tile(best, aux, q, column[None, :] if KIND == "argmax" else None, scale, KIND)
            q = tl.zeros([ROWS, COLUMNS], tl.float32)
    offset = split.to(tl.int64) * m + row
    tl.store(out + offset, best, mask=inside)
    if out_aux is not None:
        tl.store(out_aux + offset, aux.to(out_aux.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "splits"])
def sweep_combine_kernel(
    out, out_aux,  # (m,)
    partial, partial_aux,  # (splits, m)
    m, splits, scale,
    KIND: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Reduce the splits of each row, in a fixed order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [rows]
    inside = row < m
    best = tl.full([ROWS], float("-inf"), tl.float32)
    aux = tl.zeros([ROWS], tl.int32 if KIND == "argmax" else tl.float32)
    scale = tl.full([], scale, tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        offset = split.to(tl.int64)[None, :] * m + row[:, None]  # [rows, splits]
        live = inside[:, None] & (split < splits)[None, :]
        x = tl.load(partial + offset, mask=live, other=float("-inf"))
        x_aux = None
        if partial_aux is not None:
            x_aux = tl.load(partial_aux + offset, mask=live, other=0)
        best, aux = reduce_tile(best, aux, x, x_aux, scale, KIND)
    tl.store(out + row, best, mask=inside)
    if out_aux is not None:
        tl.store(out_aux + row, aux.to(out_aux.dtype.element_ty), mask=inside)
