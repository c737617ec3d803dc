"""The loss in float64 as nested loops over Python numbers: shares no code and no operation with the package."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Expected(NamedTuple):
    loss: np.ndarray
    td_error: np.ndarray
    grad_q: np.ndarray


def _values(x: Tensor) -> list[Any]:
    return x.detach().cpu().reshape(-1).tolist()


def _matrix(x: Tensor) -> list[list[float]]:
    return x.detach().cpu().double().reshape(-1, x.shape[-1]).tolist()


def _largest(row: list[float]) -> float:
    best = -math.inf
    for value in row:
        if math.isnan(value):
            return math.nan
        best = max(best, value)
    return best


def oracle(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
) -> Expected:
    """Loss, TD errors and dq for an upstream gradient (ones if None), by the definition."""
    shape, A = q.shape[:-1], q.shape[-1]
    n = shape.numel()
    rows, next_rows = _matrix(q), iter(_matrix(next_q))
    acts, rews = _values(actions), _values(rewards)
    ends = [False] * n if terminated is None else [x != 0 for x in _values(terminated)]
    if non_final_mask is not None:
        ends = [not x for x in _values(non_final_mask)]
    gammas = [float(gamma)] * n if not isinstance(gamma, Tensor) or gamma.dim() == 0 else _values(gamma)
    upstream = [1.0] * n if grad_loss is None else _values(grad_loss.double().expand(shape))

    td, grad = [], np.zeros((n, A))
    for i in range(n):
        target = float(rews[i])
        next_row = next(next_rows) if non_final_mask is None or not ends[i] else None
        if not ends[i]:
            assert next_row is not None
            target += gammas[i] * _largest(next_row)
        legal = 0 <= acts[i] < A
        td.append(rows[i][acts[i]] - target if legal else math.nan)
        if legal:
            grad[i, acts[i]] = upstream[i] * 2 * td[i] / (n if reduction == "mean" else 1)
    losses = np.array([x * x for x in td], dtype=np.float64)
    if reduction == "mean":
        loss = np.array(math.fsum(losses) / n if n else math.nan) if not np.isnan(losses).any() else np.array(math.nan)
    elif reduction == "sum":
        loss = np.array(math.fsum(losses)) if not np.isnan(losses).any() else np.array(math.nan)
    else:
        loss = losses.reshape(shape)
    return Expected(loss, np.array(td, dtype=np.float64).reshape(shape), grad.reshape(*shape, A))


def eager(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """(loss, td_error) as users write it, in the dtype the tensors have: its error is the yardstick."""
    n = q.shape[:-1].numel()
    taken = q.reshape(n, q.shape[-1]).gather(1, actions.reshape(-1, 1).long()).squeeze(1)
    value = next_q.detach().reshape(-1, next_q.shape[-1]).max(1).values
    if non_final_mask is not None:
        values = torch.zeros(n, dtype=value.dtype, device=q.device)
        values[non_final_mask.reshape(-1)] = value
    else:
        ends = torch.zeros(n, device=q.device) if terminated is None else terminated.reshape(-1)
        values = torch.where(ends != 0, 0, value)
    discount = gamma.reshape(-1) if isinstance(gamma, Tensor) else gamma
    td = taken - (rewards.reshape(-1) + discount * values).detach()
    loss = td**2
    loss = loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss.view(q.shape[:-1])
    return loss, td.detach().view(q.shape[:-1])


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
    eager_error = np.abs(yardstick.detach().cpu().double().numpy().reshape(finite.shape)[finite] - exact).max()
    error = np.abs(values - exact).max()
    bound = 2 * eager_error + 4 * torch.finfo(got.dtype).eps * scale
    assert error <= bound, f"{name}: error {error:.3e}, eager's {eager_error:.3e}, bound {bound:.3e}"
