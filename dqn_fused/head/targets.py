"""What the next states are worth to a linear head: the Bellman target's part that needs all actions."""

from collections.abc import Callable

import torch
from torch import Tensor

from dqn_fused.arguments import LossSpec
from dqn_fused.head.arguments import Head
from dqn_fused.head.sweep import Statistics, Sweep, log_total
from dqn_fused.head.taken import taken_values
from dqn_fused.head.whole import WHOLE, Whole


def next_values(head: Head, spec: LossSpec, sweep: Callable[[Sweep], Statistics], shards: Whole = WHOLE) -> Tensor:
    """What each next state is worth, (m,), in the accumulation dtype; nothing of size (m, A) is held."""
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
