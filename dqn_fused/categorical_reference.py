"""The categorical losses in plain PyTorch: ground truth for the kernels, fallback where none of them runs.

A distribution is K probabilities on K evenly spaced atoms, the support. Where it says position, atom j is at j.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, accumulation_dtype, check_group, check_values, constants, normalise_weights
from dqn_fused.categorical_arguments import CategoricalSpec, Support, check_categorical_options, check_logits
from dqn_fused.distributional import chosen, per_row, taken
from dqn_fused.reference import bootstrapped, reduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def categorical_loss(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_logits: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    support: Support,
    next_logits_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Loss of C51 (Bellemare et al., 2017) by PyTorch operations, differentiated by autograd, on any device.

    Arguments, result and errors are those of ``dqn_fused.fused_categorical_loss``; ``backend`` is there so
    that the signatures agree, and must be ``"auto"`` or ``"torch"``.

    >>> import torch
    >>> logits, next_logits = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, 0.0, 100.0]]])
    >>> categorical_loss(logits, torch.tensor([0]), torch.tensor([1.0]), next_logits, support=(0.0, 3.0)).exp()
    tensor(4.)
    """
    spec = check_categorical_options(support, reduction)
    batch = Batch(
        logits, actions, rewards, next_logits, terminated, gamma, non_final_mask,
        next_logits_online, next_action_mask, weights,
    )  # fmt: skip
    loss, values = _differentiable(batch, spec, process_group, backend)
    return (loss, values[0]) if return_td_error else loss


