"""Triton kernel: forward of the quantile loss. Pairs of predicted and target quantiles never leave the registers.

Shapes in the comments: n samples, m next states, A actions, K predicted quantiles, K' target quantiles.
"""

import triton
import triton.language as tl

from .atoms import quotient
from .distributions import greedy, load_samples
from .rows import scalar
from .samples import load_discount


@triton.jit
def load_targets(next_q, offset, index, stride, inside, live, reward, discount, ACC: tl.constexpr):
    """Target quantiles, [targets, rows]; the reward where there is no next state. The index is [targets, 1]."""
    value = tl.load(next_q + offset + index.to(tl.int64) * stride, mask=inside, other=0.0).to(ACC)
    # Selected, not multiplied: the values of a terminated row never reach the target.
    return tl.where(live, reward + discount * value, reward)


@triton.jit
def add_pairs(
    loss, slope, predicted, above, below, target, inside, inverse_kappa, half_kappa, PLAIN: tl.constexpr
):  # fmt: skip
    """Add pairs, [targets, rows, predicted], of predicted quantiles, [rows, predicted], and targets, [targets, rows].

    With d = predicted - target, huber(d) / kappa is part * (|d| - kappa / 2 * part), and its derivative by |d| is part.
    PLAIN is for kappa = 0, where part is 1. If inside is None, all targets are inside.
    """
    d = predicted[None, :, :] - target[:, :, None]
    if inside is not None:
        d = tl.where(inside[:, None, None], d, 0.0)
    size = tl.abs(d)
    part = tl.where(size != 0, 1.0, 0.0) if PLAIN else tl.minimum(size * inverse_kappa, 1.0)
    step = tl.where(d > 0, above[None, :, :], below[None, :, :]) * part  # with the sign of d
    return loss + tl.abs(step) * (size - half_kappa * part), slope + step


