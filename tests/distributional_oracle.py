"""What the oracles of the distributional losses share. As they, it shares no code with the package."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from bounds import Arithmetic, Number, Values
from torch import Tensor


def double(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def times(a: Values, b: Values, unit: float) -> Values:
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error + unit * np.abs(value)
    return Values(value, error)


class NextStates(NamedTuple):
    """The next states of n samples: whether each has none, and which row of those below is its own."""

    ended: np.ndarray  # (n,)
    row: np.ndarray  # (n,)
    following: np.ndarray  # (m, A, K')
    chooser: np.ndarray  # (m, A, K'') or (m, A)
    legal: np.ndarray | None  # (m, A)

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        A: int,
        following: Tensor,
        terminated: Tensor | None,
        non_final_mask: Tensor | None,
        online: Tensor | None,
        mask: Tensor | None,
    ) -> "NextStates":
        n = math.prod(shape)
        ended = ends(n, terminated, non_final_mask)
        row = np.arange(n) if non_final_mask is None else np.cumsum(~ended) - 1
        next_values = double(following).reshape(-1, A, following.shape[-1])
        chooser = next_values
        if online is not None:
            lead = len(shape) if non_final_mask is None else 1
            last = () if online.dim() == lead + 1 else (online.shape[-1],)
            chooser = double(online).reshape(len(next_values), A, *last)
        legal = None if mask is None else mask.reshape(len(next_values), A).numpy()
        return cls(ended, row, next_values, chooser, legal)


def ends(n: int, terminated: Tensor | None, non_final_mask: Tensor | None) -> np.ndarray:
    """Whether nothing is bootstrapped, (n,)."""
    if non_final_mask is not None:
        return ~non_final_mask.reshape(n).numpy()
    return np.zeros(n, bool) if terminated is None else double(terminated).reshape(n) != 0


def best_legal(values: np.ndarray, legal: np.ndarray | None) -> tuple[int | None, np.ndarray]:
    """First largest legal one of (A,), None where there is none, and all legal ones."""
    found = np.arange(len(values)) if legal is None else np.flatnonzero(legal)
    if not found.size or np.isnan(values[found]).any():
        return None, found
    best = int(found[values[found].argmax()])
    return (None if values[best] == -math.inf and legal is not None else best), found


def reduced(
    arithmetic: Arithmetic,
    each: Sequence[Number],
    slopes: Values,
    actions: np.ndarray,
    A: int,
    shape: tuple[int, ...],
    weights: Tensor | None,
    reduction: str,
    grad_loss: Tensor | None,
) -> tuple[Values, Values]:
    """The loss, of those of each sample, and its gradient, of their slopes (n, K), for an upstream gradient.

    The upstream gradient is ones if None.
    """
    (n, K), unit = slopes.value.shape, arithmetic.unit
    ws = [Number(1.0)] * n if weights is None else [arithmetic.given(x) for x in double(weights).reshape(-1)]
    losses = [arithmetic.multiply(w, x) for w, x in zip(ws, each, strict=True)]
    divisor = arithmetic.total(ws) if reduction == "weighted_mean" else Number({"mean": max(n, 1)}.get(reduction, 1))
    if reduction == "none":
        loss = Values.of(losses, shape)
    elif reduction == "sum":
        loss = Values.of([arithmetic.total(losses)], ())
    else:
        loss = Values.of([arithmetic.divide(arithmetic.total(losses), divisor) if n else Number(math.nan)], ())
    upstream = [1.0] * n if grad_loss is None else double(grad_loss.double().expand(shape)).reshape(-1)
    gradient = Values(np.zeros((n, A, K)), np.zeros((n, A, K)))
    for i, action in enumerate(actions):
        if 0 <= action < A:
            factor = arithmetic.divide(arithmetic.multiply(arithmetic.given(float(upstream[i])), ws[i]), divisor)
            factors = Values(np.float64(factor.value), np.float64(factor.error + unit * abs(factor.value)))
            row = times(Values(slopes.value[i], slopes.error[i]), factors, unit)
            gradient.value[i, action], gradient.error[i, action] = row
    return loss, Values(*(x.reshape(*shape, A, K) for x in gradient))


def as_double(x: Tensor | float) -> np.ndarray:
    """A number or a tensor as (1,) or (n,)."""
    return double(torch.as_tensor(x, dtype=torch.float64)).reshape(-1)
