"""What a target network's linear head says: the value of the next states, and Munchausen's bonus of the state."""

import torch
from torch import Tensor

from dqn_fused.arguments import LossSpec, accumulation_dtype
from dqn_fused.head.arguments import Head
from dqn_fused.head.sweep import Sweep, log_total
from dqn_fused.head.taken import taken_values
from dqn_fused.head.whole import Sweeper, Whole


def next_values(head: Head, spec: LossSpec, sweep: Sweeper, shards: Whole) -> Tensor | None:
    """What each next state is worth, (m,), in the accumulation dtype; None where a target is ready.

    Nothing of size (m, A) is held.
    """
    if head.next_hidden is None or head.next_weight is None:
        return None
    mask = head.next_action_mask
    if head.next_hidden_online is not None:
        found = sweep(Sweep(head.next_hidden_online, head.weight, head.bias, mask, "argmax", spec.temperature))
        assert found.first is not None
        value = taken_values(head.next_hidden, head.next_weight, head.next_bias, found.first, shards)
        value = torch.where(found.largest.isnan(), torch.nan, value)
    else:
        kind = "max" if spec.target == "max" else "soft"
        found = sweep(Sweep(head.next_hidden, head.next_weight, head.next_bias, mask, kind, spec.temperature))
        value = found.largest if kind == "max" else found.largest + log_total(found, spec.temperature)
    # With a mask, -inf says that no action was legal.
    return value if mask is None else torch.where(found.largest == -torch.inf, torch.nan, value)


def bonus(head: Head, actions: Tensor, spec: LossSpec, sweep: Sweeper, shards: Whole) -> Tensor:
    """alpha * clip(temperature * log pi(a|s), clip, 0) of the target network, (n,): Vieillard et al. (2020).

    NaN where an action is out of range.
    """
    hidden, weight, mask = head.target_hidden, head.next_weight, head.action_mask
    assert hidden is not None
    assert weight is not None
    found = sweep(Sweep(hidden, weight, head.next_bias, mask, "soft", spec.temperature))
    taken, largest = taken_values(hidden, weight, head.next_bias, actions, shards, mask), found.largest
    if mask is not None:
        largest = torch.where(largest == -torch.inf, torch.nan, largest)
    log_policy = (taken - largest) - log_total(found, spec.temperature)
    return spec.alpha * log_policy.to(accumulation_dtype(head.hidden)).clamp(spec.clip, 0)
