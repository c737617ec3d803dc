"""Triton kernels: row maximum, TD loss forward, its backward, and a fixed-order sum.

Shapes in the comments: n samples, m rows of next_q, A actions. What the loss is stands in td_loss and td_loss_grad, its
target in the forward kernel; everything else is addressing.
"""

import triton
import triton.language as tl


@triton.jit
def nan_max(a, b):
    """Elementwise maximum in which NaN wins, as in torch.max (tl.max drops it)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def td_loss(td):
    """Loss of a TD error: mean squared error without the factor 1/2."""
    return td * td


@triton.jit
def td_loss_grad(td):
    """Derivative of td_loss by the TD error."""
    return 2.0 * td


@triton.jit
def legal_action(action, A):
    """The action, or -1 if it is outside [0, A); int32, since fewer registers hold it once it is known to be small."""
    action = action.to(tl.int64)
    return tl.where((action >= 0) & (action < A), action, -1).to(tl.int32)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Offset of each row in an (n, A) tensor, where inner is None, or in an (outer, inner, A) one."""
    # int64 before the multiplication: the last row of a large matrix lies behind 2^31 elements.
    if inner is None:
        offset = row.to(tl.int64) * stride_inner
    else:
        offset = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    return offset


@triton.jit
def row_max(
    next_q, offset, live, start, stop, A, stride_action,
    LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum of each live row over the columns [start, stop), -inf where there is none.

    LAYOUT is "narrow" (one block holds the row), "wide" (unit column stride) or "strided". In a wide layout columns
    are counted from the row's first 16-byte boundary, so that rows of any width are read 16 bytes at a time; the up to
    VEC - 1 columns before and behind that body are read one by one.
    """
    if LAYOUT == "narrow":
        lane = tl.arange(0, BLOCK).to(tl.int64)
        mask = live[:, None] & (lane < A)[None, :]
        x = tl.load(next_q + offset[:, None] + lane[None, :] * stride_action, mask=mask, other=float("-inf"))
        value = tl.reduce(x.to(ACC), 1, nan_max)
    elif LAYOUT == "wide":
        best = tl.full([ROWS, BLOCK], float("-inf"), ACC)  # [rows, columns]
        body = (offset + (VEC - 1)) // VEC * VEC  # [rows]
        vectors = (offset + A - body) // VEC
        for column in range(start, stop, BLOCK):
            lane = column + tl.arange(0, BLOCK)
            # Compared by vector, not by element: a mask that is constant over 16 bytes keeps the load whole.
            mask = live[:, None] & ((lane // VEC)[None, :] < vectors[:, None])
            x = tl.load(next_q + body[:, None] + lane[None, :], mask=mask, other=float("-inf"))
            best = nan_max(best, x.to(ACC))
        lane = tl.arange(0, 2 * VEC)
        tail = body + vectors * VEC - offset
        column = tl.where(lane[None, :] < VEC, lane[None, :], tail[:, None] + (lane[None, :] - VEC))
        stop_edge = tl.where(lane[None, :] < VEC, (body - offset)[:, None], A)
        mask = live[:, None] & (column < stop_edge)
        x = tl.load(next_q + offset[:, None] + column, mask=mask, other=float("-inf"))
        value = nan_max(tl.reduce(best, 1, nan_max), tl.reduce(x.to(ACC), 1, nan_max))
    else:
        best = tl.full([ROWS, BLOCK], float("-inf"), ACC)
        for column in range(start, stop, BLOCK):
            lane = (column + tl.arange(0, BLOCK)).to(tl.int64)
            mask = live[:, None] & (lane < A)[None, :]
            x = tl.load(next_q + offset[:, None] + lane[None, :] * stride_action, mask=mask, other=float("-inf"))
            best = nan_max(best, x.to(ACC))
        value = tl.reduce(best, 1, nan_max)
    return value


@triton.jit(do_not_specialize=["m", "inner", "chunk"])
def row_max_fwd_kernel(
    partial,  # (splits, m)
    next_q, terminated,  # (m, A), (m,) or None
    m, A, inner, stride_outer, stride_inner, stride_action,
    chunk,  # columns of a split, a multiple of BLOCK
    SPLITS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maxima of column ranges, for few rows of many actions: one program a row block and split."""
    split = tl.program_id(0) % SPLITS
    row = (tl.program_id(0) // SPLITS) * ROWS + tl.arange(0, ROWS)
    live = row < m
    if terminated is not None:
        live = live & (tl.load(terminated + row, mask=live, other=1) == 0)
    offset = row_offset(row, inner, stride_outer, stride_inner)
    # Spelt as a multiple of BLOCK, so that the compiler sees the alignment of the columns.
    start = split * (chunk // BLOCK) * BLOCK
    stop = tl.minimum(start + chunk, A)
    value = row_max(next_q, offset, live, start, stop, A, stride_action, "wide", VEC, ROWS, BLOCK, ACC)
    tl.store(partial + split * m + row, value, mask=row < m)


@triton.jit(do_not_specialize=["n", "m", "q_inner", "next_inner", "rows_per_program", "count"])
def td_loss_fwd_kernel(
    loss,  # (n,) with PER_ROW, else one sum a program: (programs,)
    td_error,  # (n,)
    grad_q,  # (n, A), contiguous, or None; only where next_q is narrow and K is A
    q, actions, rewards,  # (n, A), (n,), (n,)
    next_q,  # (n, K), or (m, K) with rank; K is A, or the splits of row_max_fwd_kernel
    final, rank,  # (n,) or None: 1 = terminated; with rank, the running count of non-final rows: 1 = not terminated
    gamma,  # number, () or (n,)
    n, m, A, K, rows_per_program,
    q_inner, q_stride_outer, q_stride_inner, q_stride_action,
    next_inner, next_stride_outer, next_stride_inner, next_stride_action,
    count,  # the sum is divided by it: n for the mean
    GAMMA: tl.constexpr, PER_ROW: tl.constexpr,
    LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """TD error, loss and, if asked for, gradient of rows_per_program rows; one program is the loss in one launch."""
    total = tl.zeros([ROWS], ACC)
    first = tl.program_id(0) * rows_per_program
    # Hoisted out of the loop, its many small invariants would spill.
    for start in tl.range(first, tl.minimum(first + rows_per_program, n), ROWS, disable_licm=True):
        row = start + tl.arange(0, ROWS)  # [rows]
        inside = row < n

        action = legal_action(tl.load(actions + row, mask=inside, other=0), A)
        legal = action >= 0
        q_offset = row_offset(row, q_inner, q_stride_outer, q_stride_inner)
        q_offset += action.to(tl.int64) * q_stride_action
        taken = tl.load(q + q_offset, mask=inside & legal, other=0.0).to(ACC)
        target = tl.load(rewards + row, mask=inside, other=0).to(ACC)

        live = inside
        next_row = row
        if rank is not None:
            live = live & (tl.load(final + row, mask=inside, other=0) != 0)
            next_row = tl.load(rank + row, mask=inside, other=1).to(tl.int32) - 1
        elif final is not None:
            live = live & (tl.load(final + row, mask=inside, other=1) == 0)
        next_offset = row_offset(next_row, next_inner, next_stride_outer, next_stride_inner)
        value = row_max(
            next_q, next_offset, live & (next_row < m), 0, K, K, next_stride_action, LAYOUT, VEC, ROWS, BLOCK, ACC
        )
        if GAMMA == "number":
            discount = tl.full([ROWS], gamma, ACC)
        elif GAMMA == "scalar":
            discount = tl.load(gamma).to(ACC)
        else:
            discount = tl.load(gamma + row, mask=inside, other=0.0).to(ACC)
        # Selected, not multiplied: what stands in a terminated row's next_q never reaches the target.
        target = tl.where(live, target + discount * value, target)

        td = tl.where(legal, taken - target, float("nan"))
        tl.store(td_error + row, td, mask=inside)
        if PER_ROW:
            tl.store(loss + row, td_loss(td), mask=inside)
        else:
            total += tl.where(inside, td_loss(td), 0.0)
        if grad_q is not None:
            column = tl.arange(0, BLOCK)
            gradient = (td_loss_grad(td) / count.to(ACC)).to(grad_q.dtype.element_ty)
            gradient = tl.where(column[None, :] == action[:, None], gradient[:, None], 0.0)  # [rows, columns]
            block = grad_q + tl.full([], start, tl.int64) * A  # int64 once a block, int32 within it
            offset = (tl.arange(0, ROWS) * A)[:, None] + column[None, :]
            tl.store(block + offset, gradient, mask=inside[:, None] & (column < A)[None, :])
    if not PER_ROW:
        tl.store(loss + tl.program_id(0), tl.sum(total, 0) / count.to(ACC))


@triton.jit(do_not_specialize=["n"])
def sum_kernel(loss, partial, n, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of (n,) partial sums in a fixed order: one program."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < n, other=0.0)
    tl.store(loss, tl.sum(total, 0))


@triton.jit
def upstream_times_grad(grad_loss, td_error, row, inside, count, PER_ROW: tl.constexpr):
    """Derivative of the loss by the Q-value of the action taken in each row; grad_loss is (), (n,) or None for ones."""
    td = tl.load(td_error + row, mask=inside, other=0.0)
    gradient = td_loss_grad(td) / count.to(td.dtype)
    if grad_loss is not None:
        if PER_ROW:
            gradient *= tl.load(grad_loss + row, mask=inside, other=0.0)
        else:
            gradient *= tl.load(grad_loss)
    return gradient


@triton.jit(do_not_specialize=["n", "count"])
def td_loss_bwd_kernel(
    grad_q,  # (n, A), contiguous
    grad_loss, td_error, actions,  # (), (n,) or None for ones, (n,), (n,)
    n, A, count,
    PER_ROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One dense store of where(column == action, gradient, 0), over grad_q as a flat array: every store is aligned.

    With WIDE (A >= BLOCK) a block touches at most two rows, whose actions and gradients are scalars.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first = start // A
    column = (start - first * A).to(tl.int32) + tl.arange(0, BLOCK)  # columns, counted from the first row's start
    if WIDE:
        action = legal_action(tl.load(actions + first), A)
        gradient = upstream_times_grad(grad_loss, td_error, first, True, count, PER_ROW)
        value = tl.where(column == action, gradient, 0.0)
        second = first + 1
        inside = second < n
        action = legal_action(tl.load(actions + second, mask=inside, other=-1), A)
        gradient = upstream_times_grad(grad_loss, td_error, second, inside, count, PER_ROW)
        value = tl.where((column - A == action) & (action >= 0), gradient, value)
    else:
        row = first + column // A
        inside = row < n
        action = legal_action(tl.load(actions + row, mask=inside, other=-1), A)
        gradient = upstream_times_grad(grad_loss, td_error, row, inside, count, PER_ROW)
        value = tl.where(column % A == action, gradient, 0.0)
    value = value.to(grad_q.dtype.element_ty)
    size = n.to(tl.int64) * A
    here = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        tl.store(grad_q + here, value)
    else:
        tl.store(grad_q + here, value, mask=here < size)
