"""Statistics of ranges of actions, merged: the same as those of all actions at once, however they are shared out."""

import itertools

import pytest
import torch
from bounds import assert_agree
from data import source
from torch import Tensor

from dqn_fused.head import sweep as tiles
from dqn_fused.head.sweep import Statistics, Sweep, log_total, merge, no_actions, stacked, sweep

TEMPERATURE = 0.5
RANGES = {
    "one": [0, 40],
    "two": [0, 17, 40],
    "uneven": [0, 1, 2, 30, 31, 40],
    "with empty ones": [0, 0, 20, 20, 20, 40, 40],
}


def parts(q: Tensor, mask: Tensor | None, kind: str, bounds: list[int], bias: Tensor | None = None) -> list[Statistics]:
    """Those of each range; the weight is the transpose of Q-values, which rows of the identity read off."""
    found = []
    for start, stop in itertools.pairwise(bounds):
        some = None if mask is None else mask[:, start:stop]
        work = Sweep(torch.eye(len(q), dtype=q.dtype), q[:, start:stop].T, None, some, kind, TEMPERATURE)
        work = work if bias is None else work._replace(bias=bias[start:stop])
        x = sweep(work)
        found.append(x if x.first is None or start == stop else x._replace(first=x.first + start))
    return found


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("kind", ["max", "argmax", "soft"])
@pytest.mark.parametrize("name", RANGES)
def test_ranges_merge(name: str, kind: str, order: int) -> None:
    """Small integers, so that many are equal; a row and a range without a legal action."""
    g = source()
    q = torch.randint(-3, 4, (6, 40), generator=g).double()
    mask = torch.rand(6, 40, generator=g) < 0.4
    mask[:, 7] = True
    mask[4] = False
    mask[0, 20:] = False
    for legal in (None, mask):
        found = merge(stacked(parts(q, legal, kind, RANGES[name])[::order]), TEMPERATURE)
        x = q if legal is None else q.masked_fill(~legal, -torch.inf)
        assert torch.equal(found.largest, x.amax(1))
        assert (found.first is None) == (kind != "argmax")
        assert (found.total is None) == (kind != "soft")
        if found.first is not None:
            assert torch.equal(found.first, x.max(1).indices)
        if found.total is not None:
            soft = found.largest + log_total(found, TEMPERATURE)
            assert_agree(soft, TEMPERATURE * (x / TEMPERATURE).logsumexp(1))


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nan_and_infinity_survive_a_merge(special: float) -> None:
    q, bias = torch.zeros(2, 40).double(), torch.zeros(40).double()
    bias[25], bias[3] = special, 500.0
    for kind in ("max", "argmax", "soft"):
        for order in (1, -1):
            found = merge(stacked(parts(q, None, kind, RANGES["uneven"], bias)[::order]), TEMPERATURE)
            torch.testing.assert_close(found.largest[1].item(), special, equal_nan=True)
            if found.first is not None:
                assert found.first.tolist() == [25, 25]
            if found.total is not None:
                torch.testing.assert_close(log_total(found, TEMPERATURE)[1].item(), special, equal_nan=True)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e6])
def test_no_temperature_overflows(temperature: float) -> None:
    found = Statistics(
        torch.tensor([[-(2.0**100)], [2.0**100], [-torch.inf]]), None, torch.tensor([[3.0], [2.0], [0.0]])
    )
    merged = merge(found, temperature)
    assert merged.largest.tolist() == [2.0**100]
    assert merged.total is not None
    assert merged.total.tolist() == [2.0]


def test_no_actions_are_what_a_sweep_of_none_finds() -> None:
    for kind in ("max", "argmax", "soft"):
        for actions in (None, torch.zeros(3, dtype=torch.int64)):
            work = Sweep(torch.ones(3, 2), torch.ones(0, 2), None, None, kind, 1.0, actions)
            none = no_actions(work)
            for x, y in zip(none, sweep(work), strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y)
            assert none.first is None or (none.first == tiles.NO_ACTION).all()
            assert (none.taken is None) == (actions is None)
