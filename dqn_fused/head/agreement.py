"""Checks of the arguments of a sharded head: every rank of the group passes them, or every rank raises."""

import zlib
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dqn_fused.arguments import Batch, action_range, asked_to_check, check_actions, looks_at_values
from dqn_fused.head.arguments import Head
from dqn_fused.head.ranks import Ranks

# Tensors whose values may differ: rows and columns of a rank. q and next_q are hidden and next_hidden again.
OF_THE_RANK = {"weight", "bias", "next_weight", "next_bias", "next_action_mask", "action_mask", "q", "next_q"}
# What must be equal on every rank, in the order of Agreement.equal.
EQUAL = (
    "number of samples",
    "number of next states",
    "number of features",
    "dtypes",
    "options",
    "optional arguments",
    "grad mode of hidden",
)
# An integer of as many bytes as an element has.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RAISED: dict[str, type[Exception]] = {error.__name__: error for error in (ValueError, TypeError, IndexError)}


class Agreement:
    """A with-block that checks arguments on every rank of a group: an error on one rank is an error on all.

    At its end the ranks exchange a few integers in one collective, and so do the ranks of a process group over which
    weights are summed. The rank with the wrong arguments raises its own error; every other rank raises an error of the
    same type that names the rank and the reason. A later failure, such as one of memory, ends in the group's time-out.
    """

    def __init__(self, group: "dist.ProcessGroup", process_group: "dist.ProcessGroup | None") -> None:
        self.group, self.process_group = group, process_group
        self.rows = 0
        self.equal: tuple[object, ...] = (0,) * len(EQUAL)
        self.checksums: dict[str, int] = {}
        self.samples: Batch | None = None
        self.ranks: Ranks | None = None

    def state(self, head: Head, samples: Batch, options: object) -> None:
        """Record the checked arguments of this rank."""
        self.rows, self.samples = head.weight.shape[0], samples
        tensors = head._asdict() | samples._asdict()
        states = [head.hidden, head.next_hidden, head.next_hidden_online, head.target_hidden]
        self.equal = (
            head.hidden.shape[0],
            0 if head.next_hidden is None else head.next_hidden.shape[0],
            head.hidden.shape[1],
            [None if x is None else x.dtype for x in states],
            (options, None if isinstance(samples.gamma, Tensor) else samples.gamma, self.process_group is not None),
            [name for name, x in tensors.items() if x is not None],
            (torch.is_grad_enabled(), head.hidden.requires_grad),
        )
        if asked_to_check():
            same = {name: x for name, x in tensors.items() if name not in OF_THE_RANK and isinstance(x, Tensor)}
            self.checksums = {name: checksum(x) for name, x in same.items()}

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if not (error is None or isinstance(error, Exception)):
            return
        found = error
        try:
            self._exchange(error)
        except Exception as another:
            found = another
        if isinstance(self.process_group, dist.ProcessGroup):
            _tell("process_group", self.process_group, [], found)
        if found is not None and found is not error:
            raise found

    def _exchange(self, error: Exception | None) -> None:
        """Send the facts of this rank and compare those of all; every rank comes to the same result."""
        looked = self.samples is not None and looks_at_values(self.samples.actions.device)
        actions = action_range(self.samples) if self.samples is not None and looked else (0, 0)
        # 0: this rank does not check values
        values = _number(self.checksums) if self.checksums else 0
        facts = [self.rows, *actions, *(_number(x) for x in self.equal), values]
        found = _tell("tensor_parallel_group", self.group, facts, error)
        for i, what in enumerate(EQUAL):
            column = [facts[3 + i] for facts in found]
            other = next((rank for rank, x in enumerate(column) if x != column[0]), None)
            if other is not None:
                raise ValueError(
                    f"tensor_parallel_group: expected the same {what} on every rank, but rank {other} differs from "
                    f"rank 0; this rank has {self.equal[i]}"
                )
        sums = [facts[-1] for facts in found]
        if 0 not in sums and len(set(sums)) > 1:
            self._raise_of_values()
        rows = [facts[0] for facts in found]
        A = sum(rows)
        if A == 0:
            raise ValueError(f"weight: expected at least one row on one of the ranks, got {rows}")
        assert self.samples is not None
        if looked:
            check_actions(self.samples, A)
        for other, (_, low, high, *_) in enumerate(found):
            if low < 0 or high >= A:
                text = f"actions: expected values in [0, {A}), got {low if low < 0 else high}"
                raise IndexError(_of_another("tensor_parallel_group", other, text))
        self.ranks = Ranks(self.group, sum(rows[: dist.get_rank(self.group)]), A)

    def _raise_of_values(self) -> NoReturn:
        """Name the first tensor whose values differ, with the same error on every rank."""
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, self.checksums, group=self.group)
        name, other = next((name, i) for name in found[0] for i, x in enumerate(found) if x[name] != found[0][name])
        raise ValueError(
            f"tensor_parallel_group: expected the same values of {name} on every rank, bit for bit, but rank {other} "
            "differs from rank 0"
        )


def checksum(x: Tensor) -> int:
    """A number that depends on every bit of x and on its place; the same on every device."""
    words = x.detach().resolve_neg().contiguous().view(-1).view(WORDS[x.element_size()]).to(torch.int64)
    return int((words * torch.arange(1, 2 * words.numel(), 2, device=x.device)).sum())  # odd factors lose no bit


def check_member(group: object) -> None:
    """Check that this process is in the group."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns to others
        raise ValueError("tensor_parallel_group: expected a group that this process is in")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tensor_parallel_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            "torch.distributed.group.WORLD is the one of all ranks"
        )


def _number(x: object) -> int:
    """A number that is equal in two processes if x is."""
    return x if isinstance(x, int) else zlib.crc32(repr(x).encode())


def _tell(name: str, group: "dist.ProcessGroup", facts: list[int], error: Exception | None) -> list[list[int]]:
    """Return the facts of every rank. If a rank has an error, raise it there, and elsewhere one that reports it."""
    backends = dist.get_backend_config(group)
    # On the CPU if the group has a backend for it: the host then does not wait for a device.
    device = torch.device("cpu" if "cpu:" in backends else backends.partition(":")[0])
    mine = torch.tensor([error is not None, *facts], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    found = [each.tolist() for each in gathered]
    if any(failed for failed, *_ in found):
        messages: list[Any] = [None] * len(found)
        dist.all_gather_object(messages, error and (type(error).__name__, str(error)), group=group)
        if error is not None:
            raise error
        rank, (kind, text) = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise RAISED.get(kind, RuntimeError)(_of_another(name, rank, text))
    return [each for _, *each in found]


def _of_another(name: str, rank: int, text: str) -> str:
    return f"{name}: on rank {rank}: {text}"
