"""The one place that checks arguments: it makes a flat, immutable description of the batch from the user's tensors."""

import os
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor

from dqn_fused.checks import (
    BOOL,
    FLAGS,
    FLOATS,
    INTEGERS,
    NUMBERS,
    WIDE_UNSIGNED,
    dense,
    matrix,
    per_sample,
    row_index,
    rows,
    show,
)  # fmt: skip
from dqn_fused.options import LossSpec as LossSpec
from dqn_fused.options import check_loss as check_loss
from dqn_fused.targets import number

CPU = torch.device("cpu")
_FAKE = torch._C._TorchDispatchModeKey.FAKE

UNCHECKED = torch.Size((-1,))  # shape of a batch before the checks: one dimension, of whatever size q has


class Batch(NamedTuple):
    """A batch of n = prod(N) transitions, first as the user gave it, then checked and flattened, as a backend takes it.

    The shapes below are those of a checked batch, whose per-sample tensors are contiguous and one-dimensional. It has
    methods and no properties, because Dynamo does not trace properties of a named tuple in torch 2.10.
    """

    q: Tensor  # (n, A), or (outer, inner, A) where the leading dimensions do not merge
    actions: Tensor  # (n,)
    rewards: Tensor  # (n,); without next_q the target itself
    next_q: Tensor | None  # as q, or (m, A) with non_final_mask
    terminated: Tensor | None = None  # (n,)
    gamma: float | Tensor = 0.0  # number, () or (n,)
    non_final_mask: Tensor | None = None  # (n,)
    next_q_online: Tensor | None = None  # as next_q
    next_action_mask: Tensor | None = None  # as next_q
    weights: Tensor | None = None  # (n,)
    target_q: Tensor | None = None  # as q
    action_mask: Tensor | None = None  # as q
    shape: torch.Size = UNCHECKED  # N
    checked: Tensor | None = None  # (n,), filled with the actions, or with -1 if non_final_mask does not fit next_q

    def flat(self) -> tuple[Any, ...]:
        """The fields as an op takes them, without shape and checked. gamma is two: a tensor or None, and a number."""
        q, actions, rewards, next_q, terminated, gamma, non_final_mask, *rest = self
        gammas, number = (gamma, 0.0) if isinstance(gamma, Tensor) else (None, gamma)
        return (q, actions, rewards, next_q, terminated, non_final_mask, gammas, number, *rest[:-2])

    def action_count(self) -> int:
        """Number of actions."""
        return self.q.shape[-1]

    def saved_actions(self) -> Tensor:
        """The actions that the backward uses once the forward has run."""
        return self.actions if self.checked is None else self.checked

    def next_count(self) -> int:
        """Number of rows of next_q."""
        return 0 if self.next_q is None else self.next_q.shape[0]


NOT_DISTRIBUTIONAL = ("target_q", "action_mask")  # the last fields that an op takes: of the scalar losses only


class Reduced(Protocol):
    """What is computed from a batch, for any family of losses: one of its options is the reduction."""

    @property
    def reduction(self) -> str:
        """One of REDUCTIONS."""

    def _replace(self: "SpecT", *, reduction: str) -> "SpecT": ...


