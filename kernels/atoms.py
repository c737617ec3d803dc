"""Triton helpers of distributions on evenly spaced atoms, the support. Where it says position, atom j is at j."""

import triton
import triton.language as tl

from .rows import scalar


@triton.jit
def quotient(a, b, ACC: tl.constexpr):
    """a / b rounded once, which `/` is not in float32."""
    if tl.float64 == ACC:
        result = a / b
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def atom_values(atom, support, stride, v_min, v_max, step, K, ACC: tl.constexpr):
    """Atoms of a support, 0 for those behind the last: as given, (K,), or from end to end, both of which are exact."""
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
    """First and last atom, and positions in a unit of their values."""
    if support is not None:
        low = tl.load(support).to(ACC)
        high = tl.load(support + (K - 1).to(tl.int64) * stride).to(ACC)
    else:
        low = scalar(v_min, ACC)
        high = scalar(v_max, ACC)
    return low, high, quotient((K - 1).to(ACC), high - low, ACC)


@triton.jit
def softmax_parts(x, ACC: tl.constexpr):
    """Of rows of logits, in their last dimension: x - largest, the exponentials, and the sum of them.

    The sum is NaN, as is then all that is made of it, where a logit is NaN or inf, and where all of them are -inf.
    """
    axis: tl.constexpr = len(x.shape) - 1
    gap = x - tl.expand_dims(tl.max(x, axis), axis)
    power = tl.exp(gap)
    return gap, power, tl.sum(power, axis)


@triton.jit
def position_of(value, low, high, per_unit, last):
    """Position of values; those beyond an end are moved to it, and the ends are exact. NaN stays NaN."""
    position = (tl.where(value < low, low, value) - low) * per_unit
    return tl.where((value >= high) | (position > last), last, position)


@triton.jit
def shares(position, last):
    """The atom below positions, at most the last but one, and how much of the next one's a probability there is.

    So a position on an atom, also on the last one, gives it everything. NaN reaches the share.
    """
    lower = tl.floor(position)
    lower = tl.where(lower < last, lower, last - 1)
    return lower, position - lower


@triton.jit
def two_hot(position, atom, last, ACC: tl.constexpr):
    """A scalar position shared between the two atoms beside it, [atoms]."""
    lower, share = shares(position, last)
    place = atom.to(ACC)
    return tl.where(place == lower, 1 - share, tl.where(place == lower + 1, share, 0.0))


@triton.jit
def gauss(position, atom, scale, K, ACC: tl.constexpr):
    """A normal distribution around a scalar position, cut into bins around the atoms, [atoms].

    scale is 1 / (sqrt(2) sigma). What falls outside of all bins is shared out among them.
    """
    place = atom.to(ACC)
    inside = tl.erf((place + 0.5 - position) * scale) - tl.erf((place - 0.5 - position) * scale)
    whole = tl.erf((K.to(ACC) - 0.5 - position) * scale) - tl.erf((-0.5 - position) * scale)
    return tl.where(atom < K, inside / whole, 0.0)
