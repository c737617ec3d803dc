"""The loss in float64 as a loop over the samples, each number with a bound on what arithmetic may make of it.

It shares no code and no operation with the package. ``eager`` is the loss as users write it, the second yardstick.
"""

import itertools
import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from bounds import ARGUMENT, EXP, LOG, QUOTIENT, SQRT, Arithmetic, LogSum, Number, Values, log_sum
from torch import Tensor

from dqn_fused import Munchausen, Soft
from dqn_fused.arguments import accumulation_dtype


class Expected(NamedTuple):
    loss: Values
    td_error: Values
    grad_q: Values
    cql: Values


Row = tuple[np.ndarray, np.ndarray]  # Q-values of a sample and the errors they come with


def _numbers(x: Tensor) -> list[Any]:
    return x.detach().cpu().reshape(-1).tolist()


def _matrix(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().reshape(-1, x.shape[-1]).numpy()


def _rows(x: Tensor | None, errors: np.ndarray | None, arithmetic: Arithmetic) -> Iterator[Row]:
    if x is None:
        return iter(())
    values = _matrix(x)
    known = arithmetic.conversion(values)
    return zip(values, known if errors is None else known + errors.reshape(values.shape), strict=True)


def _masks(x: Tensor | None) -> Iterator[Any]:
    return itertools.repeat(None) if x is None else iter(_matrix(x).astype(bool))


def chosen(chooser: Row, values: Row, legal: np.ndarray | None) -> Number:
    """Value of the first largest legal action; NaN for NaN, or without one. It may be that of any action that errors
    of the chooser let pass for the largest."""
    x, error = chooser
    found = np.arange(len(x)) if legal is None else np.flatnonzero(legal)
    if not found.size or np.isnan(x[found]).any():
        return Number(math.nan)
    largest = float(x[found].max())
    if largest == -math.inf and legal is not None:
        return Number(math.nan)
    first = found[x[found] == largest][0]
    value = float(values[0][first])
    if not math.isfinite(largest) or not math.isfinite(value):
        return Number(value)
    near = found[x[found] > largest - error[first] - error[found]]
    return Number(value, float(max((abs(values[0][j] - value) + values[1][j] for j in near), default=values[1][first])))


def _rho(arithmetic: Arithmetic, td: Number, loss: str, delta: float) -> tuple[Number, Number]:
    """Loss of a TD error, and its derivative."""
    if math.isnan(td.value):
        return Number(math.nan), Number(math.nan)
    if loss == "mse":
        return arithmetic.multiply(td, td), Number(2 * td.value, 2 * td.error)
    size, edge = Number(abs(td.value), td.error), arithmetic.given(delta)
    sign = math.copysign(1, td.value) if td.value else 0.0
    if size.value < delta:
        value = arithmetic.multiply(Number(0.5 * td.value, 0.5 * td.error), td)
        slope = td
    else:
        value = arithmetic.multiply(edge, arithmetic.subtract(size, Number(0.5 * delta, 0.5 * edge.error)))
        slope = Number(delta * sign, edge.error + (td.error if size.value - td.error < delta else 0.0))
    if loss == "smooth_l1":
        if delta == 0:  # the slope jumps
            return size, Number(sign, 0.0 if size.value > size.error or size.error == 0 else 2.0)
        value, slope = arithmetic.divide(value, edge), arithmetic.divide(slope, edge)
    return value, slope


# R2D2's h and its inverse as the paper writes them, with digits enough for what cancels. Their bounds are those of the
# forms x (1 / (sqrt(|x| + 1) + 1) + epsilon) and t (t + 2), t = 2 x / (sqrt(4 epsilon |x| + b^2) + b).
DIGITS = 60
H_EPSILON = Decimal("0.001")


def signed_hyperbolic(arithmetic: Arithmetic, x: Number) -> Number:
    """h(x). |x| + 1 has an error of 1 unit, its root of half of that and its own, and so on; h' falls with |x|."""
    if not math.isfinite(x.value):
        return Number(x.value)
    with localcontext() as context:
        context.prec = DIGITS
        size = abs(Decimal(x.value))
        value = math.copysign(float((size + 1).sqrt() - 1 + H_EPSILON * size), x.value)
    root = 0.5 + SQRT
    factor = (root + 1) + QUOTIENT  # of 1 / (root + 1)
    nearest = max(abs(x.value) - x.error, 0.0)
    slope = 0.5 / math.sqrt(nearest + 1) + float(H_EPSILON)
    return Number(value, slope * x.error + (factor + 1 + 1) * arithmetic.unit * abs(value))


def signed_parabolic(arithmetic: Arithmetic, x: Number) -> Number:
    """The inverse of h. An error of t counts twice in t (t + 2); the slope grows with |x|."""
    if not math.isfinite(x.value):
        return Number(x.value)
    with localcontext() as context:
        context.prec = DIGITS
        size = abs(Decimal(x.value))
        root = ((1 + 4 * H_EPSILON * (size + 1 + H_EPSILON)).sqrt() - 1) / (2 * H_EPSILON)
        value = math.copysign(float(root**2 - 1), x.value)
    quotient = (0.5 * (2 + 1) + SQRT) + 1 + QUOTIENT  # of t: 4 epsilon |x|, the sum, its root, the sum, the quotient
    epsilon, farthest = float(H_EPSILON), abs(x.value) + x.error
    b = 1 + 2 * epsilon
    t = 2 * farthest / (math.sqrt(4 * epsilon * farthest + b * b) + b)
    slope = (2 * t + 2) / (b + 2 * epsilon * t)
    return Number(value, slope * x.error + (2 * quotient + 1 + 1) * arithmetic.unit * abs(value))


def _policy(arithmetic: Arithmetic, sums: LogSum) -> Values:
    """Softmax of a row, as exp(x - largest - log(total)), which keeps its digits however large Q-values are."""
    if not math.isfinite(sums.number.value):
        return Values(np.full_like(sums.powers, math.nan), np.zeros_like(sums.powers))
    unit = arithmetic.unit
    value = sums.powers / sums.total.value
    share = sums.total.error / sums.total.value + unit * (LOG * math.log(sums.total.value) + ARGUMENT + EXP)
    return Values(value, value * (sums.errors + share))


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
    value_transform: str = "identity",
    grad_loss: Tensor | None = None,
    dtype: torch.dtype | None = None,
    errors: dict[str, np.ndarray] | None = None,
) -> Expected:
    """Loss, TD errors, dq for an upstream gradient (ones if None) and the conservative terms, by the definition.

    dtype is what the loss is computed in, by default as q's dtype has it; errors are those that matrices come with.
    """
    shape, A = q.shape[:-1], q.shape[-1]
    n = shape.numel()
    arithmetic = Arithmetic(dtype or accumulation_dtype(q))
    add, multiply, given = arithmetic.add, arithmetic.multiply, arithmetic.given
    target = {"soft": Soft(), "munchausen": Munchausen()}.get(target, target) if isinstance(target, str) else target
    known = errors or {}
    rows, target_rows = (_rows(x, known.get(k), arithmetic) for k, x in {"q": q, "target_q": target_q}.items())
    next_rows = _rows(next_q, known.get("next_q"), arithmetic)
    online_rows = _rows(next_q_online, known.get("next_q_online"), arithmetic)
    masks, next_masks = _masks(action_mask), _masks(next_action_mask)
    acts, rews = _numbers(actions), _numbers(rewards)
    ends = [False] * n if terminated is None else [x != 0 for x in _numbers(terminated)]
    if non_final_mask is not None:
        ends = [not x for x in _numbers(non_final_mask)]
    gammas = [float(gamma)] * n if not isinstance(gamma, Tensor) or gamma.dim() == 0 else _numbers(gamma)
    ws = [given(1.0)] * n if weights is None else [given(x) for x in _numbers(weights)]
    scale = arithmetic.total(ws) if reduction == "weighted_mean" else Number({"mean": max(n, 1)}.get(reduction, 1))
    upstream = [1.0] * n if grad_loss is None else _numbers(grad_loss.double().expand(shape))

    td, losses, cqls, grad, grad_error = [], [], [], np.zeros((n, A)), np.zeros((n, A))
    for i in range(n):
        row, mask, action = next(rows), next(masks), acts[i]
        target_row = next(target_rows, None)
        legal = 0 <= action < A
        taken = Number(float(row[0][action]), float(row[1][action])) if legal else Number(math.nan)
        y = given(float(rews[i]))
        if isinstance(target, Munchausen) and legal and target_row is not None:
            likely = (
                Number(*(float(x[action]) for x in target_row)) if mask is None or mask[action] else Number(-math.inf)
            )
            policy = arithmetic.subtract(likely, log_sum(arithmetic, *target_row, mask, target.temperature).number)
            if not math.isnan(policy.value):
                bonus = min(max(policy.value, target.clip), 0.0)
                policy = Number(bonus, policy.error if math.isfinite(policy.value) else 0.0)
            y = add(y, multiply(given(target.alpha), policy))
        if non_final_mask is None or not ends[i]:
            next_row, next_mask = next(next_rows, None), next(next_masks)
            online_row = next(online_rows, next_row)
        if not ends[i] and next_row is not None:
            if target != "max":
                value = log_sum(arithmetic, *next_row, next_mask, target.temperature).number
            else:
                value = chosen(online_row, next_row, next_mask)
            if value_transform == "signed_hyperbolic":
                value = signed_parabolic(arithmetic, value)
            y = add(y, multiply(given(gammas[i]), value))
        if value_transform == "signed_hyperbolic":
            y = signed_hyperbolic(arithmetic, y)
        td.append(arithmetic.subtract(taken, y))
        sums = log_sum(arithmetic, *row, mask)
        cqls.append(arithmetic.subtract(sums.number, taken))
        value, slope = _rho(arithmetic, td[i], loss, delta)
        alpha = given(cql_alpha)
        whole = add(value, multiply(alpha, cqls[i])) if cql_alpha else value
        losses.append(multiply(ws[i], whole))
        if legal:
            factor = arithmetic.divide(multiply(given(upstream[i]), ws[i]), scale)
            terms = [[slope] if j == action else [] for j in range(A)] if cql_alpha else {action: [slope]}
            if cql_alpha:
                policy = _policy(arithmetic, sums)
                for j in range(A) if mask is None else np.flatnonzero(mask):
                    terms[j].append(multiply(alpha, Number(float(policy.value[j]), float(policy.error[j]))))
                terms[action].append(Number(-cql_alpha, alpha.error))
            for j, found in terms.items() if isinstance(terms, dict) else enumerate(terms):
                grad[i, j], grad_error[i, j] = multiply(arithmetic.total(found), factor)
    each = Values.of(losses, (n,))
    if reduction == "none":
        result = Values(each.value.reshape(shape), each.error.reshape(shape))
    elif reduction == "sum":
        result = Values.of([arithmetic.total(losses)], ())
    else:
        result = Values.of([arithmetic.divide(arithmetic.total(losses), scale) if n else Number(math.nan)], ())
    return Expected(
        result,
        Values.of(td, shape),
        Values(grad.reshape(*shape, A), grad_error.reshape(*shape, A)),
        Values.of(cqls, shape),
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
    value_transform: str = "identity",
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
        if value_transform == "signed_hyperbolic":
            root = ((1 + 4e-3 * (values.abs() + 1 + 1e-3)).sqrt() - 1) / 2e-3
            values = values.sign() * (root.square() - 1)
        discount = gamma.reshape(-1) if isinstance(gamma, Tensor) else gamma
        y = y + discount * values
    if value_transform == "signed_hyperbolic":
        y = y.sign() * ((y.abs() + 1).sqrt() - 1) + 1e-3 * y
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
