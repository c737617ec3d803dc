"""The loss in float64 as a loop over the samples, each number with a bound on the error of the arithmetic.

It shares no code and no operation with the package. ``eager.py`` has the loss as users write it, the second yardstick.
"""

import itertools
import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from bounds import ARGUMENT, EXP, LOG, QUOTIENT, SQRT, Arithmetic, LogSum, Number, Values, log_sum
from torch import Tensor

from dqn_fused import Munchausen, Soft
from dqn_fused.arguments import accumulation_dtype


class Arguments(NamedTuple):
    """The arguments of fused_dqn_loss that decide what is computed, with its defaults."""

    q: Tensor
    actions: Tensor
    rewards: Tensor
    next_q: Tensor | None
    terminated: Tensor | None = None
    gamma: float | Tensor = 0.99
    non_final_mask: Tensor | None = None
    next_q_online: Tensor | None = None
    next_action_mask: Tensor | None = None
    weights: Tensor | None = None
    loss: str = "mse"
    delta: float = 1.0
    reduction: str = "mean"
    target: str | Soft | Munchausen = "max"
    target_q: Tensor | None = None
    cql_alpha: float = 0.0
    action_mask: Tensor | None = None
    value_transform: str = "identity"

    def named_target(self) -> str | Soft | Munchausen:
        """The target, as an object where it has options."""
        named = {"soft": Soft(), "munchausen": Munchausen()}
        return named.get(self.target, self.target) if isinstance(self.target, str) else self.target


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
    """Value of the first of the largest legal actions; NaN where one of them is NaN or none is legal.

    Its error covers the values of all actions that the errors of the chooser may make the largest.
    """
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


# R2D2's h and its inverse as the paper writes them, with enough digits for the cancellation. Their bounds are those of
# the forms x (1 / (sqrt(|x| + 1) + 1) + epsilon) and t (t + 2), t = 2 x / (sqrt(4 epsilon |x| + b^2) + b).
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


def _bonus(arithmetic: Arithmetic, target: Munchausen, row: Row, mask: np.ndarray | None, action: int) -> Number:
    """alpha * clip(temperature * log(policy of the action), clip, 0); the policy of an illegal action is zero."""
    known = mask is None or mask[action]
    taken = Number(float(row[0][action]), float(row[1][action])) if known else Number(-math.inf)
    policy = arithmetic.subtract(taken, log_sum(arithmetic, *row, mask, target.temperature).number)
    if not math.isnan(policy.value):
        bonus = min(max(policy.value, target.clip), 0.0)
        policy = Number(bonus, policy.error if math.isfinite(policy.value) else 0.0)
    return arithmetic.multiply(arithmetic.given(target.alpha), policy)


def oracle(
    *positional: Any,
    grad_loss: Tensor | None = None,
    dtype: torch.dtype | None = None,
    errors: dict[str, np.ndarray] | None = None,
    **named: Any,
) -> Expected:
    """Loss, TD errors, dq for an upstream gradient (ones if None) and the conservative terms, by the definition.

    The arguments are those of ``Arguments``. dtype is what the loss is computed in, by default q's accumulation dtype;
    errors are those of the matrices themselves, by name.
    """
    a = Arguments(*positional, **named)
    target = a.named_target()
    shape, A = a.q.shape[:-1], a.q.shape[-1]
    n = shape.numel()
    arithmetic = Arithmetic(dtype or accumulation_dtype(a.q))
    add, multiply, given = arithmetic.add, arithmetic.multiply, arithmetic.given
    known = errors or {}
    rows, target_rows, next_rows, online_rows = (
        _rows(getattr(a, name), known.get(name), arithmetic) for name in ("q", "target_q", "next_q", "next_q_online")
    )
    masks, next_masks = _masks(a.action_mask), _masks(a.next_action_mask)
    actions, rewards = _numbers(a.actions), _numbers(a.rewards)
    ends = [False] * n if a.terminated is None else [x != 0 for x in _numbers(a.terminated)]
    if a.non_final_mask is not None:
        ends = [not x for x in _numbers(a.non_final_mask)]
    one_gamma = not isinstance(a.gamma, Tensor) or a.gamma.dim() == 0
    gammas = [float(a.gamma)] * n if one_gamma else _numbers(a.gamma)
    ws = [given(1.0)] * n if a.weights is None else [given(x) for x in _numbers(a.weights)]
    scale = (
        arithmetic.total(ws) if a.reduction == "weighted_mean" else Number(max(n, 1) if a.reduction == "mean" else 1)
    )
    upstream = [1.0] * n if grad_loss is None else _numbers(grad_loss.double().expand(shape))

    td, losses, cqls, grad, grad_error = [], [], [], np.zeros((n, A)), np.zeros((n, A))
    for i in range(n):
        row, target_row, mask, action = next(rows), next(target_rows, None), next(masks), actions[i]
        legal = 0 <= action < A
        taken = Number(float(row[0][action]), float(row[1][action])) if legal else Number(math.nan)
        y = given(float(rewards[i]))
        if isinstance(target, Munchausen) and legal and target_row is not None:
            y = add(y, _bonus(arithmetic, target, target_row, mask, action))
        if a.non_final_mask is None or not ends[i]:
            next_row, next_mask = next(next_rows, None), next(next_masks)
            online_row = next(online_rows, next_row)
        if not ends[i] and next_row is not None:
            if target != "max":
                value = log_sum(arithmetic, *next_row, next_mask, target.temperature).number
            else:
                value = chosen(online_row, next_row, next_mask)
            if a.value_transform == "signed_hyperbolic":
                value = signed_parabolic(arithmetic, value)
            y = add(y, multiply(given(gammas[i]), value))
        if a.value_transform == "signed_hyperbolic":
            y = signed_hyperbolic(arithmetic, y)
        td.append(arithmetic.subtract(taken, y))
        sums = log_sum(arithmetic, *row, mask)
        cqls.append(arithmetic.subtract(sums.number, taken))
        value, slope = _rho(arithmetic, td[i], a.loss, a.delta)
        alpha = given(a.cql_alpha)
        losses.append(multiply(ws[i], add(value, multiply(alpha, cqls[i])) if a.cql_alpha else value))
        if not legal:
            continue
        factor = arithmetic.divide(multiply(given(upstream[i]), ws[i]), scale)
        terms: dict[int, list[Number]] = {action: [slope]}
        if a.cql_alpha:
            policy = _policy(arithmetic, sums)
            for j in range(A) if mask is None else np.flatnonzero(mask):
                share = multiply(alpha, Number(float(policy.value[j]), float(policy.error[j])))
                terms.setdefault(int(j), []).append(share)
            terms[action].append(Number(-a.cql_alpha, alpha.error))
        for j, found in terms.items():
            grad[i, j], grad_error[i, j] = multiply(arithmetic.total(found), factor)
    each = Values.of(losses, (n,))
    if a.reduction == "none":
        result = Values(each.value.reshape(shape), each.error.reshape(shape))
    elif a.reduction == "sum":
        result = Values.of([arithmetic.total(losses)], ())
    else:
        result = Values.of([arithmetic.divide(arithmetic.total(losses), scale) if n else Number(math.nan)], ())
    return Expected(
        result,
        Values.of(td, shape),
        Values(grad.reshape(*shape, A), grad_error.reshape(*shape, A)),
        Values.of(cqls, shape),
    )
