"""Triton kernel: the gradient of a tile of a linear layer's Q-values, which are multiplied once more and not stored.

The rest of the backward, two products with that tile, is left to the library.
"""

import triton
import triton.language as tl

from .sweep import load_features, load_legal, unpack_legal

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["m", "first_action", "row_tiles"])
def sweep_bwd_kernel(
    grad, partial_bias,  # (m, columns), contiguous; (row_tiles, columns)
    hidden, weight, bias, mask,  # (m, D), (columns, D), (columns,) or None, (m, columns) or None
    largest, policy, taken, actions,  # (m,)
    m, columns, units, first_action,  # units * VEC = D; the action of the first column
    hidden_stride, weight_stride_action, weight_stride_feature, bias_stride, mask_stride_row, mask_stride_action,
    row_tiles,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradient policy * exp(q - largest), plus taken at the action, and its sums over the rows of each tile.

    Strides are as in sweep_fwd_kernel.
    """
    row_tile = tl.program_id(0) % row_tiles
    first_row, first = row_tile * ROWS, tl.program_id(0) // row_tiles * COLUMNS
    row = first_row + tl.arange(0, ROWS)  # [rows]
    column = first + tl.arange(0, COLUMNS)  # [columns]
    inside, exists = row < m, column < columns
    D = units * VEC
    words = tl.zeros([ROWS, COLUMNS // 32], tl.int32)
    if mask is not None:  # before the product, as in sweep_fwd_kernel
        corner = mask + (first_row.to(tl.int64) * mask_stride_row + first.to(tl.int64) * mask_stride_action)
        words = load_legal(corner, mask_stride_row, mask_stride_action, m - first_row, columns - first, ROWS, COLUMNS)
    hidden_row = hidden + row.to(tl.int64)[:, None] * hidden_stride * VEC
    weight_row = weight + column.to(tl.int64)[:, None] * weight_stride_action * VEC
    q = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, tl.cdiv(D, FEATURES)):
        h = load_features(hidden_row, 1, inside[:, None], step * FEATURES, D, EVEN, FEATURES).to(OPERAND)
        w = load_features(weight_row, weight_stride_feature, exists[:, None], step * FEATURES, D, EVEN, FEATURES)
        q = tl.dot(h, tl.trans(w.to(OPERAND)), q, input_precision=PRECISION)
    if bias is not None:
        q += tl.load(bias + column.to(tl.int64) * bias_stride, mask=exists, other=0.0).to(tl.float32)[None, :]
    if mask is not None:
        q = tl.where(unpack_legal(words, ROWS, COLUMNS), q, float("-inf"))
    origin = tl.load(largest + row, mask=inside, other=0.0)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)  # NaN, too: no action is legal
    share = tl.load(policy + row, mask=inside, other=0.0)
    x = tl.exp2((q - origin[:, None]) * LOG2_E) * share[:, None]
    action = tl.load(actions + row, mask=inside, other=-1) - first_action
    more = tl.load(taken + row, mask=inside, other=0.0)
    x += tl.where(column[None, :] == action[:, None], more[:, None], 0.0)
    live = inside[:, None] & exists[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(grad + offset, x.to(grad.dtype.element_ty), mask=live)
    if partial_bias is not None:
        sums = tl.sum(tl.where(inside[:, None], x, 0.0), 0)  # [columns]
        tl.store(partial_bias + row_tile.to(tl.int64) * columns + column, sums, mask=exists)
