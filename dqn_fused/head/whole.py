"""Where the rows of the weight are: all in this process, or, with ranks.Ranks, some on each rank."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dqn_fused.head.sweep import Statistics, Sweep
from dqn_fused.reference import legal_actions

Sweeper = Callable[[Sweep], Statistics]


class Whole:
    """All rows are in this process, so nothing is sent."""

    def sweeps(self, sweep: Sweeper, works: Sequence[Sweep | None]) -> list[Statistics | None]:
        """Statistics of all actions, by a backend's sweep over the rows that are here."""
        return [None if work is None else sweep(work) for work in works]

    def locate(self, actions: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """Row of each action, (n,), any row if its own is not here; and whether it is here, None if all are."""
        return legal_actions(actions, rows)

    def legal(self, actions: Tensor, rows: int) -> Tensor | None:
        """Which actions are in range, wherever their rows are; None if all are."""
        return legal_actions(actions, rows)[1]

    def present(self, here: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        """Values, (n, ...), of the samples whose row is here. Here it is all of them: looking would synchronise."""
        return values

    def select(self, values: Tensor, here: Tensor | None) -> Tensor:
        """Values, (n,), each from the process that has the row; NaN if none has."""
        return values if here is None else torch.where(here, values, torch.nan)

    def enter(self, x: Tensor) -> Tensor:
        """x, which is the same everywhere and used with the rows that are here; its gradient sums over all rows."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum of x, a result of the rows that are here, over all rows; not differentiable."""
        return x


WHOLE = Whole()
