"""Triton kernels: TD loss forward, and a fixed-order sum.

Shapes in the comments: n samples, m rows of the next states, A actions. The loss of a sample is computed by td_loss
and td_loss_grad, the value of a row of actions by rows.py.
"""

import triton
import triton.language as tl

from .mask import count_before
from .rows import load_legal, reduce_partials, reduce_tile, row_offset, scalar
from .samples import load_action, load_discount, load_next, sample_scale
from .value_transform import signed_hyperbolic, signed_parabolic


@triton.jit
def td_loss(td, delta, LOSS: tl.constexpr):
    """Loss of a TD error: mean squared error without the factor 1/2, huber or smooth_l1."""
    if LOSS == "mse":
        value = td * td
    elif LOSS == "huber":
        value = tl.where(tl.abs(td) < delta, 0.5 * td * td, delta * (tl.abs(td) - 0.5 * delta))
    else:
        value = tl.where(tl.abs(td) < delta, 0.5 * td * td / delta, tl.abs(td) - 0.5 * delta)
    return value


@triton.jit
def td_loss_grad(td, delta, LOSS: tl.constexpr):
    """Derivative of td_loss by the TD error. NaN compares with nothing and so stays."""
    if LOSS == "mse":
        slope = 2.0 * td
    elif LOSS == "huber":
        slope = tl.where(td > delta, delta, tl.where(td < -delta, -delta, td))
    else:
        inner = tl.where(td == 0, 0.0, td / delta)  # delta = 0 is l1
        slope = tl.where(td > delta, 1.0, tl.where(td < -delta, -1.0, inner))
    return slope


@triton.jit
def soft_value(best, total, temperature, MASKED: tl.constexpr):
    """Soft value of a row in two parts: the maximum, NaN where no action is legal, and what the sum adds to it.

    They are added only once a difference is taken: far from zero, their sum would round it away.
    """
    if MASKED:
        best = tl.where(best == float("-inf"), float("nan"), best)
    return best, temperature * tl.log(total)


@triton.jit
def policy_gradient(x, largest, rest, scale, legal):
    """Derivative of the conservative term, scale * softmax(x): NaN where the sum is infinite, 0 where not legal."""
    largest = tl.where(tl.abs(largest) == float("inf"), float("nan"), largest)
    return tl.where(legal, tl.exp((x - largest) - rest) * scale, 0.0)


