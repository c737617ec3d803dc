"""The quantile loss in float64, each number with a bound on what arithmetic may make of it (tests/bounds.py).

It shares no code with the package. ``eager`` is the loss as users write it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from bounds import Arithmetic, Number, Values, roundings
from distributional_oracle import NextStates, as_double, best_legal, double, reduced, times
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype

HUBER = 9  # units of roundoff of huber(u) / kappa in parts of itself: a product of two factors, kappa and its inverse
SCALE = 4  # of a sum's division by K, K' and kappa, in any order


class Expected(NamedTuple):
    loss: Values
    td_error: Values
    gradient: Values


def _sums(terms: Values, unit: float) -> Values:
    """Sums along the last axis, in any order."""
    with np.errstate(invalid="ignore"):
        error = terms.error.sum(-1) + roundings(terms.value.shape[-1]) * unit * np.abs(terms.value).sum(-1)
        return Values(terms.value.sum(-1), np.nan_to_num(error, posinf=0.0))


def _greedy(values: np.ndarray, size: np.ndarray, legal: np.ndarray | None, exact: bool) -> int | None:
    """First largest legal of the means (A,), given the errors that they may carry."""
    best, found = best_legal(values, legal)
    if best is not None and not exact:
        near = [j for j in found if j != best and values[j] + size[j] >= values[best] - size[best]]
        assert not near, f"test data: which of the actions {[best, *near]} is the greedy one is a matter of rounding"
    return best


def quantile_oracle(
    quantiles: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_quantiles: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    taus: Tensor | None = None,
    next_quantiles_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    kappa: float = 1.0,
    quantile_reduction: str = "sum",
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
) -> Expected:
    """Loss, TD errors and the gradient for an upstream gradient (ones if None), by the definition."""
    *lead, A, K = quantiles.shape
    n, shape = math.prod(lead), tuple(lead)
    K2 = next_quantiles.shape[-1]
    arithmetic = Arithmetic(accumulation_dtype(quantiles))
    unit = arithmetic.unit
    q, acts = double(quantiles).reshape(n, A, K), np.array([int(a) for a in actions.reshape(-1)], np.int64)
    following = NextStates.of(
        shape, A, next_quantiles, terminated, non_final_mask, next_quantiles_online, next_action_mask
    )
    ended = following.ended

    def column(x: Tensor | float, fill: int = n) -> Values:
        value = np.broadcast_to(as_double(x), (fill,)).astype(float)
        return Values(value, arithmetic.conversion(value))

    reward, discount = column(rewards), column(gamma)
    value = np.full((n, K2), np.nan)
    for i in range(n):
        if ended[i]:
            value[i] = 0
            continue
        own = following.row[i]
        row = following.chooser[own]
        with np.errstate(invalid="ignore"):
            size = roundings(row.shape[-1]) * unit * np.abs(row).mean(-1) if row.ndim == 2 else np.zeros(A)
            exact = row.ndim == 1 or bool((row * 64 == np.rint(row * 64)).all() and np.abs(row).max() < 256)
            means = row.mean(-1) if row.ndim == 2 else row
        best = _greedy(means, size, None if following.legal is None else following.legal[own], exact)
        if best is not None:
            value[i] = following.following[own][best]
    values = Values(value, arithmetic.conversion(value))
    bootstrap = times(Values(discount.value[:, None], discount.error[:, None]), values, unit)
    target = reward.value[:, None] + np.where(ended[:, None], 0, bootstrap.value)
    target_error = reward.error[:, None] + np.where(ended[:, None], 0, bootstrap.error + unit * np.abs(target))

    legal = (acts >= 0) & (acts < A)
    theta = np.where(legal[:, None], q[np.arange(n), np.where(legal, acts, 0)], np.nan)
    d = theta[:, :, None] - target[:, None, :]  # (n, K, K')
    d_error = target_error[:, None, :] + unit * np.abs(d)
    tau = (np.arange(K) + 0.5) / K if taus is None else double(taus)
    tau = np.broadcast_to(tau.reshape(-1, K), (n, K))
    tau_error = (2 * unit * tau if taus is None else arithmetic.conversion(tau))[:, :, None]
    above, below = np.abs(tau - 1)[:, :, None], np.abs(tau)[:, :, None]
    w = Values(np.where(d > 0, above, below), tau_error + unit * above)
    either, unsure = np.maximum(above, below), np.abs(d) <= d_error  # the sign of u is a matter of rounding

    size = np.abs(d)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if kappa > 0:
            huber = np.where(size < kappa, d * d / (2 * kappa), size - kappa / 2)
            steep = np.minimum(1, (size + d_error) / kappa)
            slope = np.clip(d / kappa, -1, 1)
            edge = size - d_error > kappa * (1 + 8 * unit)
            slope_error = np.where(edge, 0, d_error / kappa + 3 * unit * np.abs(slope))
            jump = either * np.minimum(1, 2 * d_error / kappa)
        else:
            huber, steep, slope = size, 1.0, np.sign(d)
            slope_error, jump = np.zeros_like(d), 2 * either
        slope = np.where(np.isnan(d), np.nan, slope)
        terms = times(w, Values(huber, steep * d_error + HUBER * unit * huber), unit)
        slopes = times(w, Values(slope, slope_error), unit)
    terms = Values(terms.value, terms.error + np.where(unsure, either * 2 * d_error, 0))
    slopes = Values(slopes.value, slopes.error + np.where(unsure, jump, 0))

    parts = K if quantile_reduction == "mean" else 1
    rows_of_loss = _sums(terms, unit)
    each = _sums(rows_of_loss, unit)
    scale = SCALE * unit
    each = Values(each.value / (K2 * parts), (each.error + scale * np.abs(each.value)) / (K2 * parts))
    gradient = _sums(slopes, unit)
    gradient = Values(gradient.value / (K2 * parts), (gradient.error + scale * np.abs(gradient.value)) / (K2 * parts))

    means = [_sums(Values(theta, np.zeros_like(theta)), unit), _sums(Values(target, target_error), unit)]
    predicted, wanted = (
        Values(x.value / k, (x.error + unit * np.abs(x.value)) / k) for x, k in zip(means, (K, K2), strict=True)
    )
    td = predicted.value - wanted.value
    td_error = Values(td.reshape(shape), (predicted.error + wanted.error + unit * np.abs(td)).reshape(shape))

    losses = [Number(*x) for x in zip(*each, strict=True)]
    loss, gradient = reduced(arithmetic, losses, gradient, acts, A, shape, weights, reduction, grad_loss)
    return Expected(loss, td_error, gradient)


def eager(
    quantiles: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_quantiles: Tensor,
    terminated: Tensor,
    gamma: float = 0.99,
    *,
    kappa: float = 1.0,
) -> Tensor:
    """The loss of QR-DQN as users write it, in the dtype the tensors have."""
    n, _, K = quantiles.shape
    batch = torch.arange(n)
    with torch.no_grad():
        best = next_quantiles.mean(2).argmax(1)
        target = rewards[:, None] + gamma * (1 - terminated[:, None]) * next_quantiles[batch, best]
    u = target[:, None, :] - quantiles[batch, actions][:, :, None]
    tau = (torch.arange(K, dtype=quantiles.dtype) + 0.5) / K
    huber = torch.where(u.abs() <= kappa, 0.5 * u**2, kappa * (u.abs() - 0.5 * kappa))
    return ((tau[None, :, None] - (u.detach() < 0).to(u.dtype)).abs() * huber / kappa).mean(2).sum(1).mean()
