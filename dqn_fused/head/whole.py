"""Who has the rows of the weight: this process has them all, or, as ranks.Ranks, some of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dqn_fused.head.sweep import Statistics, Sweep
from dqn_fused.reference import legal_actions

Sweeper = Callable[[Sweep], Statistics]


class Whole:
    """All rows are here, and nobody is asked."""

    def sweeps(self, sweep: Sweeper, works: Sequence[Sweep | None]) -> list[Statistics | None]:
        """Statistics of all actions, by a backend's sweep over the rows that are here."""
        return [None if work is None else sweep(work) for work in works]

    def locate(self, actions: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """Row of each action, (n,), some row where it is not here; and which are here, None for all."""
        return legal_actions(actions, rows)

    def legal(self, actions: Tensor, rows: int) -> Tensor | None:
        """Which actions are in range, wherever their rows are; None for all."""
        return legal_actions(actions, rows)[1]

    def present(self, here: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        """Values, (n, ...), of samples whose row is here. All of them: an action out of range costs no look at here."""
        return values

    def select(self, values: Tensor, here: Tensor | None) -> Tensor:
        """Values, (n,), each from where its row is; NaN where that is nowhere."""
        return values if here is None else torch.where(here, values, torch.nan)

    def enter(self, x: Tensor) -> Tensor:
        """What is the same everywhere, and meets the rows that are here: its gradient is what all rows make of it."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum over all rows of what the rows that are here make of it; not differentiable."""
        return x


WHOLE = Whole()
