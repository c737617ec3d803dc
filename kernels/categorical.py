"""Triton kernel: forward of the categorical losses. Pairs of atoms never leave the registers.

Shapes in the comments: n samples, m next states, A actions, K atoms.
"""

import triton
import triton.language as tl

from .atoms import atom_values, ends_of, gauss, position_of, quotient, shares, softmax_parts, two_hot
from .distributions import greedy, load_samples
from .rows import scalar
from .samples import load_discount


@triton.jit
def project(
    x, offset, stride, live, total, largest, reward, discount, low, high, per_unit,
    support, support_stride, v_min, v_max, step, K,
    ATOMS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The distributions softmax(x), moved to reward + discount * z and projected onto the atoms, [rows, atoms].

    Each atom adds up its shares of one chunk of probabilities after another: no scatter, no atomics.
    """
    last = (K - 1).to(ACC)
    place = tl.arange(0, ATOMS).to(ACC)[None, None, :]
    inverse = quotient(tl.full([1, 1], 1.0, ACC), total[None, :], ACC)
    target = tl.zeros([total.shape[0], ATOMS], ACC)
    for first in tl.range(0, K, CHUNK, disable_licm=True):
        j = first + tl.arange(0, CHUNK)
        there = (j < K)[:, None] & live[None, :]  # [chunk, rows]
        here = offset[None, :] + (j.to(tl.int64) * stride)[:, None]
        p = tl.exp(tl.load(x + here, mask=there, other=float("-inf")).to(ACC) - largest[None, :]) * inverse
        z = atom_values(j, support, support_stride, v_min, v_max, step, K, ACC)
        position = position_of(reward[None, :] + discount[None, :] * z[:, None], low, high, per_unit, last)
        lower, share = shares(tl.where(there, position, 0.0), last)
        below = (1 - share) * p
        above = share * p
        pairs = tl.where(place == (lower + 1)[:, :, None], above[:, :, None], 0.0)  # [chunk, rows, atoms]
        target += tl.sum(tl.where(place == lower[:, :, None], below[:, :, None], pairs), 0)
    return target


@triton.jit(do_not_specialize=["n", "m", "count"])
def categorical_fwd_kernel(
    loss,  # (n,) with PER_ROW, else one sum a program: (programs,)
    values, slopes,  # (2, n): TD errors and expectations; (n, K)
    q, actions, rewards, weights,  # (n, A, K), (n,), (n,), (n,) or None
    next_q, chooser, next_action_mask,  # (m, A, K); (m, A, K) or, with VALUES, (m, A); (m, A); or None
    final, non_final,  # (n,) or None: true where the episode terminated; where it did not
    counts, checked,  # as in td_loss_fwd_kernel
    support, v_min, v_max, step,  # as in atom_values
    gamma, gauss_scale,  # number, () or (n,); number or None
    n, m, A, K,
    q_stride_row, q_stride_action, q_stride_column,
    next_stride_row, next_stride_action, next_stride_column,
    choice_stride_row, choice_stride_action, choice_stride_column,  # the first two in units of VEC
    mask_stride_row, mask_stride_action, support_stride,
    count,  # the sum is divided by it: n for the mean
    GAMMA: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr, CHUNK: tl.constexpr,
    VALUES: tl.constexpr, ACTIONS: tl.constexpr, VEC: tl.constexpr,  # of the choice
    COUNTED: tl.constexpr, COUNT_BLOCK: tl.constexpr,
    ACC: tl.constexpr, CHOICE_ACC: tl.constexpr,
):  # fmt: skip
    """Loss, TD errors, expectations and slopes of ROWS samples."""
    row, inside, action, live, next_row, reward = load_samples(
        tl.program_id(0) * ROWS,
        actions, rewards, final, non_final, counts, checked, n, m, A, ROWS, COUNTED, COUNT_BLOCK, ACC,
    )  # fmt: skip
    legal = inside & (action >= 0)  # [rows]

    atom = tl.arange(0, ATOMS)
    place = atom.to(ACC)
    z = atom_values(atom, support, support_stride, v_min, v_max, step, K, ACC)
    low, high, per_unit = ends_of(support, support_stride, v_min, v_max, K, ACC)
    last = (K - 1).to(ACC)
    position = position_of(reward, low, high, per_unit, last)
    if gauss_scale is not None:
        target = gauss(position, place, scalar(gauss_scale, ACC), last)  # [rows, atoms]
    else:
        target = two_hot(position, place, last)
    if next_q is not None:
        choice_strides = (choice_stride_row, choice_stride_action, choice_stride_column)
        best, known = greedy(
            chooser, choice_strides, next_action_mask, (mask_stride_row, mask_stride_action), next_row, live, A, K,
            z, VALUES, ACTIONS, ATOMS, VEC, CHOICE_ACC,
        )  # fmt: skip
        offset = next_row.to(tl.int64) * next_stride_row + best.to(tl.int64) * next_stride_action
        here = offset[:, None] + (atom.to(tl.int64) * next_stride_column)[None, :]
        logit = tl.load(next_q + here, mask=live[:, None] & (atom < K)[None, :], other=float("-inf")).to(ACC)
        largest = tl.max(logit, 1)
        total = tl.where(known, tl.sum(tl.exp(logit - largest[:, None]), 1), float("nan"))
        discount = tl.zeros([ROWS], ACC) + load_discount(gamma, row, inside, GAMMA, ACC)
        moved = project(
            next_q, offset, next_stride_column, live, total, largest, reward, discount, low, high, per_unit,
            support, support_stride, v_min, v_max, step, K, ATOMS, CHUNK, ACC,
        )  # fmt: skip
        # Selected, not multiplied: the values of a terminated row never reach the target.
        target = tl.where(live[:, None], moved, target)

    offset = row.to(tl.int64) * q_stride_row + action.to(tl.int64) * q_stride_action
    here = offset[:, None] + (atom.to(tl.int64) * q_stride_column)[None, :]
    logit = tl.load(q + here, mask=legal[:, None] & (atom < K)[None, :], other=float("-inf")).to(ACC)
    gap, power, total = softmax_parts(logit)
    # An atom whose target is 0 does not count, whatever its logit is.
    sample = -tl.sum(tl.where(target == 0, 0.0, target * (gap - tl.log(total)[:, None])), 1)
    mean = quotient(tl.sum(power * z[None, :], 1), total, ACC)
    factor = quotient(tl.sum(target, 1), total, ACC)
    tl.store(values + row, mean - tl.sum(target * z[None, :], 1), mask=inside)
    tl.store(values + n.to(tl.int64) + row, mean, mask=inside)
    here = row.to(tl.int64)[:, None] * K + atom[None, :]
    tl.store(slopes + here, power * factor[:, None] - target, mask=inside[:, None] & (atom < K)[None, :])
    if weights is not None:
        sample *= tl.load(weights + row, mask=inside, other=0.0).to(ACC)
    if PER_ROW:
        tl.store(loss + row, sample, mask=inside)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, sample, 0.0), 0) / count.to(ACC))
