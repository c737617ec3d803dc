"""The DQN loss in plain PyTorch: ground truth for the kernels, and fallback where none of them runs.

``dqn_loss`` gives the guarantees of ``dqn_fused.fused_dqn_loss`` and leaves the gradient to autograd.
``naive_dqn_loss`` and ``simple_dqn_loss`` are the loss as it is written by hand: a loop over the samples, and a
gather.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import hints
from dqn_fused.arguments import (
    Batch,
    LossSpec,
    accumulation_dtype,
    check_batch,
    check_group,
    check_loss,
    check_values,
    constants,
    looks_at_values,
    normalise_weights,
)
from dqn_fused.ensemble import one_next_q
from dqn_fused.targets import Munchausen, Soft
from dqn_fused.value_transform import signed_hyperbolic, signed_parabolic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TransitionBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Network = Callable[[Tensor], Tensor]


def dqn_loss(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | Sequence[Tensor],
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
    ensemble: str = "min",
    return_td_error: bool = False,
    return_cql: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """DQN loss (Mnih et al., 2015) by PyTorch operations, differentiated by autograd, on any device.

    Arguments, result and errors are those of ``dqn_fused.fused_dqn_loss``; ``backend`` only makes the signature the
    same, and must be ``"auto"`` or ``"torch"``.

    >>> import torch
    >>> q = torch.tensor([[0.2, 1.2, 1.3]])
    >>> dqn_loss(q, torch.tensor([1]), torch.tensor([0.7]), torch.zeros(1, 3), torch.tensor([True]))
    tensor(0.2500)
    """
    if unknown:
        hints.unexpected("dqn_loss", unknown)
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: the reference is PyTorch, expected 'auto' or 'torch', got {backend!r}")
    spec = check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
    if process_group is not None:
        check_group(process_group, spec)
    batch = Batch(
        q, actions, rewards, one_next_q(q, next_q, ensemble), terminated, gamma, non_final_mask,
        next_q_online, next_action_mask, weights, target_q, action_mask,
    )  # fmt: skip
    batch = check_batch(batch, spec)
    batch = check_values(batch, batch.action_count(), batch.next_count())
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    batch = constants(batch)
    td = td_error(batch, spec)
    normaliser = normaliser_of(batch) if spec.cql else None
    found = [loss_of_td_error(td, normaliser, batch, spec)]
    if return_td_error:
        found.append(td.detach())
    if return_cql and normaliser is not None:
        found.append(conservative_term(normaliser, batch).detach())
    return found[0] if len(found) == 1 else tuple(found)


def td_error(batch: Batch, spec: LossSpec) -> Tensor:
    """TD errors q[i, a_i] - y_i, N, differentiable by q; NaN where the action is illegal."""
    dtype = accumulation_dtype(batch.q)
    with torch.no_grad():
        target = _cast(batch.rewards.detach(), dtype)  # which no_grad alone would hand on
        if spec.target == "munchausen":
            target = target + spec.alpha * _log_policy(batch, spec, dtype).clamp(spec.clip, 0)
        if batch.next_q is not None:
            values = _next_values(batch, batch.next_q, spec, dtype)
            if spec.value_transform == "signed_hyperbolic":
                values = signed_parabolic(values)
            target = bootstrapped(target, values, batch, dtype)
        if spec.value_transform == "signed_hyperbolic":
            target = signed_hyperbolic(target)
    taken, legal = _taken(batch, batch.q)
    td = _cast(taken, dtype).view(batch.shape) - target.view(batch.shape)
    return td if legal is None else torch.where(legal.view(batch.shape), td, torch.nan)


def loss_of_td_error(td: Tensor, normaliser: Tensor | None, batch: Batch, spec: LossSpec) -> Tensor:
    """Reduced loss of TD errors, N, and of the normaliser of the conservative term, (2, N), if that is asked for."""
    if spec.loss == "mse":
        per_sample = td.square()
    elif spec.loss == "huber":
        per_sample = F.huber_loss(td, td.new_zeros(()).expand_as(td), reduction="none", delta=spec.delta)
    else:
        per_sample = F.smooth_l1_loss(td, td.new_zeros(()).expand_as(td), reduction="none", beta=spec.delta)
    if normaliser is not None and spec.cql_alpha != 0:
        per_sample = per_sample + spec.cql_alpha * conservative_term(normaliser, batch)
    return reduced(per_sample, batch, spec.reduction)


def reduced(per_sample: Tensor, batch: Batch, reduction: str) -> Tensor:
    """Loss of a batch, N or (), from that of each sample, N or (n,), for every family of losses."""
    if batch.weights is not None:
        per_sample = per_sample * _cast(batch.weights.detach(), per_sample.dtype).view(per_sample.shape)
    if reduction == "none":
        return per_sample if per_sample.shape == batch.shape else per_sample.view(batch.shape)
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def normaliser_of(batch: Batch) -> Tensor:
    """logsumexp_a q[i, a] over the legal actions in two parts, (2, N): the largest, NaN where no action is legal, and
    the log of the sum of exp(q - largest).

    Only the second is differentiable by q. The first is a constant, on which the sum of both does not depend.
    """
    q = _cast(batch.q, accumulation_dtype(batch.q))
    return torch.stack(_soft_value(q, batch.action_mask)).view(2, *batch.shape)


def conservative_term(normaliser: Tensor, batch: Batch) -> Tensor:
    """logsumexp_a q[i, a] - q[i, a_i], N, the term of CQL(H) (Kumar et al., 2020); NaN where the action is illegal."""
    taken, legal = _taken(batch, batch.q)
    largest, rest = normaliser.unbind()
    term = (largest - _cast(taken, normaliser.dtype).view(largest.shape)) + rest
    return term if legal is None else torch.where(legal.view(term.shape), term, torch.nan)


def legal_values(x: Tensor, mask: Tensor | None) -> Tensor:
    """Select the legal actions; the others are -inf, which adds nothing to a maximum or a sum of exponentials."""
    return x if mask is None else torch.where(mask if mask.shape == x.shape else mask.reshape(x.shape), x, -torch.inf)


def bootstrapped(rewards: Tensor, values: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Bellman target: rewards + gamma * values, or rewards where the episode ended."""
    if isinstance(batch.gamma, Tensor):
        target = torch.addcmul(rewards, _cast(batch.gamma, dtype), values)
    else:
        target = torch.add(rewards, values, alpha=batch.gamma)
    # Selected, not multiplied by 1 - terminated: NaN * 0 is NaN.
    if batch.terminated is not None:
        return torch.where(_cast(batch.terminated, torch.bool), rewards, target)
    return target if batch.non_final_mask is None else torch.where(batch.non_final_mask, target, rewards)


