"""One layer over many actions, reduced while it is multiplied: a few statistics of each row of Q-values, never the row.

Statistics are those of a range of actions, and ranges merge: tiles that are multiplied one after another, splits of a
kernel, ranks that share a weight.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import _ops
from dqn_fused.arguments import accumulation_dtype

# Q-values held at once, by device: 4 MB fit the second-level cache of two cores, and 32 MB that of a GPU, of 40 to
# 126 MB. On a GPU each operation on a tile takes 5 us to issue.
TILE = {"cpu": 1 << 20, "cuda": 1 << 23}
TILE_ROWS, MIN_COLUMNS = 4096, 256
ALIGNED = 128  # divides the columns of a large tile, as a kernel's tile and a vector store do
NO_ACTION = torch.iinfo(torch.int64).max


class Sweep(NamedTuple):
    """The work of ``sweep``: one layer over all actions, and the reduction. A backend may have a kernel for it."""

    hidden: Tensor  # (m, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    mask: Tensor | None  # (m, A), true where an action is legal
    kind: str  # "max", "argmax" or "soft"
    temperature: float
    actions: Tensor | None = None  # (m,) int64, in [0, A): their Q-values are returned as the sweep rounds them


class Statistics(NamedTuple):
    """Statistics of the Q-values of a range of actions, each (m,), or (ranges, m) for ranges that will be merged."""

    # In the accumulation dtype; -inf where no action is legal, NaN where one is NaN.
    largest: Tensor
    # With "argmax": the first action that has the largest, int64; NO_ACTION in an empty range.
    first: Tensor | None = None
    # With "soft": the sum of exp((q - largest) / temperature), in the accumulation dtype; 0 where no action is legal.
    total: Tensor | None = None
    # With actions: their Q-values, in the accumulation dtype, legal or not; -inf where the action is in another range.
    taken: Tensor | None = None


def merge(parts: Statistics, temperature: float = 1.0) -> Statistics:
    """Merge statistics of ranges of actions, (ranges, m), to those of all, (m,). They are summed in their order."""
    found, first, total, taken = parts
    largest = found.amax(0)
    if first is not None:
        first = torch.where((found == largest) | found.isnan(), first, NO_ACTION).amin(0)
    if total is not None:
        total = (total * _powers(found - origin(largest), temperature)).sum(0)
    return Statistics(largest, first, total, None if taken is None else taken.amax(0))


def log_total(found: Statistics, temperature: float) -> Tensor:
    """The soft value, temperature * logsumexp(q / temperature), minus the largest Q-value, (m,).

    Where the largest is inf or -inf so is this, so that their sum is right. To subtract something from the soft value,
    subtract it from the largest first: where Q-values are large, the sum of the two would lose the smaller one.
    """
    assert found.total is not None
    return temperature * found.total.log()


def sweep(work: Sweep) -> Statistics:
    """Statistics of all actions by the library's matrix product: tiles of actions, reduced while they are in the cache.

    In torch.compile it is an op. If it were traced, the number of tiles would be a constant, and every batch size would
    need its own graph.
    """
    if torch.compiler.is_compiling():
        return unpack(work, *_ops.sweep(*work))
    blocks = [_sweep_rows(work, some) for some in row_blocks(work.hidden.shape[0])]
    return blocks[0] if len(blocks) == 1 else _joined(blocks, torch.cat)


def _sweep_rows(work: Sweep, some: slice) -> Statistics:
    hidden, mask, actions = (None if x is None else x[some] for x in (work.hidden, work.mask, work.actions))
    assert hidden is not None
    dtype = accumulation_dtype(hidden)

    def of(columns: slice) -> Statistics:
        q = tile(hidden, work.weight[columns].to(hidden.dtype), work.bias, None, columns)
        taken = None if actions is None else _taken(q, actions, columns).to(dtype)
        return _statistics(illegal(q, mask, columns), columns.start, work.kind, work.temperature, dtype, taken)

    def add(done: Statistics, more: Statistics) -> Statistics:
        return merge(stacked([done, more]), work.temperature)

    found = map(of, column_blocks(hidden, work.weight.shape[0]))
    first = next(found, None)
    return no_actions(work._replace(hidden=hidden)) if first is None else reduce(add, found, first)


def _statistics(
    q: Tensor, start: int, kind: str, temperature: float, dtype: torch.dtype, taken: Tensor | None
) -> Statistics:
    """Statistics of a tile, (rows, columns), whose first action is ``start``; q is overwritten."""
    if kind == "argmax":
        largest, first = q.max(1)
        return Statistics(largest.to(dtype), first + start, None, taken)
    largest = q.amax(1).to(dtype)
    if kind == "max":
        return Statistics(largest, None, None, taken)
    q = q.to(dtype)
    return Statistics(largest, None, _powers(q.sub_(origin(largest).unsqueeze(1)), temperature).sum(1), taken)


def _taken(q: Tensor, actions: Tensor, columns: slice) -> Tensor:
    """Q-values of the actions that are in a tile, (rows,); -inf for the others."""
    column = actions - columns.start
    inside = (column >= 0) & (column < columns.stop - columns.start)
    return torch.where(inside, q.gather(1, torch.where(inside, column, 0).unsqueeze(1)).squeeze(1), -torch.inf)


def no_actions(work: Sweep) -> Statistics:
    """Statistics of an empty range, which change nothing that they are merged with."""
    m, dtype = work.hidden.shape[0], accumulation_dtype(work.hidden)
    largest = work.hidden.new_full((m,), -torch.inf, dtype=dtype)
    return Statistics(
        largest,
        torch.full_like(largest, NO_ACTION, dtype=torch.int64) if work.kind == "argmax" else None,
        torch.zeros_like(largest) if work.kind == "soft" else None,
        None if work.actions is None else largest,
    )


def stacked(parts: list[Statistics]) -> Statistics:
    """Statistics of several ranges, each (m,), as merge takes them, (ranges, m)."""
    return _joined(parts, torch.stack)


def _joined(parts: list[Statistics], join: Callable[[list[Tensor]], Tensor]) -> Statistics:
    largest, *others = zip(*parts, strict=True)
    first, total, taken = (None if x[0] is None else join([*x]) for x in others)
    return Statistics(join([*largest]), first, total, taken)


def row_blocks(m: int) -> Iterator[slice]:
    """Rows that are multiplied at once; at least one block."""
    return (slice(start, start + TILE_ROWS) for start in range(0, max(m, 1), TILE_ROWS))


def column_blocks(hidden: Tensor, A: int) -> Iterator[slice]:
    """Actions that are multiplied at once with rows of hidden."""
    columns = max(TILE.get(hidden.device.type, TILE["cpu"]) // max(hidden.shape[0], 1), MIN_COLUMNS)
    if columns > ALIGNED:
        columns -= columns % ALIGNED
    return (slice(start, min(start + columns, A)) for start in range(0, A, columns))


def tile(hidden: Tensor, some_weight: Tensor, bias: Tensor | None, mask: Tensor | None, columns: slice) -> Tensor:
    """Q-values of a range of actions, (rows, columns), as nn.Linear rounds them; -inf where an action is illegal.

    ``some_weight`` has the rows of the range; bias and mask are those of all actions.
    """
    q = F.linear(hidden, some_weight, None if bias is None else bias[columns].to(hidden.dtype))
    return illegal(q, mask, columns)


def illegal(q: Tensor, mask: Tensor | None, columns: slice) -> Tensor:
    """Write -inf into a tile of Q-values where an action is illegal."""
    return q if mask is None else q.masked_fill_(~mask[:, columns], -torch.inf)


def origin(largest: Tensor) -> Tensor:
    """What is subtracted from Q-values in an exponent: the largest, or 0 if it is not finite (inf - inf is NaN)."""
    return torch.where(largest.isfinite(), largest, 0)


def _powers(difference: Tensor, temperature: float) -> Tensor:
    """exp(difference / temperature), in place. Scaling differences, not values, does not overflow."""
    if temperature != 1:
        difference = difference.mul_(min(1 / temperature, torch.finfo(difference.dtype).max))
    return difference.exp_()


def unpack(work: Sweep, largest: Tensor, first: Tensor, total: Tensor, taken: Tensor) -> Statistics:
    """Statistics from the outputs of an op, where (0,) stands for None."""
    return Statistics(
        largest,
        first if work.kind == "argmax" else None,
        total if work.kind == "soft" else None,
        None if work.actions is None else taken,
    )


def pack(found: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of an op."""
    largest, first, total, taken = found
    return (
        largest,
        largest.new_empty(0, dtype=torch.int64) if first is None else first,
        largest.new_empty(0) if total is None else total,
        largest.new_empty(0) if taken is None else taken,
    )


@torch.library.impl("dqn_fused::sweep", "CompositeExplicitAutograd")
def _sweep_op(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pack(sweep(Sweep(*given)))
