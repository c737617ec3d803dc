"""The one place that checks the arguments of a linear head: hidden states and layers in, flat ones out."""

from typing import NamedTuple

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec, check_compacted, check_double, check_samples, check_values
from dqn_fused.checks import BOOL, FLOATS, dense, matrix, show, wrong_device


class Head(NamedTuple):
    """Hidden states and the layers on top of them; checked, the leading dimensions are flattened."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    next_hidden: Tensor  # (m, D)
    next_weight: Tensor  # (A, D)
    next_bias: Tensor | None  # (A,)
    next_hidden_online: Tensor | None  # (m, D)
    next_action_mask: Tensor | None  # (m, A)


def check_head(head: Head, samples: Batch, spec: LossSpec, sharded: bool = False) -> tuple[Head, Batch]:
    """Check shapes, dtypes, devices and values; flatten. Of samples what there is one of for each sample is read.

    Sharded, the layers have the rows of a rank, maybe none, and the range of the actions is left to the ranks.
    """
    hidden, weight, bias, next_hidden, next_weight, next_bias, next_hidden_online, next_action_mask = head
    dense("hidden", hidden, FLOATS)
    device, shape = hidden.device, hidden.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (*N, D) with at least one feature, got {show(shape)}")
    dense("weight", weight, FLOATS)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded) or weight.shape[1] != shape[-1]:
        raise ValueError(f"weight: expected shape (A, {shape[-1]}), as nn.Linear holds it, got {show(weight.shape)}")
    A, D = weight.shape
    for name, x, size in (
        ("weight", weight, (A, D)),
        ("bias", bias, (A,)),
        ("next_weight", next_weight, (A, D)),
        ("next_bias", next_bias, (A,)),
    ):
        if x is not None:
            dense(name, x, FLOATS)
            if x.device != device:
                wrong_device(name, x, device, "hidden")
            if x.shape != size:
                raise ValueError(f"{name}: expected shape {show(size)}, got {show(x.shape)}")
    actions, rewards, terminated, gamma, mask, weights = check_samples(samples, shape[:-1], device, "hidden")
    next_shape, like = shape, "hidden"
    if mask is not None and isinstance(next_hidden, Tensor):
        check_compacted("next_hidden", next_hidden, D, mask)
        next_shape, like = next_hidden.shape, "next_hidden"
    next_hidden = matrix("next_hidden", next_hidden, FLOATS, next_shape, like, device)
    if next_hidden_online is not None:
        check_double("next_hidden_online", spec)
        next_hidden_online = matrix("next_hidden_online", next_hidden_online, FLOATS, next_shape, like, device)
    if next_action_mask is not None:
        legal_shape = torch.Size((*next_shape[:-1], A))
        next_action_mask = matrix("next_action_mask", next_action_mask, BOOL, legal_shape, f"{like} and weight", device)
    hidden, next_hidden = flat(hidden), flat(next_hidden)
    next_hidden_online = None if next_hidden_online is None else flat(next_hidden_online)
    next_action_mask = None if next_action_mask is None else flat(next_action_mask)
    batch = Batch(hidden, actions, rewards, next_hidden, terminated, gamma, mask, weights=weights, shape=shape[:-1])
    batch = check_values(batch, None if sharded else A, next_hidden.shape[0], "next_hidden")
    checked = Head(hidden, weight, bias, next_hidden, next_weight, next_bias, next_hidden_online, next_action_mask)
    return checked, batch


def autocast(head: Head) -> Head:
    """Hidden states as ``nn.Linear`` would read them: under autocast in its dtype, float64 excepted."""
    device = head.hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return head
    dtype = torch.get_autocast_dtype(device)
    names = ("hidden", "next_hidden", "next_hidden_online")
    states = {name: getattr(head, name) for name in names}
    return head._replace(
        **{name: x.to(dtype) for name, x in states.items() if x is not None and x.dtype is not torch.float64}
    )


def flat(x: Tensor) -> Tensor:
    """(*N, D) as (n, D), copied where its leading dimensions do not merge."""
    return x.reshape(-1, x.shape[-1])
