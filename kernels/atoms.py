"""Triton helpers for distributions on evenly spaced atoms, the support. Positions count atoms: atom j is at j."""

import triton
import triton.language as tl

from .rows import scalar


@triton.jit
def quotient(a, b, ACC: tl.constexpr):
    """a / b rounded once, which `/` is not in float32."""
    return a / b if tl.float64 == ACC else tl.div_rn(a, b)


@triton.jit
def atom_values(atom, support, stride, v_min, v_max, step, K, ACC: tl.constexpr):
    """The atoms, 0 behind the last one: those of a tensor, (K,), or from v_min to v_max, where both ends are exact."""
    if support is not None:
        z = tl.load(support + atom.to(tl.int64) * stride, mask=atom < K, other=0.0).to(ACC)
    else:
        width = scalar(step, ACC)
        below = scalar(v_min, ACC) + width * atom.to(ACC)
        above = scalar(v_max, ACC) - width * (K - 1 - atom).to(ACC)
        z = tl.where(atom < K, tl.where(2 * atom < K, below, above), 0.0)
    return z


@triton.jit
def ends_of(support, stride, v_min, v_max, K, ACC: tl.constexpr):
    """The first and the last atom, and how many positions a value of 1 spans."""
    if support is not None:
        low = tl.load(support).to(ACC)
        high = tl.load(support + (K - 1).to(tl.int64) * stride).to(ACC)
    else:
        low = scalar(v_min, ACC)
        high = scalar(v_max, ACC)
    return low, high, quotient((K - 1).to(ACC), high - low, ACC)


@triton.jit
def softmax_parts(x):
    """For logits, [rows, atoms]: their distances from the row's largest, the exponentials of these, and their sums.

    A sum is NaN, and so is everything computed from it, if a logit of the row is NaN or inf, or if all are -inf.
    """
    gap = x - tl.max(x, 1)[:, None]
    power = tl.exp(gap)
    return gap, power, tl.sum(power, 1)


@triton.jit
def expectation_of_rows(x, offset, stride, inside, z, K, VEC: tl.constexpr, ACC: tl.constexpr):
    """Expectations of the softmax of rows of K logits, which begin at the offsets, [rows, actions]."""
    atom = tl.arange(0, z.shape[0])
    # Compared by vector, not by element: a mask that is constant over 16 bytes keeps the load whole.
    here = inside[:, :, None] & (atom // VEC < K // VEC)[None, None, :]
    where = offset[:, :, None] + (atom.to(tl.int64) * stride)[None, None, :]
    x = tl.load(x + where, mask=here, other=float("-inf")).to(ACC)  # [rows, actions, atoms]
    power = tl.exp(x - tl.max(x, 2)[:, :, None])
    return tl.sum(power * z[None, None, :], 2) / tl.sum(power, 2)


@triton.jit
def position_of(value, low, high, per_unit, last):
    """Positions of values. Those beyond an end are moved to it; the ends are exact. NaN stays NaN."""
    position = (tl.where(value < low, low, value) - low) * per_unit
    return tl.where((value >= high) | (position > last), last, position)


@triton.jit
def shares(position, last):
    """The atom below each position, at most the last but one, and the share of the probability that the next atom gets.

    A position on an atom, the last one included, gives that atom everything. NaN reaches the share.
    """
    lower = tl.floor(position)
    lower = tl.where(lower < last, lower, last - 1)
    return lower, position - lower


@triton.jit
def two_hot(position, atom, last):
    """Probabilities, [rows, atoms], of positions, [rows], split between two atoms; atom has the positions' dtype."""
    lower, share = shares(position[:, None], last)
    return tl.where(atom[None, :] == lower, 1 - share, tl.where(atom[None, :] == lower + 1, share, 0.0))


@triton.jit
def gauss(position, atom, scale, last):
    """Normal distributions around positions, [rows], integrated over the bins around the atoms, [rows, atoms].

    scale is 1 / (sqrt(2) sigma). What lies outside all bins is distributed over them in proportion.
    """
    inside = tl.erf((atom[None, :] + 0.5 - position[:, None]) * scale)
    inside -= tl.erf((atom[None, :] - 0.5 - position[:, None]) * scale)
    whole = tl.erf((last + 0.5 - position) * scale) - tl.erf((-0.5 - position) * scale)
    return tl.where(atom[None, :] <= last, inside / whole[:, None], 0.0)
