"""The DQN loss in plain PyTorch: ground truth for the kernels, fallback where none of them runs.

:func:`dqn_loss` keeps the promises of :func:`dqn_fused.fused_dqn_loss` and leaves the gradient to autograd.
:func:`naive_dqn_loss` and :func:`simple_dqn_loss` are the loss as it is written by hand: a loop over the samples, and a
gather.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused.arguments import (
    Batch,
    LossSpec,
    accumulation_dtype,
    check_batch,
    check_loss,
    check_values,
    looks_at_values,
)

TransitionBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Network = Callable[[Tensor], Tensor]


def dqn_loss(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    loss: str = "mse",
    reduction: str = "mean",
    return_td_error: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """DQN loss (Mnih et al., 2015) by PyTorch operations, differentiated by autograd, on any device.

    Arguments, result and errors are those of :func:`dqn_fused.fused_dqn_loss`; ``backend`` is there for the sake of the
    same signature and must be ``"auto"`` or ``"torch"``.

    >>> import torch
    >>> q = torch.tensor([[0.2, 1.2, 1.3]])
    >>> dqn_loss(q, torch.tensor([1]), torch.tensor([0.7]), torch.zeros(1, 3), torch.tensor([True]))
    tensor(0.2500)
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: the reference is PyTorch, expected 'auto' or 'torch', got {backend!r}")
    spec = check_loss(loss, reduction)
    batch = check_values(check_batch(q, actions, rewards, next_q, terminated, gamma, non_final_mask))
    td = td_error(batch)
    result = loss_of_td_error(td, spec)
    if reduction == "none":
        result = result.view(batch.shape)
    return (result, td.detach().view(batch.shape)) if return_td_error else result


def td_error(batch: Batch) -> Tensor:
    """TD errors q[i, a_i] - y_i, (n,), differentiable by q; NaN where the action is illegal."""
    dtype = accumulation_dtype(batch.q)
    with torch.no_grad():
        target = _cast(batch.rewards, dtype)
        values = _next_values(batch, dtype)
        if isinstance(batch.gamma, Tensor):
            bootstrapped = torch.addcmul(target, _cast(batch.gamma, dtype), values)
        else:
            bootstrapped = torch.add(target, values, alpha=batch.gamma)
        # Selected, not multiplied by 1 - terminated: NaN * 0 is NaN.
        if batch.terminated is not None:
            target = torch.where(_cast(batch.terminated, torch.bool), target, bootstrapped)
        elif batch.non_final_mask is not None:
            target = torch.where(batch.non_final_mask, bootstrapped, target)
        else:
            target = bootstrapped
    taken, legal = _taken(batch)
    td = _cast(taken, dtype) - target
    return td if legal is None else torch.where(legal, td, torch.nan)


def loss_of_td_error(td: Tensor, spec: LossSpec) -> Tensor:
    """Reduced loss of (n,) TD errors."""
    per_sample = td.square()
    if spec.reduction == "none":
        return per_sample
    return per_sample.mean() if spec.reduction == "mean" else per_sample.sum()


def _taken(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """q[i, a_i], and which of them are legal."""
    index, legal = legal_actions(batch.actions, batch.q.shape[-1])
    return batch.q.gather(-1, index.view(*batch.q.shape[:-1], 1)).view(-1), legal


def legal_actions(actions: Tensor, A: int) -> tuple[Tensor, Tensor | None]:
    """Indices that are safe to gather with, and which actions are legal; None where check_values has seen to it."""
    index = _cast(actions, torch.int64)
    if looks_at_values(actions.device):
        return index, None
    legal = (index >= 0) & (index < A)
    return torch.where(legal, index, 0), legal


def _next_values(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Largest next value of each sample, (n,); anything in the rows that non_final_mask leaves out."""
    values = _cast(batch.next_q.amax(-1).view(-1), dtype)
    if batch.non_final_mask is None:
        return values
    m = values.shape[0]
    if m == 0:
        return torch.zeros(batch.actions.shape, dtype=dtype, device=values.device)
    return values[(batch.non_final_mask.cumsum(0) - 1).clamp(0, m - 1)]


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