@triton.jit(
    do_not_specialize=[
        "n", "m", "next_splits", "policy_splits", "q_splits", "count",
        "q_inner", "next_inner", "online_inner", "next_mask_inner", "target_inner", "mask_inner",
    ]
)  # fmt: skip
def td_loss_fwd_kernel(
    loss,  # (n,) with PER_ROW, else one sum a program: (programs,)
    td_error, normaliser,  # (n,), (2, n) or None
    grad_q,  # (n, A), contiguous, or None; only with NARROW
    q, actions, rewards, weights,  # (n, A), (n,), (n,), (n,) or None
    next_q, next_q_online, next_action_mask,  # (n, A), or (m, A) with non_final; or None
    final, non_final,  # (n,) or None: true where the episode terminated; where it did not
    counts, checked,  # of non_final, see mask.py; (n,) int64 or None: actions, -1 if non_final has not m true entries
    target_q, action_mask,  # (n, A) or None
    next_best, next_aux,  # without NARROW what row_fwd_kernel left: (splits, m)
    policy_best, policy_aux,  # of target_q, (splits, n)
    q_best, q_aux,  # (splits, n)
    gamma,  # number, () or (n,)
    delta, cql_alpha, temperature, inverse_temperature, alpha, clip,  # numbers; None where they are not used
    n, m, A, next_splits, policy_splits, q_splits,
    q_inner, q_stride_outer, q_stride_inner, q_stride_action,
    next_inner, next_stride_outer, next_stride_inner, next_stride_action,
    online_inner, online_stride_outer, online_stride_inner, online_stride_action,
    next_mask_inner, next_mask_stride_outer, next_mask_stride_inner, next_mask_stride_action,
    target_inner, target_stride_outer, target_stride_inner, target_stride_action,
    mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action,
    count,  # the sum is divided by it: n for the mean
    LOSS: tl.constexpr, VALUE: tl.constexpr,  # VALUE: of the next state, a KIND of rows.py, or None without next_q
    GAMMA: tl.constexpr, TRANSFORM: tl.constexpr, PER_ROW: tl.constexpr, NARROW: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED: tl.constexpr, COUNT_BLOCK: tl.constexpr,  # entries of non_final: of a count, and read at once
    ACC: tl.constexpr, CHOICE_ACC: tl.constexpr,  # of the arithmetic, and of the comparison of next_q_online
):  # fmt: skip
    """TD error, loss and, if asked for, gradient of TILES * ROWS rows; one program is the loss in one launch.

    A block holds a row of A actions with NARROW, else the splits of a row that row_fwd_kernel has reduced.
    """
    q_strides = (q_inner, q_stride_outer, q_stride_inner, q_stride_action)
    next_strides = (next_inner, next_stride_outer, next_stride_inner, next_stride_action)
    online_strides = (online_inner, online_stride_outer, online_stride_inner, online_stride_action)
    next_mask_strides = (next_mask_inner, next_mask_stride_outer, next_mask_stride_inner, next_mask_stride_action)
    target_strides = (target_inner, target_stride_outer, target_stride_inner, target_stride_action)
    mask_strides = (mask_inner, mask_stride_outer, mask_stride_inner, mask_stride_action)
    margin = 0.0
    if LOSS != "mse":
        margin = scalar(delta, ACC)
    if temperature is not None:
        soft = scalar(temperature, ACC)
        scale = scalar(inverse_temperature, ACC)
    else:
        soft = 1.0
        scale = 1.0
    pull = 0.0
    if cql_alpha is not None:
        pull = scalar(cql_alpha, ACC)

    before = 0
    fits = True
    if non_final is not None:
        true, before = count_before(non_final, counts, tl.program_id(0) * TILES * ROWS, n, COUNTED, COUNT_BLOCK)
        fits = true == m
    total = tl.zeros([ROWS], ACC)
    # If they were hoisted out of the loop, its many small invariants would spill.
    for tile in tl.range(0, TILES, disable_licm=True):
        start = (tl.program_id(0) * TILES + tile) * ROWS
        row = start + tl.arange(0, ROWS)  # [rows]
        inside = row < n

        action = load_action(actions, non_final, checked, fits, row, inside, A)
        legal = inside & (action >= 0)
        taken = tl.load(q + row_offset(row, q_strides) + action.to(tl.int64) * q_stride_action, mask=legal, other=0.0)
        taken = taken.to(ACC)
        target = tl.load(rewards + row, mask=inside, other=0).to(ACC)

        if target_q is not None:
            if NARROW:
                best, aux = reduce_tile(
                    target_q, target_strides, action_mask, mask_strides, row, inside, A, scale, "sum_exp", BLOCK, ACC
                )
            else:
                best, aux = reduce_partials(
                    policy_best, policy_aux, policy_splits, n, row, inside, scale, "sum_exp", BLOCK, ACC
                )
            log_policy = tl.load(
                target_q + row_offset(row, target_strides) + action.to(tl.int64) * target_stride_action,
                mask=legal, other=0.0,
            ).to(ACC)  # fmt: skip
            if action_mask is not None:
                allowed = tl.load(
                    action_mask + row_offset(row, mask_strides) + action.to(tl.int64) * mask_stride_action,
                    mask=legal, other=0,
                )  # fmt: skip
                log_policy = tl.where(allowed != 0, log_policy, float("-inf"))
            largest, rest = soft_value(best, aux, soft, action_mask is not None)
            log_policy = (log_policy - largest) - rest
            low = scalar(clip, ACC)
            log_policy = tl.where(log_policy < low, low, tl.where(log_policy > 0, 0.0, log_policy))  # NaN stays
            target += scalar(alpha, ACC) * log_policy

        if VALUE is not None:
            live, next_row, before = load_next(final, non_final, row, inside, before)
            there = live & (next_row < m)
            if not NARROW:
                best, aux = reduce_partials(
                    next_best, next_aux, next_splits, m, next_row, there, scale, VALUE, BLOCK, CHOICE_ACC
                )
            elif VALUE == "argmax":
                best, aux = reduce_tile(
                    next_q_online, online_strides, next_action_mask, next_mask_strides,
                    next_row, there, A, scale, VALUE, BLOCK, CHOICE_ACC,
                )  # fmt: skip
            else:
                best, aux = reduce_tile(
                    next_q, next_strides, next_action_mask, next_mask_strides,
                    next_row, there, A, scale, VALUE, BLOCK, ACC,
                )  # fmt: skip
            if VALUE == "sum_exp":
                largest, rest = soft_value(best, aux, soft, next_action_mask is not None)
                value = largest + rest
            else:
                value = best.to(ACC)
                if VALUE == "argmax":
                    value = tl.load(
                        next_q + row_offset(next_row, next_strides) + aux.to(tl.int64) * next_stride_action,
                        mask=there & (aux < A), other=float("nan"),
                    ).to(ACC)  # fmt: skip
                if next_action_mask is not None:
                    value = tl.where(best == float("-inf"), float("nan"), value)
            discount = load_discount(gamma, row, inside, GAMMA, ACC)
            if TRANSFORM == "signed_hyperbolic":
                value = signed_parabolic(value)
            # Selected, not multiplied: a terminated row's next_q never reaches the target.
            target = tl.where(live, target + discount * value, target)

        if TRANSFORM == "signed_hyperbolic":
            target = signed_hyperbolic(target)
        td = tl.where(legal, taken - target, float("nan"))
        tl.store(td_error + row, td, mask=inside)
        sample = td_loss(td, margin, LOSS)
        if normaliser is not None:
            if NARROW:
                best, aux = reduce_tile(
                    q, q_strides, action_mask, mask_strides, row, inside, A, 1.0, "sum_exp", BLOCK, ACC
                )
            else:
                best, aux = reduce_partials(q_best, q_aux, q_splits, n, row, inside, 1.0, "sum_exp", BLOCK, ACC)
            largest, rest = soft_value(best, aux, 1.0, action_mask is not None)
            tl.store(normaliser + row, largest, mask=inside)
            tl.store(normaliser + n.to(tl.int64) + row, rest, mask=inside)
            if cql_alpha is not None:
                sample += pull * ((largest - taken) + rest)
        if weights is not None:
            sample *= tl.load(weights + row, mask=inside, other=0.0).to(ACC)
        if PER_ROW:
            tl.store(loss + row, sample, mask=inside)
        else:
            total += tl.where(inside, sample, 0.0)

        if grad_q is not None:
            column = tl.arange(0, BLOCK)
            here = inside[:, None] & (column < A)[None, :]
            upstream = sample_scale(None, weights, row, inside, count, PER_ROW, ACC)
            at_action = upstream * (td_loss_grad(td, margin, LOSS) - pull)
            gradient = tl.where(column[None, :] == action[:, None], at_action[:, None], 0.0)  # [rows, columns]
            if cql_alpha is not None:
                offset = row_offset(row, q_strides)[:, None] + column.to(tl.int64)[None, :] * q_stride_action
                mask_offset = offset
                if action_mask is not None:
                    mask_offset = row_offset(row, mask_strides)[:, None]
                    mask_offset += column.to(tl.int64)[None, :] * mask_stride_action
                x, allowed = load_legal(q, action_mask, offset, mask_offset, here, ACC)
                push = tl.where(legal, upstream * pull, 0.0)
                gradient += policy_gradient(x, largest[:, None], rest[:, None], push[:, None], legal[:, None] & allowed)
            block = grad_q + tl.full([], start, tl.int64) * A  # int64 once a block, int32 within it
            offset = (tl.arange(0, ROWS) * A)[:, None] + column[None, :]
            tl.store(block + offset, gradient.to(grad_q.dtype.element_ty), mask=here)
    if not PER_ROW:
        tl.store(loss + tl.program_id(0), tl.sum(total, 0) / count.to(ACC))


@triton.jit(do_not_specialize=["n"])
def sum_kernel(loss, partial, n, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of (n,) partial sums in a fixed order: one program, in a launch of its own.

    With an atomic ticket the last program could add up the sums and save this launch, but the ticket must be zero
    before every launch. One ticket a stream is not safe: a graph captured on one stream may be replayed on another,
    beside eager calls. One ticket a call must be zeroed, which is a launch again.
    """
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < n, other=0.0)
    tl.store(loss, tl.sum(total, 0))
