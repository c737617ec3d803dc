"""The loss as users write it, in the dtype the tensors have: its error is the yardstick for a backend's."""

from typing import Any

import torch
import torch.nn.functional as F
from oracle import Arguments
from torch import Tensor

from dqn_fused import Munchausen


def eager(**arguments: Any) -> tuple[Tensor, Tensor]:
    """(loss, td_error); the arguments are those of ``Arguments``."""
    a = Arguments(**arguments)
    target = a.named_target()
    n, A = a.q.shape[:-1].numel(), a.q.shape[-1]
    index = a.actions.reshape(-1, 1).long()
    taken = a.q.reshape(n, A).gather(1, index).squeeze(1)
    y = a.rewards.reshape(-1)
    if isinstance(target, Munchausen):
        log_policy = torch.log_softmax(_legal(a.target_q, a.action_mask) / target.temperature, 1)
        bonus = target.temperature * log_policy.gather(1, index).squeeze(1)
        y = y + target.alpha * bonus.clamp(target.clip, 0)
    if a.next_q is not None:
        gamma = a.gamma.reshape(-1) if isinstance(a.gamma, Tensor) else a.gamma
        y = y + gamma * _bootstrapped(a)
    if a.value_transform == "signed_hyperbolic":
        y = y.sign() * ((y.abs() + 1).sqrt() - 1) + 1e-3 * y
    td = taken - y.detach()
    zero = torch.zeros_like(td)
    if a.loss == "mse":
        per_sample = td**2
    elif a.loss == "huber":
        per_sample = F.huber_loss(td, zero, reduction="none", delta=a.delta)
    else:
        per_sample = F.smooth_l1_loss(td, zero, reduction="none", beta=a.delta)
    if a.cql_alpha:
        per_sample = per_sample + a.cql_alpha * (torch.logsumexp(_legal(a.q, a.action_mask), 1) - taken)
    w = torch.ones_like(td) if a.weights is None else a.weights.reshape(-1)
    per_sample = per_sample * w
    if a.reduction == "none":
        return per_sample.view(a.q.shape[:-1]), td.detach().view(a.q.shape[:-1])
    total = per_sample.mean() if a.reduction == "mean" else per_sample.sum()
    return total / w.sum() if a.reduction == "weighted_mean" else total, td.detach().view(a.q.shape[:-1])


def _legal(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (n, A), -inf where an action is illegal."""
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None else x.masked_fill(~mask.reshape(x.shape), -torch.inf)


def _bootstrapped(a: Arguments) -> Tensor:
    """Value of each sample's next state, (n,), 0 where the episode ended."""
    target, n = a.named_target(), a.q.shape[:-1].numel()
    if target != "max":
        value = target.temperature * torch.logsumexp(_legal(a.next_q, a.next_action_mask) / target.temperature, 1)
    elif a.next_q_online is not None:
        best = _legal(a.next_q_online, a.next_action_mask).argmax(1, keepdim=True)
        value = _legal(a.next_q, None).gather(1, best).squeeze(1)
    else:
        value = _legal(a.next_q, a.next_action_mask).max(1).values
    if a.non_final_mask is not None:
        values = torch.zeros(n, dtype=value.dtype, device=a.q.device)
        values[a.non_final_mask.reshape(-1)] = value.detach()
    else:
        ends = torch.zeros(n, device=a.q.device) if a.terminated is None else a.terminated.reshape(-1)
        values = torch.where(ends != 0, 0, value)
    if a.value_transform == "signed_hyperbolic":
        root = ((1 + 4e-3 * (values.abs() + 1 + 1e-3)).sqrt() - 1) / 2e-3
        values = values.sign() * (root.square() - 1)
    return values
