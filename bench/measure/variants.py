"""The loss family as people write it by hand, with random arguments for each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import Munchausen

Arguments = dict[str, Any]

GAMMA = 0.99
TEMPERATURE, ALPHA, CLIP = 0.03, 0.9, -1.0
CQL_ALPHA = 0.5


class Variant(NamedTuple):
    """A member of the family."""

    eager: Callable[..., Any]
    # Matrices of which every element counts, twice where both passes need it; next_q[1] is the second of a list.
    reads: tuple[str, ...]
    options: dict[str, Any]  # of fused_dqn_loss
    more: Callable[[int, int, torch.dtype, str], Arguments]  # arguments beside those of the plain loss


def eager_loss(q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor) -> Tensor:
    """The lines a DQN script writes: max, target, gather, mean squared error."""
    with torch.no_grad():
        target_max, _ = next_q.max(dim=1)
        target = rewards + GAMMA * target_max * (1 - terminated.float())
    taken = q.gather(1, actions.unsqueeze(1)).squeeze(1)
    return F.mse_loss(taken.float(), target.float())


def eager_double(
    q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor, next_q_online: Tensor
) -> Tensor:
    with torch.no_grad():
        target = double_target(rewards, next_q, terminated, next_q_online)
    return F.mse_loss(q.gather(1, actions.unsqueeze(1)).squeeze(1), target)


def double_target(
    rewards: Tensor, next_q: Tensor, terminated: Tensor, next_q_online: Tensor, mask: Tensor | None = None
) -> Tensor:
    if mask is not None:
        next_q_online = next_q_online.masked_fill(~mask, -torch.inf)
    best = next_q_online.argmax(1, keepdim=True)
    return rewards + GAMMA * next_q.gather(1, best).squeeze(1) * (1 - terminated.float())


def eager_clipped_double(
    q: Tensor, actions: Tensor, rewards: Tensor, next_q: Sequence[Tensor], terminated: Tensor
) -> Tensor:
    """The lines of DQN with two target networks, of which the smaller value of each action counts."""
    with torch.no_grad():
        target_max, _ = torch.min(next_q[0], next_q[1]).max(dim=1)
        target = rewards + GAMMA * target_max * (1 - terminated.float())
    return F.mse_loss(q.gather(1, actions.unsqueeze(1)).squeeze(1), target)


def eager_masked_double(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor,
    next_q_online: Tensor,
    next_action_mask: Tensor,
) -> Tensor:
    with torch.no_grad():
        target = double_target(rewards, next_q, terminated, next_q_online, next_action_mask)
    return F.mse_loss(q.gather(1, actions.unsqueeze(1)).squeeze(1), target)


def eager_prioritised(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor,
    next_q_online: Tensor,
    next_action_mask: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Masked double DQN with importance weights, and the TD errors for the replay buffer."""
    with torch.no_grad():
        target = double_target(rewards, next_q, terminated, next_q_online, next_action_mask)
    td = q.gather(1, actions.unsqueeze(1)).squeeze(1) - target
    return (weights * td.pow(2)).mean(), td.detach()


def eager_munchausen(
    q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor, target_q: Tensor
) -> Tensor:
    """The formula of the paper: the expectation of q - tau log pi under the softmax policy."""
    with torch.no_grad():
        log_policy = TEMPERATURE * F.log_softmax(target_q / TEMPERATURE, 1)
        bonus = log_policy.gather(1, actions.unsqueeze(1)).squeeze(1).clamp(CLIP, 0)
        next_log_policy = F.log_softmax(next_q / TEMPERATURE, 1)
        value = (next_log_policy.exp() * (next_q - TEMPERATURE * next_log_policy)).sum(1)
        target = rewards + ALPHA * bonus + GAMMA * value * (1 - terminated.float())
    return F.mse_loss(q.gather(1, actions.unsqueeze(1)).squeeze(1), target)


def eager_cql(
    q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor, next_q_online: Tensor
) -> Tensor:
    """Double DQN and the conservative term."""
    with torch.no_grad():
        target = double_target(rewards, next_q, terminated, next_q_online)
    taken = q.gather(1, actions.unsqueeze(1)).squeeze(1)
    return F.mse_loss(taken, target) + CQL_ALPHA * (torch.logsumexp(q, 1) - taken).mean()


def _matrix(n: int, A: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(n, A, dtype=dtype, device=device)


def _double(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    return {"next_q_online": _matrix(n, A, dtype, device)}


def _two_networks(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    return {"next_q": [_matrix(n, A, dtype, device) for _ in range(2)]}


def _masked(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    mask = torch.rand(n, A, device=device) < 0.7
    mask[:, 0] = True
    return {**_double(n, A, dtype, device), "next_action_mask": mask}


def _prioritised(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    return {**_masked(n, A, dtype, device), "weights": torch.rand(n, device=device)}


VARIANTS = {
    "dqn": Variant(eager_loss, ("next_q",), {}, lambda *size: {}),
    "double": Variant(eager_double, ("next_q_online",), {}, _double),
    "clipped double": Variant(eager_clipped_double, ("next_q[0]", "next_q[1]"), {"ensemble": "min"}, _two_networks),
    "masked double": Variant(eager_masked_double, ("next_q_online", "next_action_mask"), {}, _masked),
    "prioritised": Variant(
        eager_prioritised, ("next_q_online", "next_action_mask"), {"return_td_error": True}, _prioritised
    ),
    "munchausen": Variant(
        eager_munchausen,
        ("next_q", "target_q"),
        {"target": Munchausen(TEMPERATURE, ALPHA, CLIP)},
        lambda *size: {"target_q": _matrix(*size)},
    ),
    "cql": Variant(eager_cql, ("next_q_online", "q", "q"), {"cql_alpha": CQL_ALPHA}, _double),
}


def random_arguments(variant: Variant, n: int, A: int, dtype: torch.dtype, device: str, seed: int = 0) -> Arguments:
    """The same on every run; q requires a gradient."""
    torch.manual_seed(seed)
    return random_batch(n, A, dtype, device) | variant.more(n, A, dtype, device)


def random_batch(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    """Arguments of the plain loss."""
    return {
        "q": torch.randn(n, A, dtype=dtype, device=device, requires_grad=True),
        "actions": torch.randint(A, (n,), device=device),
        "rewards": torch.randn(n, device=device),
        "next_q": torch.randn(n, A, dtype=dtype, device=device),
        "terminated": torch.rand(n, device=device) < 0.1,
    }


def matrix(batch: Arguments, name: str) -> Tensor:
    """An argument, or one of a list of them, by its name in Variant.reads."""
    name, _, index = name.partition("[")
    found: Tensor = batch[name][int(index.rstrip("]"))] if index else batch[name]
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
