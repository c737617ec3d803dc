"""The categorical losses in float64, each number with a bound on what arithmetic may make of it (tests/bounds.py).

It shares no code with the package, and no formula for the projection: there each atom asks of each probability how much
of it is within reach. ``eager`` is the loss of C51 as users write it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from bounds import LOG, Arithmetic, Number, Values, log_sum, roundings
from distributional_oracle import NextStates, as_double, best_legal, double, reduced, times
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype

STEP = 3  # units of roundoff of the distance of two atoms: a difference, a division, and by it another
ERF = 4  # of the error function, in parts of 1: two in float32, and what the difference of two may add


class Expected(NamedTuple):
    loss: Values
    td_error: Values
    gradient: Values
    expectation: Values


class Row(NamedTuple):
    """A row of logits: softmax, its logarithm and its expectation."""

    p: Values
    log_p: Values
    mean: Number


def _sum(terms: Values, unit: float) -> Number:
    error = terms.error.sum() + roundings(len(terms.value)) * unit * np.abs(terms.value).sum()
    return Number(float(terms.value.sum()), float(error))


class Family:
    """One support, in one arithmetic."""

    def __init__(self, support: Tensor | tuple[float, float], K: int, arithmetic: Arithmetic) -> None:
        self.K, self.arithmetic, self.unit = K, arithmetic, arithmetic.unit
        given = isinstance(support, Tensor)
        self.atoms = double(support) if given else np.linspace(*support, K)
        self.low, self.high = float(self.atoms[0]), float(self.atoms[-1])
        self.size = max(abs(self.low), abs(self.high))
        # An atom that is not given is computed: a product and a sum, the step divided before.
        computed = 0.0 if given else STEP * self.unit * self.size
        self.z = Values(self.atoms, arithmetic.conversion(self.atoms) + computed)
        self.step = (self.high - self.low) / (K - 1)

    def row(self, logits: np.ndarray) -> Row:
        """Softmax of a row."""
        unit, none = self.unit, np.full(self.K, math.nan)
        known = self.arithmetic.conversion(logits)
        sums = log_sum(self.arithmetic, logits, known, None)
        if not math.isfinite(sums.number.value):
            return Row(Values(none, 0 * none), Values(none, 0 * none), Number(math.nan))
        total, share = sums.total.value, sums.total.error / sums.total.value
        p = sums.powers / total
        largest = int(logits.argmax())
        with np.errstate(invalid="ignore"):
            difference, log_total = logits - logits[largest], math.log(total)
            error = known + known[largest] + unit * np.abs(difference) + share + LOG * unit * log_total
            log_p = Values(difference - log_total, np.nan_to_num(error + unit * np.abs(difference - log_total)))
        p_values = Values(p, p * (sums.errors + share + 2 * unit))
        return Row(p_values, log_p, _sum(times(p_values, self.z, unit), unit))

    def positions(self, values: Values) -> Values:
        """Positions on the support, NaN where a value is."""
        unit = self.unit
        end = unit * self.size + self.z.error.max()
        inside = np.clip(values.value, self.low, self.high)
        error = np.where(np.isfinite(values.value), values.error, 0)
        position = (inside - self.low) / self.step
        relative = STEP * unit + 2 * end / (self.high - self.low)
        error = (error + end + unit * np.abs(inside - self.low)) / self.step + (relative + unit) * np.abs(position)
        return Values(position, error)

    def project(self, position: Values, p: Values) -> tuple[Values, Number]:
        """Probabilities at positions as a distribution on the atoms, and its mass."""
        unit, atoms = self.unit, np.arange(self.K)[:, None]
        apart = np.abs(position.value - atoms)  # (K, K')
        share = np.maximum(0, 1 - apart)
        near = apart < 1 + position.error
        errors = share * p.error + np.where(near, p.value * position.error, 0) + 3 * unit * share * p.value
        terms = Values(share * p.value, errors)
        m = Values.of((_sum(Values(*row), unit) for row in zip(*terms, strict=True)), (self.K,))
        mass = _sum(p, unit)
        return m, Number(mass.value, mass.error + (3 + roundings(2 * len(p.value))) * unit)

    def gauss(self, position: Values, sigma: float) -> tuple[Values, Number]:
        """A normal distribution around a position, cut into bins of width 1 around the atoms."""
        unit, scale = self.unit, 1 / (sigma * math.sqrt(2))
        x = (np.arange(self.K + 1) - 0.5 - position.value) * scale
        x_error = position.error * scale + 3 * unit * np.abs(x)
        c = np.array([math.erf(t) for t in x])
        steep = 2 / math.sqrt(math.pi) * np.exp(-np.square(np.clip(np.abs(x) - x_error, 0, 30)))
        c_error = steep * x_error + ERF * unit
        total = Number(c[-1] - c[0], c_error[-1] + c_error[0])
        m = np.diff(c) / total.value
        error = (c_error[1:] + c_error[:-1]) / total.value + m * total.error / total.value + 2 * unit * m
        # The differences add up to their total, whatever their errors are.
        return Values(m, error), Number(1.0, (4 + roundings(self.K)) * unit)

    def greedy(self, chooser: np.ndarray, legal: np.ndarray | None) -> int | None:
        """First largest legal action: of logits (A, K) by their expectations, or of Q-values (A,)."""
        means = [self.row(x).mean if chooser.ndim == 2 else Number(float(x)) for x in chooser]
        values = np.array([x.value for x in means])
        best, found = best_legal(values, legal)
        if best is None:
            return None
        near = [j for j in found if values[j] + means[j].error >= values[best] - means[best].error]
        same = [j for j in near if np.array_equal(chooser[j], chooser[best])]
        assert near == same, f"test data: which of the actions {near} is the greedy one is a matter of rounding"
        return best


def categorical_oracle(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_logits: Tensor | None = None,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    support: Tensor | tuple[float, float],
    next_logits_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    projection: str = "two_hot",
    sigma: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
) -> Expected:
    """Loss, TD errors, the gradient for an upstream gradient (ones if None) and expectations, by the definition.

    Without next_logits the rewards are the target.
    """
    *lead, A, K = logits.shape
    n, shape = math.prod(lead), tuple(lead)
    arithmetic = Arithmetic(accumulation_dtype(logits))
    family, unit = Family(support, K, arithmetic), arithmetic.unit
    q, acts = double(logits).reshape(n, A, K), np.array([int(a) for a in actions.reshape(-1)], np.int64)
    following = None
    if next_logits is not None:
        following = NextStates.of(
            shape, A, next_logits, terminated, non_final_mask, next_logits_online, next_action_mask
        )
    reward = [arithmetic.given(x) for x in double(rewards).reshape(-1)]
    discount = [arithmetic.given(x) for x in np.broadcast_to(as_double(gamma), (n,))]

    def target_of(i: int) -> tuple[Values, Number]:
        one = Values(np.ones(1), np.zeros(1))
        at_reward = Values(*(np.array([x]) for x in reward[i]))
        if math.isnan(reward[i].value):
            return Values(np.full(K, math.nan), np.zeros(K)), Number(math.nan)
        if projection == "hl_gauss":
            return family.gauss(Values(*(x[0] for x in family.positions(at_reward))), 0.75 if sigma is None else sigma)
        if following is None or following.ended[i]:
            return family.project(family.positions(at_reward), one)
        own = following.row[i]
        best = family.greedy(following.chooser[own], None if following.legal is None else following.legal[own])
        unknown = Values(np.full(K, math.nan), np.zeros(K))
        p = unknown if best is None else family.row(following.following[own][best]).p
        moved = times(Values(*(np.full(K, x) for x in discount[i])), family.z, unit)
        location = reward[i].value + moved.value
        error = reward[i].error + moved.error + unit * np.abs(location)
        if np.isnan(location).any() or np.isnan(p.value).any():
            return unknown, Number(math.nan)
        return family.project(family.positions(Values(location, error)), p)

    losses, td, means, slopes = [], [], [], Values(np.zeros((n, K)), np.zeros((n, K)))
    for i in range(n):
        m, mass = target_of(i)
        row = family.row(q[i, acts[i]]) if 0 <= acts[i] < A else family.row(np.full(K, math.nan))
        counts = (m.value != 0) | (m.error != 0)
        log_p = Values(np.where(counts, -row.log_p.value, 0), np.where(counts, row.log_p.error, 0))
        with np.errstate(invalid="ignore"):
            terms = times(m, log_p, unit)
            value = _sum(Values(terms.value, np.nan_to_num(terms.error, posinf=0.0)), unit)
        losses.append(value)
        target_mean = _sum(times(m, family.z, unit), unit)
        td.append(arithmetic.subtract(row.mean, target_mean))
        means.append(row.mean)
        first = times(row.p, Values(*(np.full(K, x) for x in mass)), unit)
        slopes.value[i] = first.value - m.value
        slopes.error[i] = first.error + m.error + unit * np.abs(slopes.value[i])
    loss, gradient = reduced(arithmetic, losses, slopes, acts, A, shape, weights, reduction, grad_loss)
    return Expected(loss, Values.of(td, shape), gradient, Values.of(means, shape))


def eager(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_logits: Tensor,
    terminated: Tensor,
    gamma: float = 0.99,
    *,
    support: tuple[float, float],
) -> Tensor:
    """The loss of C51 as users write it, in the dtype the tensors have."""
    n, _, K = logits.shape
    (low, high), batch = support, torch.arange(n)
    z = torch.linspace(low, high, K, dtype=logits.dtype)
    step = (high - low) / (K - 1)
    with torch.no_grad():
        p = torch.softmax(next_logits, 2)
        p = p[batch, (p * z).sum(2).argmax(1)]
        location = (rewards[:, None] + gamma * (1 - terminated[:, None]) * z).clamp(low, high)
        b = (location - low) / step
        lower, upper = b.floor().clamp(0, K - 1), b.ceil().clamp(0, K - 1)
        m = torch.zeros_like(p)
        m.scatter_add_(1, lower.long(), p * (upper + (lower == b) - b))
        m.scatter_add_(1, upper.long(), p * (b - lower))
    return -(m * torch.log_softmax(logits[batch, actions], 1)).sum(1).mean()
