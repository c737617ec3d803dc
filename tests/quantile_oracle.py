"""The quantile loss in float64, each number with a bound on what arithmetic may make of it (tests/bounds.py).

It shares no code with the package. ``eager`` is the loss as users write it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from bounds import Arithmetic, Number, Values, roundings
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype

HUBER = 9  # units of roundoff of huber(u) / kappa in parts of itself: a product of two factors, kappa and its inverse
SCALE = 4  # of a sum's division by K, K' and kappa, in any order


class Expected(NamedTuple):
    loss: Values
    td_error: Values
    gradient: Values


def _double(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _sums(terms: Values, unit: float) -> Values:
    """Sums along the last axis, in any order."""
    with np.errstate(invalid="ignore"):
        error = terms.error.sum(-1) + roundings(terms.value.shape[-1]) * unit * np.abs(terms.value).sum(-1)
        return Values(terms.value.sum(-1), np.nan_to_num(error, posinf=0.0))


def _product(a: Values, b: Values, unit: float) -> Values:
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error + unit * np.abs(value)
    return Values(value, error)


def _greedy(values: np.ndarray, size: np.ndarray, legal: np.ndarray | None, exact: bool) -> int | None:
    """First largest legal of the means (A,), given the errors that they may carry."""
    found = np.arange(len(values)) if legal is None else np.flatnonzero(legal)
    if not found.size or np.isnan(values[found]).any():
        return None
    best = int(found[values[found].argmax()])
    if values[best] == -math.inf and legal is not None:
        return None
    if not exact:
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
    q, following = _double(quantiles).reshape(n, A, K), _double(next_quantiles).reshape(-1, A, K2)
    acts = np.array([int(a) for a in actions.reshape(-1)], np.int64)
    ends = np.zeros(n, bool) if terminated is None else _double(terminated).reshape(n) != 0
    if non_final_mask is not None:
        ends = ~non_final_mask.reshape(n).numpy()
    rows = np.arange(n) if non_final_mask is None else np.cumsum(~ends) - 1
    chooser = following
    if next_quantiles_online is not None:
        ndim = len(shape) if non_final_mask is None else 1
        last = () if next_quantiles_online.dim() == ndim + 1 else (next_quantiles_online.shape[-1],)
        chooser = _double(next_quantiles_online).reshape(len(following), A, *last)
    masks = None if next_action_mask is None else next_action_mask.reshape(len(following), A).numpy()

    def column(x: Tensor | float, fill: int = n) -> Values:
        value = np.broadcast_to(_double(torch.as_tensor(x, dtype=torch.float64)).reshape(-1), (fill,)).astype(float)
        return Values(value, arithmetic.conversion(value))

    reward, discount = column(rewards), column(gamma)
    value = np.full((n, K2), np.nan)
    for i in range(n):
        if ends[i]:
            value[i] = 0
            continue
        row = chooser[rows[i]]
        with np.errstate(invalid="ignore"):
            size = roundings(row.shape[-1]) * unit * np.abs(row).mean(-1) if row.ndim == 2 else np.zeros(A)
            exact = row.ndim == 1 or bool((row * 64 == np.rint(row * 64)).all() and np.abs(row).max() < 256)
            means = row.mean(-1) if row.ndim == 2 else row
        best = _greedy(means, size, None if masks is None else masks[rows[i]], exact)
        if best is not None:
            value[i] = following[rows[i]][best]
    values = Values(value, arithmetic.conversion(value))
    bootstrap = _product(Values(discount.value[:, None], discount.error[:, None]), values, unit)
    target = reward.value[:, None] + np.where(ends[:, None], 0, bootstrap.value)
    target_error = reward.error[:, None] + np.where(ends[:, None], 0, bootstrap.error + unit * np.abs(target))

    legal = (acts >= 0) & (acts < A)
    theta = np.where(legal[:, None], q[np.arange(n), np.where(legal, acts, 0)], np.nan)
    d = theta[:, :, None] - target[:, None, :]  # (n, K, K')
    d_error = target_error[:, None, :] + unit * np.abs(d)
    tau = (np.arange(K) + 0.5) / K if taus is None else _double(taus)
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
        terms = _product(w, Values(huber, steep * d_error + HUBER * unit * huber), unit)
        slopes = _product(w, Values(slope, slope_error), unit)
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

    ws = [Number(1.0)] * n if weights is None else [arithmetic.given(x) for x in _double(weights).reshape(-1)]
    losses = [arithmetic.multiply(x, Number(v, e)) for x, v, e in zip(ws, each.value, each.error, strict=True)]
    divisor = arithmetic.total(ws) if reduction == "weighted_mean" else Number({"mean": max(n, 1)}.get(reduction, 1))
    if reduction == "none":
        result = Values.of(losses, shape)
    elif reduction == "sum":
        result = Values.of([arithmetic.total(losses)], ())
    else:
        result = Values.of([arithmetic.divide(arithmetic.total(losses), divisor) if n else Number(math.nan)], ())
    upstream = [1.0] * n if grad_loss is None else _double(grad_loss.double().expand(shape)).reshape(-1)
    grad, grad_error = np.zeros((n, A, K)), np.zeros((n, A, K))
    for i in range(n):
        if legal[i]:
            factor = arithmetic.divide(arithmetic.multiply(arithmetic.given(float(upstream[i])), ws[i]), divisor)
            factors = Values(np.float64(factor.value), np.float64(factor.error + unit * abs(factor.value)))
            row = _product(Values(gradient.value[i], gradient.error[i]), factors, unit)
            grad[i, acts[i]], grad_error[i, acts[i]] = row
    whole = (*shape, A, K)
    return Expected(result, td_error, Values(grad.reshape(whole), grad_error.reshape(whole)))


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
