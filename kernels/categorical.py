"""Triton kernel: forward of the categorical losses, one sample after the other.

Shapes in the comments: n samples, m next states, A actions, K atoms.
"""

import triton
import triton.language as tl

from .atoms import atom_values, ends_of, gauss, position_of, quotient, shares, softmax_parts, two_hot
from .greedy import greedier, legal_actions, no_action
from .mask import count_before
from .rows import NO_COLUMN, scalar
from .td_loss import legal_action


@triton.jit
def best_expectation(
    x, offset, stride_action, stride_atom, mask, mask_offset, mask_stride, z, A, K,
    ACTIONS: tl.constexpr, ATOMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Largest expectation of the softmax of a next state's legal actions, and the first of them that has it."""
    atom = tl.arange(0, ATOMS)
    best = tl.full([], float("-inf"), ACC)
    index = tl.full([], NO_COLUMN, tl.int32)
    for first in range(0, A, ACTIONS):
        action = first + tl.arange(0, ACTIONS)
        legal = legal_actions(mask, mask_offset, mask_stride, action, A)
        here = offset + action.to(tl.int64)[:, None] * stride_action + atom.to(tl.int64)[None, :] * stride_atom
        inside = legal[:, None] & (atom < K)[None, :]
        _, power, total = softmax_parts(tl.load(x + here, mask=inside, other=float("-inf")).to(ACC), ACC)
        best, index = greedier(best, index, tl.sum(power * z[None, :], 1) / total, action, legal)
    return best, index


@triton.jit
def best_value(x, offset, stride, mask, mask_offset, mask_stride, A, ACTIONS: tl.constexpr, ACC: tl.constexpr):
    """Largest Q-value of a next state's legal actions, and the first of them that has it."""
    best = tl.full([], float("-inf"), ACC)
    index = tl.full([], NO_COLUMN, tl.int32)
    for first in range(0, A, ACTIONS):
        action = first + tl.arange(0, ACTIONS)
        legal = legal_actions(mask, mask_offset, mask_stride, action, A)
        value = tl.load(x + offset + action.to(tl.int64) * stride, mask=legal, other=float("-inf")).to(ACC)
        best, index = greedier(best, index, value, action, legal)
    return best, index


@triton.jit
def projected(
    x, offset, stride, unknown, reward, discount, low, high, per_unit, support, support_stride, v_min, v_max, step, K,
    ATOMS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The distribution softmax(x) at reward + discount * z, shared between the atoms beside each location, [atoms].

    Each atom asks all probabilities how much of them it has, a chunk of them at a time: no scatter, no atomics.
    """
    atom = tl.arange(0, ATOMS)
    logit = tl.load(x + offset + atom.to(tl.int64) * stride, mask=atom < K, other=float("-inf")).to(ACC)
    largest = tl.max(logit, 0)
    total = tl.sum(tl.exp(logit - largest), 0)
    inverse = tl.where(unknown, float("nan"), quotient(tl.full([], 1.0, ACC), total, ACC))
    last = (K - 1).to(ACC)
    place = atom.to(ACC)[:, None]
    target = tl.zeros([ATOMS], ACC)
    for first in range(0, K, CHUNK):
        j = first + tl.arange(0, CHUNK)
        there = j < K
        some = tl.load(x + offset + j.to(tl.int64) * stride, mask=there, other=float("-inf")).to(ACC)
        p = tl.exp(some - largest) * inverse
        z = atom_values(j, support, support_stride, v_min, v_max, step, K, ACC)
        position = tl.where(there, position_of(reward + discount * z, low, high, per_unit, last), 0.0)
        lower, share = shares(position, last)
        below = (1 - share) * p
        above = share * p
        pairs = tl.where(place == (lower + 1)[None, :], above[None, :], 0.0)
        target += tl.sum(tl.where(place == lower[None, :], below[None, :], pairs), 1)  # [atoms, chunk]
    return target


@triton.jit(do_not_specialize=["n", "m", "count"])
def categorical_fwd_kernel(
    loss,  # (n,) with PER_ROW, else one sum a program: (programs,)
    values, slopes,  # (2, n): TD errors and expectations; (n, K)
    q, actions, rewards, weights,  # (n, A, K), (n,), (n,), (n,) or None
    next_q, next_q_online, next_action_mask,  # (m, A, K), (m, A, K) or (m, A), (m, A); or None
    final, non_final,  # (n,) or None: true where the episode terminated; where it did not
    counts, checked,  # of non_final, see mask.py; (n,) int64 or None: actions, -1 if non_final has not m true entries
    gamma,  # number, () or (n,)
    support,  # (K,), or None for K atoms of a distance of step from v_min to v_max
    v_min, v_max, step, gauss_scale,  # numbers; None where they mean nothing
    n, m, A, K,
    q_stride_sample, q_stride_action, q_stride_atom,
    next_stride_sample, next_stride_action, next_stride_atom,
    online_stride_sample, online_stride_action, online_stride_atom,
    mask_stride_sample, mask_stride_action,
    support_stride,
    count,  # the sum is divided by it: n for the mean
    CHOICE: tl.constexpr,  # by "expectation" or by "value"; None without next_q
    GAMMA: tl.constexpr, PER_ROW: tl.constexpr,
    TILES: tl.constexpr, ACTIONS: tl.constexpr, ATOMS: tl.constexpr, CHUNK: tl.constexpr,
    COUNTED: tl.constexpr, COUNT_BLOCK: tl.constexpr,  # entries of non_final: of a count, and read at once
    ACC: tl.constexpr, CHOICE_ACC: tl.constexpr,  # of the arithmetic, and of the comparison of Q-values
):  # fmt: skip
    """Loss, TD error, expectation and slopes of TILES samples."""
    atom = tl.arange(0, ATOMS)
    z = atom_values(atom, support, support_stride, v_min, v_max, step, K, ACC)
    low, high, per_unit = ends_of(support, support_stride, v_min, v_max, K, ACC)
    last = (K - 1).to(ACC)
    before = 0
    fits = True
    if non_final is not None:
        true, before = count_before(non_final, counts, tl.program_id(0) * TILES, n, COUNTED, COUNT_BLOCK)
        fits = true == m
    sum_of_losses = tl.full([], 0.0, ACC)
    for tile in tl.range(0, TILES, disable_licm=True):
        row = tl.program_id(0) * TILES + tile
        inside = row < n
        action = legal_action(tl.load(actions + row, mask=inside, other=0), A)
        if non_final is not None:
            action = tl.where(fits, action, -1)
            if checked is not None:
                tl.store(checked + row, action.to(tl.int64), mask=inside)
        legal = inside & (action >= 0)
        reward = tl.load(rewards + row, mask=inside, other=0).to(ACC)

        if gauss_scale is not None:
            target = gauss(position_of(reward, low, high, per_unit, last), atom, scalar(gauss_scale, ACC), K, ACC)
        else:
            target = two_hot(position_of(reward, low, high, per_unit, last), atom, last, ACC)
        if CHOICE is not None:
            live = inside
            next_row = row
            if non_final is not None:
                live = inside & (tl.load(non_final + row, mask=inside, other=0) != 0)
                next_row = before
                before += live.to(tl.int32)
            elif final is not None:
                live = inside & (tl.load(final + row, mask=inside, other=1) == 0)
            if live & (next_row < m):
                mask_offset = 0
                if next_action_mask is not None:
                    mask_offset = next_row.to(tl.int64) * mask_stride_sample
                offset = next_row.to(tl.int64) * next_stride_sample
                if CHOICE == "value":
                    best, index = best_value(
                        next_q_online, next_row.to(tl.int64) * online_stride_sample, online_stride_action,
                        next_action_mask, mask_offset, mask_stride_action, A, ACTIONS, CHOICE_ACC,
                    )  # fmt: skip
                elif next_q_online is not None:
                    best, index = best_expectation(
                        next_q_online, next_row.to(tl.int64) * online_stride_sample,
                        online_stride_action, online_stride_atom,
                        next_action_mask, mask_offset, mask_stride_action, z, A, K, ACTIONS, ATOMS, ACC,
                    )  # fmt: skip
                else:
                    best, index = best_expectation(
                        next_q, offset, next_stride_action, next_stride_atom,
                        next_action_mask, mask_offset, mask_stride_action, z, A, K, ACTIONS, ATOMS, ACC,
                    )  # fmt: skip
                unknown = no_action(best, next_action_mask is not None)
                offset += tl.where(unknown, 0, index).to(tl.int64) * next_stride_action
                if GAMMA == "number":
                    discount = scalar(gamma, ACC)
                elif GAMMA == "scalar":
                    discount = tl.load(gamma).to(ACC)
                else:
                    discount = tl.load(gamma + row).to(ACC)
                target = projected(
                    next_q, offset, next_stride_atom, unknown, reward, discount, low, high, per_unit,
                    support, support_stride, v_min, v_max, step, K, ATOMS, CHUNK, ACC,
                )  # fmt: skip

        here = row.to(tl.int64) * q_stride_sample + action.to(tl.int64) * q_stride_action
        here += atom.to(tl.int64) * q_stride_atom
        logit = tl.load(q + here, mask=atom < tl.where(legal, K, 0), other=float("-inf")).to(ACC)
        gap, power, total = softmax_parts(logit, ACC)
        # An atom without a target does not count, whatever its logit is.
        sample = -tl.sum(tl.where(target == 0, 0.0, target * (gap - tl.log(total))), 0)
        mean = quotient(tl.sum(power * z, 0), total, ACC)
        factor = quotient(tl.sum(target, 0), total, ACC)
        td_error = tl.where(legal, mean - tl.sum(target * z, 0), float("nan"))
        tl.store(values + row, td_error, mask=inside)
        tl.store(values + n.to(tl.int64) + row, mean, mask=inside)
        tl.store(slopes + row.to(tl.int64) * K + atom, power * factor - target, mask=atom < tl.where(inside, K, 0))
        if weights is not None:
            sample *= tl.load(weights + row, mask=inside, other=0.0).to(ACC)
        if PER_ROW:
            tl.store(loss + row, sample, mask=inside)
        else:
            sum_of_losses += tl.where(inside, sample, 0.0)
    if not PER_ROW:
        tl.store(loss + tl.program_id(0), sum_of_losses / count.to(ACC))