def _next_values(batch: Batch, next_q: Tensor, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """What the next state of each sample is worth, (n,); anything in the rows that non_final_mask leaves out."""
    mask = batch.next_action_mask
    if spec.target != "max":
        values = torch.add(*_soft_value(_cast(next_q, dtype), mask, spec.temperature)).view(-1)
    else:
        best = legal_values(next_q if batch.next_q_online is None else batch.next_q_online, mask)
        if batch.next_q_online is None:
            values = best = best.amax(-1)
        else:
            index = best.argmax(-1, keepdim=True)  # in a graph half of what max takes, which is two reductions there
            best = best.gather(-1, index).view(next_q.shape[:-1])
            values = next_q.gather(-1, index.view(*best.shape, 1)).squeeze(-1)
            values = torch.where(best.isnan(), torch.nan, values)
        if mask is not None:
            values = torch.where(best == -torch.inf, torch.nan, values)
        values = _cast(values.view(-1), dtype)
    return of_samples(values, batch)


def of_samples(values: Tensor, batch: Batch) -> Tensor:
    """Next states' values, (m, ...), as those of the samples, (n, ...); anything where non_final_mask is false."""
    if batch.non_final_mask is None:
        return values
    m = values.shape[0]
    if m == 0:
        return values.new_zeros((*batch.actions.shape, *values.shape[1:]))
    return values[(batch.non_final_mask.cumsum(0) - 1).clamp(0, m - 1)]


def _soft_value(x: Tensor, mask: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """temperature * logsumexp(x / temperature) over the legal actions in two parts, to be added after any difference.

    The largest of a row, a constant, NaN where no action is legal, and what the sum adds to it.
    """
    x = legal_values(x, mask)
    largest = x.detach().amax(-1)
    # Differences from the maximum are scaled, not the values: nothing overflows, whatever the temperature.
    difference = x - torch.where(largest.isinf(), 0, largest).unsqueeze(-1)
    if temperature != 1:
        difference.mul_(min(1 / temperature, torch.finfo(x.dtype).max))
    rest = temperature * difference.exp_().sum(-1).log()
    return largest if mask is None else torch.where(largest == -torch.inf, torch.nan, largest), rest


def _log_policy(batch: Batch, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """temperature * log pi(a_i|s_i) of the target network, (n,)."""
    assert batch.target_q is not None
    largest, rest = _soft_value(_cast(batch.target_q, dtype), batch.action_mask, spec.temperature)
    taken = _cast(_taken(batch, batch.target_q)[0], dtype)
    if batch.action_mask is not None:
        taken = legal_values(taken, _taken(batch, batch.action_mask)[0])
    return (taken - largest.view(-1)) - rest.view(-1)


def _taken(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x[i, a_i], (n,), and which of the actions are legal."""
    index, legal = legal_actions(batch.actions, x.shape[-1])
    return x.gather(-1, index.view(*x.shape[:-1], 1)).view(-1), legal


def legal_actions(actions: Tensor, A: int) -> tuple[Tensor, Tensor | None]:
    """Indices that are safe to gather with, and which actions are legal; None where check_values has seen to it."""
    index = _cast(actions, torch.int64)
    if looks_at_values(actions.device):
        return index, None
    # A clamp, of which Inductor knows the bounds: with where(legal, index, 0) it checks each index again.
    safe = index.clamp(0, A - 1)
    return safe, safe == index


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # to() costs 1 us even where it does nothing


def naive_dqn_loss(batch: TransitionBatch, main_net: Network, target_net: Network, gamma: float) -> Tensor:
    """DQN loss as a loop over the samples: the definition, one transition at a time.

    ``batch`` is ``(states, next_non_final_states, actions, rewards, non_final_mask)``: states (B, ...), the next
    states of the non-final transitions only (M, ...), actions (B,) or (B, 1), rewards (B,) or (B, 1), and the mask
    (B,) that is true for the M of them, in order. The networks map states (B, ...) to Q-values (B, A). Returns the
    mean squared TD error.
    """
    states, next_non_final_states, actions, rewards, non_final_mask = batch
    q = main_net(states)
    squared_errors = []
    next_index = 0
    for i in range(len(states)):
        target = rewards[i].reshape(())
        if non_final_mask[i]:
            with torch.no_grad():
                next_q = target_net(next_non_final_states[next_index : next_index + 1])
            target = target + gamma * next_q.max()
            next_index += 1
        squared_errors.append((q[i, int(actions[i])] - target) ** 2)
    return torch.stack(squared_errors).mean()


def simple_dqn_loss(batch: TransitionBatch, main_net: Network, target_net: Network, gamma: float) -> Tensor:
    """DQN loss with gather and a compacted batch of next states, as the PyTorch tutorial has it. See naive_dqn_loss."""
    states, next_non_final_states, actions, rewards, non_final_mask = batch
    taken = main_net(states).gather(1, actions.view(-1, 1)).squeeze(1)
    next_values = torch.zeros(len(states), dtype=taken.dtype, device=taken.device)
    if len(next_non_final_states):
        with torch.no_grad():
            next_values[non_final_mask] = target_net(next_non_final_states).max(1).values
    return F.mse_loss(taken, rewards.view(-1) + gamma * next_values)
