"""A head whose weight is sharded over ranks, each with some of its rows: the collectives between them.

Each sends one or two numbers per sample. The forward compares and adds integers, whose result does not depend on the
order of the ranks, so every rank has the same bits. A value that only one rank has is selected, never multiplied by
zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dqn_fused.head.sweep import Statistics, Sweep, no_actions
from dqn_fused.head.whole import Sweeper, Whole

WORD = {torch.float32: torch.int32, torch.float64: torch.int64}  # an integer of as many bits
LOW = (1 << 32) - 1
HIDDEN_GRADS = ("sum", "partial")


class Ranks(Whole):
    """Each rank of a group holds some of the ``actions`` rows; those of this rank begin at ``start``."""

    def __init__(self, group: "dist.ProcessGroup", start: int, actions: int) -> None:
        self.group, self.start, self.actions = group, start, actions

    def sweeps(self, sweep: Sweeper, works: Sequence[Sweep | None]) -> list[Statistics | None]:
        """One collective for all largest values, one for all sums of exponentials, one or two for each argmax."""
        mine = {i: _swept(sweep, work) for i, work in enumerate(works) if work is not None}
        merged = {
            i: Statistics(*self._first_of_largest(x.largest, x.first)) for i, x in mine.items() if x.first is not None
        }
        others = [i for i in mine if i not in merged]
        largest = dict(zip(others, self._joined(self._largest, [mine[i].largest for i in others]), strict=True))
        soft = [i for i in others if mine[i].total is not None]
        shares = [_share(mine[i], largest[i], works[i]) for i in soft]
        totals = dict(zip(soft, self._joined(self._sum, shares), strict=True))
        for i, x in largest.items():
            # Where the largest is inf or NaN so is the total, as in one process.
            total = torch.where(x < torch.inf, totals[i], x) if i in totals else None
            merged[i] = Statistics(x, None, total, mine[i].taken)  # of the actions whose rows are here
        return [merged.get(i) for i in range(len(works))]

    def locate(self, actions: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """No collective."""
        index = actions.to(torch.int64) - self.start
        here = (index >= 0) & (index < rows)
        return torch.where(here, index, 0), here

    def legal(self, actions: Tensor, rows: int) -> Tensor | None:
        """No collective."""
        return super().legal(actions, self.actions)

    def present(self, here: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        """The host must know how many there are, so on a GPU it waits."""
        return tuple(x[here] for x in values)

    def select(self, values: Tensor, here: Tensor | None) -> Tensor:
        """One collective."""
        nothing = torch.iinfo(WORD[values.dtype]).min
        assert here is not None
        return numbers(self._reduce(torch.where(here, ordered(values), nothing), dist.ReduceOp.MAX), values.dtype)

    def enter(self, x: Tensor) -> Tensor:
        """One collective, in the backward."""
        entered: Tensor = ToRanks.apply(x, self)
        return entered

    def total(self, x: Tensor) -> Tensor:
        """One collective."""
        return self._reduce(x.clone(), dist.ReduceOp.SUM)

    def _joined(self, reduce: Callable[[Tensor], Tensor], parts: list[Tensor]) -> list[Tensor]:
        """Reduce several tensors at once; each keeps its dtype."""
        if not parts:
            return []
        together = reduce(torch.cat(parts))  # in the wider dtype, which holds the others
        pieces = together.split([len(x) for x in parts])
        return [piece.to(x.dtype) for piece, x in zip(pieces, parts, strict=True)]

    def _largest(self, values: Tensor) -> Tensor:
        return numbers(self._reduce(ordered(values), dist.ReduceOp.MAX), values.dtype)

    def _first_of_largest(self, values: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Largest value and the lowest index that has it; for float32 both in one word."""
        key, dtype = ordered(values), values.dtype
        index = first.clamp(max=LOW - self.start) + self.start
        if dtype is torch.float32:
            both = self._reduce((key.to(torch.int64) << 32) + (LOW - index), dist.ReduceOp.MAX)
            return numbers((both >> 32).to(torch.int32), dtype), LOW - (both & LOW)
        best = self._reduce(key.clone(), dist.ReduceOp.MAX)
        return numbers(best, dtype), self._reduce(torch.where(key == best, index, self.actions), dist.ReduceOp.MIN)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum, at least 1, of numbers in [0, A]: one fixed-point word for float32, two for float64."""
        step = 2.0 ** (61 - self.actions.bit_length())
        scaled = torch.where(values.isfinite(), values, 0).double() * step
        words = [scaled.to(torch.int64)]
        if values.dtype is torch.float64:
            words.append(((scaled - words[0].double()) * 2.0**50).to(torch.int64))
        whole, *rest = self._reduce(torch.stack(words), dist.ReduceOp.SUM).double()
        return sum((x * 2.0**-50 for x in rest), whole).div(step).to(values.dtype)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        dist.all_reduce(x, op=operation, group=self.group)
        return x


def _swept(sweep: Sweeper, work: Sweep) -> Statistics:
    """Statistics of the rows of this rank, which may be none."""
    return sweep(work) if work.weight.shape[0] else no_actions(work)


def _share(mine: Statistics, largest: Tensor, work: Sweep | None) -> Tensor:
    """Sum of exponentials of this rank, relative to the largest Q-value of all ranks."""
    assert mine.total is not None
    assert work is not None
    below = torch.where(mine.largest == largest, 0, mine.largest - largest)  # inf - inf would be NaN
    scale = min(1 / work.temperature, torch.finfo(below.dtype).max)
    return torch.where(mine.total > 0, mine.total * (below * scale).exp(), 0)


def ordered(x: Tensor) -> Tensor:
    """Floating-point numbers as integers in the same order, NaN above all, the two zeros equal."""
    word = WORD[x.dtype]
    bits = torch.where(x.isnan(), torch.nan, x + 0.0).view(word)
    return torch.where(bits < 0, bits ^ torch.iinfo(word).max, bits)


def numbers(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ordered. The lowest integer, which no number maps to, becomes NaN."""
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key).view(dtype)


class ToRanks(torch.autograd.Function):
    """The identity, for hidden states that each rank multiplies with its rows; the gradient is summed over the ranks.

    It is Megatron's copy-to region, f (Shoeybi et al., 2019), and FromRanks its reduce-from region, g. Each is the
    derivative of the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        """Return x."""
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum over ranks."""
        total: Tensor = FromRanks.apply(grads[0], ctx.ranks)
        return total, None


class FromRanks(torch.autograd.Function):
    """Sum over the ranks of what each has computed from its rows; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        """Sum over ranks."""
        ctx.ranks = ranks
        total = x.contiguous().clone()
        dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        grad: Tensor = ToRanks.apply(grads[0], ctx.ranks)
        return grad, None
