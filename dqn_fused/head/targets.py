"""From a target network's linear head: the value of the next states, and Munchausen's bonus."""

import torch
from torch import Tensor

from dqn_fused.arguments import LossSpec, accumulation_dtype
from dqn_fused.head.arguments import Head
from dqn_fused.head.sweep import Statistics, Sweep, log_total
from dqn_fused.head.taken import taken_values
from dqn_fused.head.whole import Whole


def next_sweep(head: Head, spec: LossSpec) -> Sweep | None:
    """The sweep that next_values needs; None if the target is ready."""
    if head.next_hidden is None or head.next_weight is None:
        return None
    mask = head.next_action_mask
    if head.next_hidden_online is not None:
        return Sweep(head.next_hidden_online, head.weight, head.bias, mask, "argmax", spec.temperature)
    kind = "max" if spec.target == "max" else "soft"
    return Sweep(head.next_hidden, head.next_weight, head.next_bias, mask, kind, spec.temperature)


def next_values(head: Head, spec: LossSpec, found: Statistics | None, shards: Whole) -> Tensor | None:
    """Value of each next state, (m,), in the accumulation dtype; None if the target is ready."""
    if found is None or head.next_hidden is None or head.next_weight is None:
        return None
    if found.first is not None:
        value = taken_values(head.next_hidden, head.next_weight, head.next_bias, found.first, shards)
        value = torch.where(found.largest.isnan(), torch.nan, value)
    else:
        value = found.largest if found.total is None else found.largest + log_total(found, spec.temperature)
    # With a mask, -inf means that no action was legal.
    return value if head.next_action_mask is None else torch.where(found.largest == -torch.inf, torch.nan, value)


def bonus_sweep(head: Head, spec: LossSpec) -> Sweep | None:
    """The sweep that bonus needs; None without Munchausen."""
    if head.target_hidden is None or head.next_weight is None:
        return None
    return Sweep(head.target_hidden, head.next_weight, head.next_bias, head.action_mask, "soft", spec.temperature)


def bonus(head: Head, actions: Tensor, spec: LossSpec, found: Statistics, shards: Whole) -> Tensor:
    """alpha * clip(temperature * log pi(a|s), clip, 0) of the target network, (n,): Vieillard et al. (2020).

    NaN where an action is out of range.
    """
    hidden, weight, mask = head.target_hidden, head.next_weight, head.action_mask
    assert hidden is not None
    assert weight is not None
    taken, largest = taken_values(hidden, weight, head.next_bias, actions, shards, mask), found.largest
    if mask is not None:
        largest = torch.where(largest == -torch.inf, torch.nan, largest)
    log_policy = (taken - largest) - log_total(found, spec.temperature)
    return spec.alpha * log_policy.to(accumulation_dtype(head.hidden)).clamp(spec.clip, 0)