@triton.jit(do_not_specialize=["n", "m", "A", "K", "next_K", "choice_K", "splits", "count"])
def quantile_fwd_kernel(
    loss,  # (n, splits) with PER_ROW, else one sum a program: (programs,)
    td_error, slopes,  # (n,), (n, K)
    q, actions, rewards, weights,  # (n, A, K), (n,), (n,), (n,) or None
    next_q, chooser, next_action_mask,  # (m, A, K'); (m, A, K'') or, with VALUES, (m, A); (m, A) or None
    final, non_final,  # (n,) or None: true where the episode terminated; where it did not
    counts, checked,  # as in td_loss_fwd_kernel
    taus,  # (K,), (n, K), or None for the midpoints
    gamma, inverse_kappa, half_kappa, share,  # numbers; each pair counts for a share
    n, m, A, K, next_K, choice_K, splits,
    q_stride_row, q_stride_action, q_stride_column,
    next_stride_row, next_stride_action, next_stride_column,
    choice_stride_row, choice_stride_action, choice_stride_column,  # the first two in units of VEC
    mask_stride_row, mask_stride_action,
    tau_stride_row, tau_stride_column,
    count,  # the sum is divided by it: n for the mean
    GAMMA: tl.constexpr, PLAIN: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr, EVEN: tl.constexpr,  # EVEN: TARGETS divides K'
    MEAN_BLOCK: tl.constexpr,  # predicted quantiles that are averaged at once
    VALUES: tl.constexpr, ACTIONS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,  # of the choice
    COUNTED: tl.constexpr, COUNT_BLOCK: tl.constexpr,
    ACC: tl.constexpr, CHOICE_ACC: tl.constexpr,
):  # fmt: skip
    """Loss and slopes of BLOCK predicted quantiles of ROWS samples; the splits of a sample make the same choice."""
    split = tl.program_id(0) % splits
    row, inside, action, live, next_row, reward = load_samples(
        tl.program_id(0) // splits * ROWS,
        actions, rewards, final, non_final, counts, checked, n, m, A, ROWS, COUNTED, COUNT_BLOCK, ACC,
    )  # fmt: skip
    legal = inside & (action >= 0)  # [rows]
    discount = tl.zeros([ROWS], ACC) + load_discount(gamma, row, inside, GAMMA, ACC)

    choice_strides = (choice_stride_row, choice_stride_action, choice_stride_column)
    best, known = greedy(
        chooser, choice_strides, next_action_mask, (mask_stride_row, mask_stride_action), next_row, live, A, choice_K,
        None, VALUES, ACTIONS, COLUMNS, VEC, CHOICE_ACC,
    )  # fmt: skip
    reward = tl.where(live & (known == 0), float("nan"), reward)
    next_offset = next_row.to(tl.int64) * next_stride_row + best.to(tl.int64) * next_stride_action
    offset = row.to(tl.int64) * q_stride_row + action.to(tl.int64) * q_stride_action

    total = tl.zeros([ROWS, MEAN_BLOCK], ACC)
    for first in range(0, K, MEAN_BLOCK):
        i = first + tl.arange(0, MEAN_BLOCK)
        here = legal[:, None] & (i < K)[None, :]
        where = offset[:, None] + (i.to(tl.int64) * q_stride_column)[None, :]
        total += tl.load(q + where, mask=here, other=0.0).to(ACC)
    predicted_mean = tl.sum(total, 1) / K.to(ACC)

    i = split * BLOCK + tl.arange(0, BLOCK)
    here = inside[:, None] & (i < K)[None, :]  # [rows, predicted]
    where = offset[:, None] + (i.to(tl.int64) * q_stride_column)[None, :]
    predicted = tl.load(q + where, mask=here & legal[:, None], other=float("nan")).to(ACC)
    if taus is None:
        tau = quotient(i.to(ACC) + 0.5, K.to(ACC), ACC)[None, :] + tl.zeros([ROWS, BLOCK], ACC)
    else:
        where = (row.to(tl.int64) * tau_stride_row)[:, None] + (i.to(tl.int64) * tau_stride_column)[None, :]
        tau = tl.load(taus + where, mask=here, other=0.0).to(ACC)
    above = tl.abs(tau - 1)
    below = -tl.abs(tau)
    if PLAIN:
        inverse = 1.0
        half = 0.0
    else:
        inverse = scalar(inverse_kappa, ACC)
        half = scalar(half_kappa, ACC)
    losses = tl.zeros([TARGETS, ROWS, BLOCK], ACC)
    steps = tl.zeros([TARGETS, ROWS, BLOCK], ACC)
    total = tl.zeros([TARGETS, ROWS], ACC)
    body = next_K // TARGETS * TARGETS
    for first in range(0, body, TARGETS):
        j = first + tl.arange(0, TARGETS)[:, None]
        target = load_targets(
            next_q, next_offset[None, :], j, next_stride_column, live[None, :], live[None, :],
            reward[None, :], discount[None, :], ACC,
        )  # fmt: skip
        losses, steps = add_pairs(losses, steps, predicted, above, below, target, None, inverse, half, PLAIN)
        total += target
    if not EVEN:
        j = body + tl.arange(0, TARGETS)
        target = load_targets(
            next_q, next_offset[None, :], j[:, None], next_stride_column, live[None, :] & (j < next_K)[:, None],
            live[None, :], reward[None, :], discount[None, :], ACC,
        )  # fmt: skip
        losses, steps = add_pairs(losses, steps, predicted, above, below, target, j < next_K, inverse, half, PLAIN)
        total += tl.where((j < next_K)[:, None], target, 0.0)
    td = predicted_mean - tl.sum(total, 0) / next_K.to(ACC)
    td = tl.where(legal, td, float("nan"))
    tl.store(td_error + row, td, mask=row < tl.where(split == 0, n, 0))  # by the first split only
    each = tl.sum(losses, 0)  # [rows, predicted]
    slope = tl.sum(steps, 0)
    part = scalar(share, ACC)
    slope = tl.where(each == each, slope * part, float("nan"))  # the slope of a pair with NaN is not
    tl.store(slopes + row.to(tl.int64)[:, None] * K + i[None, :], slope, mask=here)
    sample = tl.sum(tl.where(here, each, 0.0), 1) * part
    if weights is not None:
        sample *= tl.load(weights + row, mask=inside, other=0.0).to(ACC)
    if PER_ROW:
        tl.store(loss + row.to(tl.int64) * splits + split, sample, mask=inside)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, sample, 0.0), 0) / count.to(ACC))
