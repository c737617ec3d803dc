"""Before a sharded head sends anything: do all ranks of the group call it with arguments that fit, or none of them."""

import zlib
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dqn_fused.arguments import Batch, check_actions, looks_at_values
from dqn_fused.head.ranks import Ranks

# What must be the same on every rank, by name; Agreement.equal has a value of each.
EQUAL = ("samples", "next states", "features", "dtypes", "options", "optional arguments", "hidden.requires_grad")
RAISED: dict[str, type[Exception]] = {error.__name__: error for error in (ValueError, TypeError, IndexError)}


class Agreement:
    """A block that checks arguments, on every rank of a group; an error in it on one rank is an error on all.

    At its end the ranks exchange a few numbers each, in one collective, and where the weights are summed over a process
    group, too, the ranks of that one in another. The rank whose arguments are wrong raises what it found, every other
    one an error of the same type that says which rank and why. Without a group it does nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None, process_group: dist.ProcessGroup | None) -> None:
        self.group, self.process_group = group, process_group
        self.rows = 0  # of this rank's weight
        self.equal: tuple[object, ...] = ()
        self.samples: Batch | None = None
        self.ranks: Ranks | None = None

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.group is None or not (error is None or isinstance(error, Exception)):
            return
        try:
            self._exchange(self.group, error)
        except Exception as another:
            error = another
        if self.process_group is not None:
            _tell("process_group", self.process_group, [], error)
        if error is not None:
            raise error

    def _exchange(self, group: dist.ProcessGroup, error: Exception | None) -> None:
        """Tell this rank's facts, and check those of all, which each rank does with the same result."""
        low = high = 0
        if error is None and self.samples is not None:
            actions = self.samples.actions
            if actions.numel() and looks_at_values(actions.device):
                low, high = (int(x) for x in torch.aminmax(actions))
        values = [_number(x) for x in self.equal] if error is None else [0] * len(EQUAL)
        found = _tell("tensor_parallel_group", group, [self.rows, low, high, *values], error)
        for i, what in enumerate(EQUAL):
            column = [facts[3 + i] for facts in found]
            other = next((rank for rank, x in enumerate(column) if x != column[0]), None)
            if other is not None:
                raise ValueError(
                    f"tensor_parallel_group: expected the same {what} on every rank, got others on rank {other} than on "
                    f"rank 0; on this one {self.equal[i]}"
                )
        rank, rows = dist.get_rank(group), [facts[0] for facts in found]
        A = sum(rows)
        if A == 0:
            raise ValueError(f"weight: expected a row on one of the ranks at least, got {rows}")
        assert self.samples is not None
        check_actions(self.samples, A)
        for other, (_, low, high, *_) in enumerate(found):
            if low < 0 or high >= A:
                got = low if low < 0 else high
                raise IndexError(_of_another("tensor_parallel_group", other, f"actions: expected values in [0, {A}), got {got}"))
        self.ranks = Ranks(group, sum(rows[:rank]), A)


def _number(x: object) -> int:
    """A number that is as equal as x is, in every process."""
    return x if isinstance(x, int) else zlib.crc32(repr(x).encode())


def _tell(name: str, group: dist.ProcessGroup, facts: list[int], error: Exception | None) -> list[list[int]]:
    """Facts of every rank; raises if a rank has an error: its own there, elsewhere one that tells of it."""
    backends = dist.get_backend_config(group)
    # On the CPU, where the group has a backend for it: no device is waited for.
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
    return f"{name}: on rank {rank} of it, {text}"