SpecT = TypeVar("SpecT", bound=Reduced)


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the arithmetic, the loss and the TD errors: float32, and float64 for a float64 q."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def check_batch(batch: Batch, spec: LossSpec) -> Batch:
    """Check shapes, dtypes and devices and flatten the leading dimensions. Looks at no value (see check_values)."""
    (
        q, _, _, next_q, _, _, _, next_q_online, next_action_mask, _, target_q, action_mask, *_,
    ) = batch  # fmt: skip
    dense("q", q, FLOATS)
    q_shape, device = q.shape, q.device
    if not q_shape or q_shape[-1] == 0:
        raise ValueError(f"q: expected shape (*N, A) with at least one action, got {show(q_shape)}")
    shape = q_shape[:-1]
    actions, rewards, terminated, gamma, non_final_mask, weights = check_samples(batch, shape, device, "q")

    next_shape, like = q_shape, "q"
    if non_final_mask is not None and isinstance(next_q, Tensor):
        check_compacted("next_q", next_q, q_shape[-1], non_final_mask)
        next_shape, like = next_q.shape, "next_q"
    if next_q is not None:
        next_q = matrix("next_q", next_q, FLOATS, next_shape, "q", device)
    if next_q_online is not None:
        check_double("next_q_online", spec)
        next_q_online = matrix("next_q_online", next_q_online, FLOATS, next_shape, like, device)
    if next_action_mask is not None:
        next_action_mask = matrix("next_action_mask", next_action_mask, BOOL, next_shape, like, device)
    if target_q is not None:
        if spec.target != "munchausen":
            raise ValueError(f"target_q: expected None with target {spec.target!r}: only Munchausen reads it")
        target_q = matrix("target_q", target_q, FLOATS, q_shape, "q", device)
    elif spec.target == "munchausen":
        raise ValueError("target_q: expected the target network's Q(s, .) with target 'munchausen', got None")
    if action_mask is not None:
        check_action_mask(spec)
        action_mask = matrix("action_mask", action_mask, BOOL, q_shape, "q", device)
    return Batch(
        rows(q), actions, rewards, next_q, terminated, gamma, non_final_mask,
        next_q_online, next_action_mask, weights, target_q, action_mask, shape,
    )  # fmt: skip


def constants(batch: Batch) -> Batch:
    """The batch with everything except q detached: no_grad would not stop a tangent of forward mode."""
    detached: dict[str, Any] = {name: x.detach() for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    return batch._replace(**detached | {"q": batch.q})


def check_double(name: str, spec: LossSpec) -> None:
    """Check that the target chooses one action."""
    if spec.target != "max":
        raise ValueError(
            f"{name}: expected None with target {spec.target!r}: double DQN chooses one action, the soft value "
            "averages over all of them"
        )


def check_action_mask(spec: LossSpec) -> None:
    """Check that the loss has a sum over the actions of the state itself."""
    if spec.target != "munchausen" and not spec.cql:
        raise ValueError(
            "action_mask: expected None: without target='munchausen' or cql_alpha no sum over the actions of s is "
            "taken; legal actions of the next state are next_action_mask"
        )


def check_samples(
    batch: Batch, shape: torch.Size, device: torch.device, like: str
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor, Tensor | None, Tensor | None]:
    """Check and flatten the per-sample arguments: actions, rewards, terminated, gamma, mask, weights."""
    _, actions, rewards, next_q, terminated, gamma, mask, _, _, weights, *_ = batch
    actions = per_sample("actions", actions, INTEGERS, shape, device, like)
    if actions.dtype in WIDE_UNSIGNED:
        actions = actions.to(torch.int64)
    rewards = per_sample("target" if next_q is None else "rewards", rewards, NUMBERS, shape, device, like)
    if mask is not None:
        if terminated is not None:
            raise ValueError("terminated: expected None beside non_final_mask, which says the same; give one of them")
        mask = per_sample("non_final_mask", mask, BOOL, shape, device, like)
    elif terminated is not None:
        terminated = per_sample("terminated", terminated, FLAGS, shape, device, like)
    if weights is not None:
        weights = per_sample("weights", weights, FLOATS, shape, device, like)
    if isinstance(gamma, Tensor):
        one_for_all = gamma.dim() == 0
        gamma = per_sample("gamma", gamma, FLOATS, torch.Size() if one_for_all else shape, device, like)
        if one_for_all:
            gamma = gamma.reshape(())
    elif type(gamma) is not float:
        gamma = number("gamma", gamma, "a number or a torch.Tensor")
    return actions, rewards, terminated, gamma, mask, weights


def check_compacted(name: str, x: Tensor, columns: int, non_final_mask: Tensor) -> None:
    """Check that x holds the rows of the next states that are not final."""
    n = non_final_mask.shape[0]
    if x.dim() != 2 or x.shape[1] != columns or x.shape[0] > n:
        raise ValueError(
            f"{name}: expected shape (M, {columns}) with non_final_mask, M being the number of its true entries, at "
            f"most {n}, got {show(x.shape)}"
        )


def check_group(process_group: "dist.ProcessGroup", spec: Reduced) -> None:
    """Check that a process group is one, and has something to sum."""
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}; "
            "torch.distributed.group.WORLD is the one of all ranks"
        )
    if spec.reduction != "weighted_mean":
        raise ValueError(
            f"process_group: expected None with reduction {spec.reduction!r}: only 'weighted_mean' sums over ranks"
        )


