"""Triton helpers that load what every loss takes of its samples, [rows]: action, next state, discount, gradient."""

import triton
import triton.language as tl

from .rows import scalar


@triton.jit
def legal_action(action, A):
    """The action, or -1 if it is outside [0, A); int32, which takes fewer registers."""
    action = action.to(tl.int64)
    return tl.where((action >= 0) & (action < A), action, -1).to(tl.int32)


@triton.jit
def load_action(actions, non_final, checked, fits, row, inside, A):
    """The action, or -1 if it is illegal or non_final does not fit the next states; stored in checked for backward."""
    action = legal_action(tl.load(actions + row, mask=inside, other=0), A)
    if non_final is not None:
        action = tl.where(fits, action, -1)
        if checked is not None:
            tl.store(checked + row, action.to(tl.int64), mask=inside)
    return action


@triton.jit
def load_next(final, non_final, row, inside, before):
    """Whether a sample has a next state, its row, and the number of true entries of non_final before the next rows."""
    live = inside
    next_row = row
    if non_final is not None:
        goes_on = tl.load(non_final + row, mask=inside, other=0).to(tl.int32)
        live = live & (goes_on != 0)
        next_row = before + tl.cumsum(goes_on, 0) - 1
        before += tl.sum(goes_on, 0)
    elif final is not None:
        live = live & (tl.load(final + row, mask=inside, other=1) == 0)
    return live, next_row, before


@triton.jit
def load_discount(gamma, row, inside, GAMMA: tl.constexpr, ACC: tl.constexpr):
    """The discount, [rows] or one for all: GAMMA says what gamma is."""
    if GAMMA == "number":
        discount = scalar(gamma, ACC)
    elif GAMMA == "scalar":
        discount = tl.load(gamma).to(ACC)
    else:
        discount = tl.load(gamma + row, mask=inside, other=0.0).to(ACC)
    return discount


@triton.jit
def sample_scale(grad_loss, weights, row, inside, count, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    """Derivative of the result by the unweighted loss of each sample; grad_loss is (), (n,), or None for ones."""
    scale = tl.full([], 1.0, ACC)
    if grad_loss is not None:
        scale = tl.load(grad_loss + row, mask=inside, other=0.0) if PER_ROW else tl.load(grad_loss)
    scale = scale / count.to(ACC)
    if weights is not None:
        scale = scale * tl.load(weights + row, mask=inside, other=0.0).to(ACC)
    return scale