def categorical_td_loss(
    logits: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    support: Support,
    projection: str = "two_hot",
    sigma: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    return_expectation: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Regression as classification (Farebrother et al., 2024) by PyTorch operations, differentiated by autograd.

    Arguments, result and errors are those of ``dqn_fused.fused_categorical_td_loss``; ``backend`` must be
    ``"auto"`` or ``"torch"``.

    >>> import torch
    >>> logits = torch.tensor([[[0.0, 0.0, 0.0]]])
    >>> categorical_td_loss(logits, torch.tensor([0]), torch.tensor([0.5]), support=(0.0, 2.0)).exp()
    tensor(3.)
    """
    spec = check_categorical_options(support, reduction, projection, sigma)
    loss, values = _differentiable(Batch(logits, actions, target, None, weights=weights), spec, process_group, backend)
    found = [loss]
    if return_td_error:
        found.append(values[0])
    if return_expectation:
        found.append(values[1])
    return loss if len(found) == 1 else tuple(found)


def _differentiable(
    given: Batch, spec: CategoricalSpec, process_group: "ProcessGroup | None", backend: str
) -> tuple[Tensor, Tensor]:
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: the reference is PyTorch, expected 'auto' or 'torch', got {backend!r}")
    if process_group is not None:
        check_group(process_group, spec)
    batch, spec = check_logits(given, spec)
    batch = check_values(batch, batch.q.shape[1], batch.next_count(), "next_logits")
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    batch = constants(batch)
    logits, support = taken(batch), atoms(batch, spec)
    with torch.no_grad():
        target = target_distribution(batch, spec, support)
        values = values_of(logits, target, support, batch)
    return reduced(cross_entropy(logits, target), batch, spec.reduction), values


def atoms(batch: Batch, spec: CategoricalSpec) -> Tensor:
    """The support, (K,), in the accumulation dtype."""
    q, dtype = batch.q, accumulation_dtype(batch.q)
    if isinstance(spec.support, Tensor):
        return spec.support.detach().to(dtype)
    return torch.linspace(*spec.support, q.shape[2], dtype=dtype, device=q.device)


def target_distribution(batch: Batch, spec: CategoricalSpec, support: Tensor) -> Tensor:
    """The distribution that each sample's logits are compared with, (n, K); NaN where it is not known."""
    next_q, dtype, K = batch.next_q, support.dtype, support.shape[0]
    rewards = batch.rewards.to(dtype)
    if next_q is None:
        return hl_gauss(rewards, support, spec.sigma) if spec.sigma else two_hot(rewards, support)
    chooser = next_q if batch.next_q_online is None else batch.next_q_online
    values = chooser if chooser.dim() == 2 else expectation(chooser.to(dtype), support)
    probabilities = torch.softmax(chosen(next_q, values, batch), 1)
    column = per_row(batch)
    ended = None if batch.non_final_mask is None else ~column.non_final_mask  # type: ignore[operator]
    if column.terminated is not None:
        ended = column.terminated.to(torch.bool)
    if ended is not None:  # all atoms are at the reward, so one of them takes the whole probability there
        probabilities = torch.where(ended, torch.arange(K, device=support.device) == 0, probabilities)
    locations = bootstrapped(rewards.unsqueeze(1), support, column, dtype)  # (n, K)
    return project(positions(locations, support), probabilities, K)


def positions(values: Tensor, support: Tensor) -> Tensor:
    """Positions of values on a support; those beyond an end are moved to it. NaN stays NaN.

    The ends, where many values lie, are exact: a rounding would give a share to the atom beside an end, where the
    prediction may have no probability.
    """
    low, high, last = support[0], support[-1], support.shape[0] - 1
    position = (torch.clamp(values, low, high) - low) / ((high - low) / last)
    return torch.where(values >= high, last, position.clamp(max=last))


def project(position: Tensor, probabilities: Tensor, K: int) -> Tensor:
    """Share each probability, (n, K'), between the two atoms on either side of its position: (n, K).

    The lower atom is at most the last but one, so that a position on an atom, also on the last, gives it everything.
    """
    lower = position.floor().clamp(max=K - 2)
    upper_share = position - lower  # NaN reaches the result here
    index = torch.where(position.isnan(), 0, lower).to(torch.int64)
    return add_at(index, (1 - upper_share) * probabilities, K) + add_at(index + 1, upper_share * probabilities, K)


def add_at(index: Tensor, values: Tensor, K: int) -> Tensor:
    """Sums of the values of equal index, (n, K), in a fixed order."""
    if values.device.type == "cpu":
        return values.new_zeros(values.shape[0], K).scatter_add_(1, index, values)
    return compare_and_add(index, values, K)


def compare_and_add(index: Tensor, values: Tensor, K: int) -> Tensor:
    """add_at for devices whose sums by index are atomic, in another order every time. It builds (n, K, K')."""
    same = index.unsqueeze(1) == torch.arange(K, device=index.device).unsqueeze(1)
    return torch.where(same, values.unsqueeze(1), 0).sum(-1)


def two_hot(target: Tensor, support: Tensor) -> Tensor:
    """A scalar, (n,), as the distribution on the two atoms beside it whose mean it is, (n, K)."""
    position = positions(target, support).unsqueeze(1)
    return project(position, torch.ones_like(position), support.shape[0])


def hl_gauss(target: Tensor, support: Tensor, sigma: float) -> Tensor:
    """A scalar, (n,), as a normal distribution integrated over bins whose centres are the atoms, (n, K).

    sigma is in units of their width. The result is divided by the mass in all bins.
    """
    K, dtype = support.shape[0], support.dtype
    edges = torch.arange(K + 1, dtype=dtype, device=support.device) - 0.5
    scale = min(1 / (sigma * math.sqrt(2)), torch.finfo(dtype).max)
    cumulative = torch.erf((edges - positions(target, support).unsqueeze(1)) * scale)  # (n, K + 1)
    return cumulative.diff(dim=1) / (cumulative[:, -1:] - cumulative[:, :1])


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_j target_j log softmax(logits)_j, (n,). An atom without a target does not count, whatever its logit."""
    return -torch.where(target == 0, 0, target * torch.log_softmax(logits, -1)).sum(-1)


def slopes_of(logits: Tensor, target: Tensor) -> Tensor:
    """Derivative of the cross-entropy by the logits, (n, K)."""
    return torch.softmax(logits, -1) * target.sum(-1, keepdim=True) - target


def expectation(logits: Tensor, support: Tensor) -> Tensor:
    """Expectation of softmax(logits) on the support, over the last dimension."""
    return (torch.softmax(logits, -1) * support).sum(-1)


def values_of(logits: Tensor, target: Tensor, support: Tensor, batch: Batch) -> Tensor:
    """TD errors, which are differences of expectations, and the expectations of the actions taken, (2, *N)."""
    predicted = expectation(logits, support)
    return torch.stack((predicted - (target * support).sum(-1), predicted)).view(2, *batch.shape)
