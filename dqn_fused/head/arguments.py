"""The one place that checks the arguments of a linear head: hidden states and layers in, flat ones out."""

from typing import NamedTuple

import torch
from torch import Tensor

from dqn_fused.arguments import (
    Batch,
    LossSpec,
    check_action_mask,
    check_compacted,
    check_double,
    check_samples,
    check_values,
)
from dqn_fused.checks import BOOL, FLOATS, dense, has_autocast, matrix, show, wrong_device


class Head(NamedTuple):
    """Hidden states and the layers on top of them; checked, the leading dimensions are flattened.

    With a ready target, the fields of the next state and of the target network are None.
    """

    hidden: Tensor  # (n, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    next_hidden: Tensor | None = None  # (m, D)
    next_weight: Tensor | None = None  # (A, D)
    next_bias: Tensor | None = None  # (A,)
    next_hidden_online: Tensor | None = None  # (m, D)
    next_action_mask: Tensor | None = None  # (m, A)
    target_hidden: Tensor | None = None  # (n, D)
    action_mask: Tensor | None = None  # (n, A)


def check_head(head: Head, samples: Batch, spec: LossSpec, sharded: bool = False) -> tuple[Head, Batch]:
    """Check shapes, dtypes, devices and values, and flatten. Of ``samples`` only the per-sample fields are read.

    If sharded, the layers hold the rows of one rank, possibly none, and the ranks check the range of the actions.
    """
    hidden = head.hidden
    dense("hidden", hidden, FLOATS)
    device, shape = hidden.device, hidden.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (*N, D) with at least one feature, got {show(shape)}")
    A = check_layers(head, least=0 if sharded else 1)
    actions, rewards, terminated, gamma, mask, weights = check_samples(samples, shape[:-1], device, "hidden")
    head = _check_state(_check_next_state(head, mask, spec, A), spec, A)
    next_hidden = head.next_hidden
    batch = Batch(
        head.hidden, actions, rewards, next_hidden, terminated, gamma, mask, weights=weights, shape=shape[:-1]
    )
    return head, check_values(
        batch, None if sharded else A, 0 if next_hidden is None else next_hidden.shape[0], "next_hidden"
    )


def check_layers(head: Head, least: int) -> int:
    """Check weights and biases, which need at least ``least`` rows; return the number of rows."""
    hidden, weight = head.hidden, head.weight
    D, device = hidden.shape[-1], hidden.device
    dense("weight", weight, FLOATS)
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] != D:
        raise ValueError(f"weight: expected shape (A, {D}), as nn.Linear holds it, got {show(weight.shape)}")
    A = weight.shape[0]
    for name, x, size in (
        ("weight", weight, (A, D)),
        ("bias", head.bias, (A,)),
        ("next_weight", head.next_weight, (A, D)),
        ("next_bias", head.next_bias, (A,)),
    ):
        if x is not None:
            dense(name, x, FLOATS)
            if x.device != device:
                wrong_device(name, x, device, "hidden")
            if x.shape != size:
                raise ValueError(f"{name}: expected shape {show(size)}, got {show(x.shape)}")
    return A


def _check_state(head: Head, spec: LossSpec, A: int) -> Head:
    """Check and flatten the arguments about the state itself."""
    hidden, target_hidden, mask = head.hidden, head.target_hidden, head.action_mask
    if target_hidden is not None:
        if spec.target != "munchausen":
            raise ValueError(f"target_hidden: expected None with target {spec.target!r}: only Munchausen reads it")
        target_hidden = flat(matrix("target_hidden", target_hidden, FLOATS, hidden.shape, "hidden", hidden.device))
    elif spec.target == "munchausen":
        raise ValueError("target_hidden: expected the target network's states with target 'munchausen', got None")
    if mask is not None:
        check_action_mask(spec)
        legal_shape = torch.Size((*hidden.shape[:-1], A))
        mask = flat(matrix("action_mask", mask, BOOL, legal_shape, "hidden and weight", hidden.device))
    return head._replace(hidden=flat(hidden), target_hidden=target_hidden, action_mask=mask)


def _check_next_state(head: Head, non_final_mask: Tensor | None, spec: LossSpec, A: int) -> Head:
    """Check and flatten the arguments about the next states, if there are any."""
    next_hidden, online, mask = head.next_hidden, head.next_hidden_online, head.next_action_mask
    if next_hidden is None:
        return head
    dense("next_weight", head.next_weight, FLOATS)  # type: ignore[arg-type]  # None is refused
    (*_, D), device = head.hidden.shape, head.hidden.device
    shape, like = head.hidden.shape, "hidden"
    if non_final_mask is not None and isinstance(next_hidden, Tensor):
        check_compacted("next_hidden", next_hidden, D, non_final_mask)
        shape, like = next_hidden.shape, "next_hidden"
    next_hidden = matrix("next_hidden", next_hidden, FLOATS, shape, like, device)
    if online is not None:
        check_double("next_hidden_online", spec)
        online = flat(matrix("next_hidden_online", online, FLOATS, shape, like, device))
    if mask is not None:
        mask = flat(matrix("next_action_mask", mask, BOOL, torch.Size((*shape[:-1], A)), f"{like} and weight", device))
    return head._replace(next_hidden=flat(next_hidden), next_hidden_online=online, next_action_mask=mask)


def autocast(head: Head) -> Head:
    """Hidden states as ``nn.Linear`` reads them: under autocast in its dtype, except float64."""
    device = head.hidden.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):  # meta has none
        return head
    dtype = torch.get_autocast_dtype(device)
    names = ("hidden", "next_hidden", "next_hidden_online", "target_hidden")
    states = {name: getattr(head, name) for name in names}
    return head._replace(
        **{name: x.to(dtype) for name, x in states.items() if x is not None and x.dtype is not torch.float64}
    )


def flat(x: Tensor) -> Tensor:
    """(*N, D) as (n, D), copied where its leading dimensions do not merge."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
