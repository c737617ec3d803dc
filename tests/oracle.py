"""The loss in float64 as nested loops over Python numbers: shares no code and no operation with the package."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import Munchausen, Soft


class Expected(NamedTuple):
    loss: np.ndarray
    td_error: np.ndarray
    grad_q: np.ndarray
    cql: np.ndarray


def _values(x: Tensor) -> list[Any]:
    return x.detach().cpu().reshape(-1).tolist()


def _matrix(x: Tensor) -> list[list[float]]:
    return x.detach().cpu().double().reshape(-1, x.shape[-1]).tolist()


def _rows(x: Tensor | None) -> Iterator[Any]:
    return itertools.repeat(None) if x is None else iter(_matrix(x))


def _log_sum(row: list[float], mask: list[float] | None, temperature: float = 1.0) -> float:
    """temperature * log(sum of exp(x / temperature)) over the legal actions; NaN without one."""
    legal = [x for j, x in enumerate(row) if mask is None or mask[j]]
    if any(math.isnan(x) for x in legal) or not legal:
        return math.nan
    largest = max(legal)
    if largest == -math.inf:
        return -math.inf if mask is None else math.nan
    if largest == math.inf:
        return math.inf
    return largest + temperature * math.log(math.fsum(math.exp((x - largest) / temperature) for x in legal))


def _first_largest(row: list[float], mask: list[float] | None) -> int | None:
    """Index of the first largest legal action; None for NaN, or without a legal one."""
    legal = [(x, j) for j, x in enumerate(row) if mask is None or mask[j]]
    if any(math.isnan(x) for x, _ in legal) or not legal:
        return None
    largest = max(x for x, _ in legal)
    if largest == -math.inf and mask is not None:
        return None
    return next(j for x, j in legal if x == largest)


def _rho(td: float, loss: str, delta: float) -> tuple[float, float]:
    """Loss of a TD error, and its derivative."""
    if math.isnan(td):
        return math.nan, math.nan
    if loss == "mse":
        return td * td, 2 * td
    sign = math.copysign(1, td) if td else 0.0
    value, slope = (td * td / 2, td) if abs(td) < delta else (delta * (abs(td) - delta / 2), delta * sign)
    if loss == "huber":
        return value, slope
    return (value / delta, slope / delta) if delta else (abs(td), sign)


def oracle(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | None,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    next_q_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    target_q: Tensor | None = None,
    cql_alpha: float = 0.0,
    action_mask: Tensor | None = None,
    grad_loss: Tensor | None = None,
) -> Expected:
    """Loss, TD errors, dq for an upstream gradient (ones if None) and the conservative terms, by the definition."""
    shape, A = q.shape[:-1], q.shape[-1]
    n = shape.numel()
    target = {"soft": Soft(), "munchausen": Munchausen()}.get(target, target) if isinstance(target, str) else target
    rows, target_rows, masks = _rows(q), _rows(target_q), _rows(action_mask)
    next_rows, online_rows, next_masks = _rows(next_q), _rows(next_q_online), _rows(next_action_mask)
    acts, rews = _values(actions), _values(rewards)
    ends = [False] * n if terminated is None else [x != 0 for x in _values(terminated)]
    if non_final_mask is not None:
        ends = [not x for x in _values(non_final_mask)]
    gammas = [float(gamma)] * n if not isinstance(gamma, Tensor) or gamma.dim() == 0 else _values(gamma)
    ws = [1.0] * n if weights is None else _values(weights)
    scale = {"mean": max(n, 1), "weighted_mean": math.fsum(ws)}.get(reduction, 1)
    upstream = [1.0] * n if grad_loss is None else _values(grad_loss.double().expand(shape))

    td, losses, cqls, grad = [], [], [], np.zeros((n, A))
    for i in range(n):
        row, mask, target_row, action = next(rows), next(masks), next(target_rows), acts[i]
        legal = 0 <= action < A
        y = float(rews[i])
        if isinstance(target, Munchausen) and legal:
            taken = target_row[action] if mask is None or mask[action] else -math.inf
            log_policy = taken - _log_sum(target_row, mask, target.temperature)
            y += target.alpha * (log_policy if math.isnan(log_policy) else min(max(log_policy, target.clip), 0.0))
        if non_final_mask is None or not ends[i]:
            next_row, online_row, next_mask = next(next_rows), next(online_rows), next(next_masks)
        if not ends[i] and next_row is not None:
            if target != "max":
                value = _log_sum(next_row, next_mask, target.temperature)
            else:
                best = _first_largest(next_row if online_row is None else online_row, next_mask)
                value = math.nan if best is None else next_row[best]
            y += gammas[i] * value
        td.append(row[action] - y if legal else math.nan)
        log_sum = _log_sum(row, mask)
        cqls.append(log_sum - row[action] if legal else math.nan)
        value, slope = _rho(td[i], loss, delta)
        losses.append(ws[i] * (value + (cql_alpha * cqls[i] if cql_alpha else 0.0)))
        if legal:
            grad[i, action] = slope - cql_alpha
            for j in range(A) if cql_alpha else ():
                if mask is None or mask[j]:
                    grad[i, j] += cql_alpha * (math.exp(row[j] - log_sum) if math.isfinite(log_sum) else math.nan)
            grad[i] *= upstream[i] * ws[i] / scale
    per_sample = np.array(losses, dtype=np.float64)
    if reduction == "none":
        result = per_sample.reshape(shape)
    else:
        total = math.nan if np.isnan(per_sample).any() else math.fsum(per_sample)
        result = np.array(total if reduction == "sum" else total / scale if n else math.nan)
    return Expected(
        result,
        np.array(td, dtype=np.float64).reshape(shape),
        grad.reshape(*shape, A),
        np.array(cqls, dtype=np.float64).reshape(shape),
    )


def eager(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | None,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    next_q_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    target_q: Tensor | None = None,
    cql_alpha: float = 0.0,
    action_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, td_error) as users write it, in the dtype the tensors have: its error is the yardstick."""

    def flat(x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if mask is None else x.masked_fill(~mask.reshape(x.shape), -torch.inf)

    n, A = q.shape[:-1].numel(), q.shape[-1]
    target = {"soft": Soft(), "munchausen": Munchausen()}.get(target, target) if isinstance(target, str) else target
    index = actions.reshape(-1, 1).long()
    taken = q.reshape(n, A).gather(1, index).squeeze(1)
    y = rewards.reshape(-1)
    if isinstance(target, Munchausen):
        log_policy = torch.log_softmax(flat(target_q, action_mask) / target.temperature, 1)
        bonus = target.temperature * log_policy.gather(1, index).squeeze(1)
        y = y + target.alpha * bonus.clamp(target.clip, 0)
    if next_q is not None:
        if target != "max":
            value = target.temperature * torch.logsumexp(flat(next_q, next_action_mask) / target.temperature, 1)
        elif next_q_online is not None:
            best = flat(next_q_online, next_action_mask).argmax(1, keepdim=True)
            value = flat(next_q, None).gather(1, best).squeeze(1)
        else:
            value = flat(next_q, next_action_mask).max(1).values
        if non_final_mask is not None:
            values = torch.zeros(n, dtype=value.dtype, device=q.device)
            values[non_final_mask.reshape(-1)] = value.detach()
        else:
            ends = torch.zeros(n, device=q.device) if terminated is None else terminated.reshape(-1)
            values = torch.where(ends != 0, 0, value)
        discount = gamma.reshape(-1) if isinstance(gamma, Tensor) else gamma
        y = y + discount * values
    td = taken - y.detach()
    zero = torch.zeros_like(td)
    if loss == "mse":
        per_sample = td**2
    elif loss == "huber":
        per_sample = F.huber_loss(td, zero, reduction="none", delta=delta)
    else:
        per_sample = F.smooth_l1_loss(td, zero, reduction="none", beta=delta)
    if cql_alpha:
        per_sample = per_sample + cql_alpha * (torch.logsumexp(flat(q, action_mask), 1) - taken)
    w = torch.ones_like(td) if weights is None else weights.reshape(-1)
    per_sample = per_sample * w
    if reduction == "none":
        return per_sample.view(q.shape[:-1]), td.detach().view(q.shape[:-1])
    total = per_sample.mean() if reduction == "mean" else per_sample.sum()
    return total / w.sum() if reduction == "weighted_mean" else total, td.detach().view(q.shape[:-1])


def assert_close(name: str, got: Tensor, exact: np.ndarray, yardstick: Tensor) -> None:
    """Assert that got errs at most twice as much as the eager code, plus four units in the last place."""
    assert tuple(got.shape) == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {exact.shape}"
    values = got.detach().cpu().double().numpy()
    np.testing.assert_array_equal(np.isnan(values), np.isnan(exact), err_msg=f"{name}: NaN in the wrong places")
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(values[~finite], exact[~finite], err_msg=f"{name}: infinities differ")
    if not finite.any():
        return
    exact, values = exact[finite], values[finite]
    scale = np.abs(exact).max()
    eager_errors = np.abs(yardstick.detach().cpu().double().numpy().reshape(finite.shape)[finite] - exact)
    eager_error = eager_errors[np.isfinite(eager_errors)].max(initial=0)  # where eager is not even finite: no excuse
    error = np.abs(values - exact).max()
    bound = 2 * eager_error + 4 * torch.finfo(got.dtype).eps * scale
    assert error <= bound, f"{name}: error {error:.3e}, eager's {eager_error:.3e}, bound {bound:.3e}"