def normalise_weights(
    batch: Batch, spec: SpecT, process_group: "dist.ProcessGroup | None" = None
) -> tuple[Batch, SpecT]:
    """Turn the weighted mean into a sum with weights that add up to one, so that no backend needs to know of it.

    In a process group they add up to one on average over its ranks, because gradients are averaged over the ranks.
    """
    weights, dtype = batch.weights, accumulation_dtype(batch.q)
    if process_group is not None:  # a rank without a sample takes part, too
        weights = batch.q.new_ones(batch.actions.shape, dtype=dtype) if weights is None else weights.to(dtype)
        total = weights.detach().sum()
        dist.all_reduce(total, group=process_group)
        weights = weights * (dist.get_world_size(process_group) / total)
        return batch._replace(weights=weights), spec._replace(reduction="sum")
    if weights is None or weights.numel() == 0:  # the mean of nothing is NaN, the sum is not
        return batch, spec._replace(reduction="mean")
    weights = weights.to(dtype)
    return batch._replace(weights=weights / weights.sum()), spec._replace(reduction="sum")


def check_values(batch: Batch, A: int | None, m: int, next_name: str = "next_q", counts_mask: bool = False) -> Batch:
    """Check what only the values show: actions inside [0, A), if A is known, and m true entries in non_final_mask.

    On the CPU, and on any device with ``DQN_FUSED_CHECK=1``, a violation is an IndexError. Elsewhere reading the values
    would cost a synchronisation: an illegal action is left to the backend (td is NaN, the gradient row zero), and a
    wrong mask makes every action illegal, either here or, with counts_mask, in the backend. Inside torch.compile no
    value is read: a raise would break the graph.
    """
    mask = batch.non_final_mask
    if not looks_at_values(batch.actions.device) or isinstance(batch.actions, FakeTensor):
        if mask is None:
            return batch
        if counts_mask and not torch.compiler.is_compiling():
            return batch._replace(checked=torch.empty_like(batch.actions, dtype=torch.int64))
        return batch._replace(actions=torch.where(mask.sum() == m, batch.actions.to(torch.int64), -1))
    if A is not None:
        check_actions(batch, A)
    if mask is not None and (count := int(mask.sum())) != m:
        raise IndexError(
            f"non_final_mask: expected as many true entries as {next_name} has rows, {m}, got {count} of {mask.numel()}"
        )
    return batch


def check_actions(batch: Batch, A: int) -> None:
    """Check that the values of the actions are inside [0, A)."""
    low, high = action_range(batch)
    if low < 0 or high >= A:
        actions = batch.actions.to(torch.int64)  # A may not fit the dtype of the actions
        row = int(((actions < 0) | (actions >= A)).int().argmax())
        where = row_index(row, batch.shape)
        raise IndexError(f"actions: expected values in [0, {A}), got {int(batch.actions[row])} in row {where}")


def action_range(batch: Batch) -> tuple[int, int]:
    """Lowest and highest action; (0, 0) if there is none."""
    if not batch.actions.numel():
        return 0, 0
    low, high = torch.aminmax(batch.actions)
    return int(low), int(high)


def looks_at_values(device: torch.device) -> bool:
    """Whether check_values looks at the values, so that everything after it may rely on legal actions."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None:
        return False
    if device == CPU:  # device.type makes a string, which takes as long as all the rest
        return True
    return device.type != "meta" and asked_to_check()


def asked_to_check() -> bool:
    """Whether ``DQN_FUSED_CHECK`` asks for the checks that take time."""
    return os.environ.get("DQN_FUSED_CHECK", "0") not in ("", "0")
