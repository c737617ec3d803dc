"""Triton helpers that find the greedy action of one next state, a tile of its actions at a time."""

import triton
import triton.language as tl

from .rows import NO_COLUMN, nan_max


@triton.jit
def legal_actions(mask, offset, stride, action, A):
    """Which actions, [actions], are there and legal; offset is that of the mask's row."""
    legal = action < A
    if mask is not None:
        legal = legal & (tl.load(mask + offset + action.to(tl.int64) * stride, mask=legal, other=0) != 0)
    return legal


@triton.jit
def greedier(best, index, value, action, legal):
    """The largest of best and of the legal actions' values, [actions], NaN if there is one, and where it first stands.

    To begin with there are -inf and NO_COLUMN. They are selected, whatever the value of an illegal action is.
    """
    value = tl.where(legal, value, float("-inf"))
    largest = tl.reduce(value, 0, nan_max)
    first = tl.min(tl.where(legal & (value == largest), action, NO_COLUMN), 0)
    index = tl.where((largest > best) | ((largest == best) & (first < index)), first, index)
    return nan_max(best, largest), index


@triton.jit
def no_action(best, MASKED: tl.constexpr):
    """Whether there is no greedy action: a legal value is NaN, or beside a mask none is above -inf."""
    none = best != best
    if MASKED:
        none = none | (best == float("-inf"))
    return none
