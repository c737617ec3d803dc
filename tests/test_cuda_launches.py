"""csrc/cuda as its PTX is executed: how many launches, how many bytes, and sizes that take several rounds of blocks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import assert_close
from oracle import oracle
from test_loss import make
from torch import Tensor

from bench.gpu_code.ptx import cuda
from dqn_fused import Munchausen, fused_dqn_loss, fused_dqn_loss_and_grad

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason="csrc/cuda cannot be compiled here")
MUNCHAUSEN_CQL = {"target": Munchausen(), "cql_alpha": 0.5}


@pytest.fixture
def executor() -> Iterator[cuda.Executor]:
    with cuda.executing("sm_90", races=False) as found:
        yield found


def steps(executor: cuda.Executor, shape: tuple[int, int], **options: Any) -> dict[str, list[cuda.Executed]]:
    """The launches of forward, backward and of both at once."""
    arguments = {**make(shape), "terminated": None}
    if "target" in options:
        arguments["target_q"] = torch.randn(shape)
    q = arguments.pop("q").requires_grad_()
    found = {}
    executor.launches.clear()
    loss = fused_dqn_loss(q, **arguments, **options, backend="compiled")
    found["forward"] = list(executor.launches)
    executor.launches.clear()
    assert isinstance(loss, Tensor)
    loss.backward()
    found["backward"] = list(executor.launches)
    executor.launches.clear()
    fused_dqn_loss_and_grad(q, **arguments, **options, backend="compiled")
    found["both"] = list(executor.launches)
    return found


@pytest.mark.parametrize(
    ("shape", "options", "counts"),
    [
        ((32, 18), {}, (1, 1, 1)),
        ((512, 18), {}, (1, 1, 1)),
        ((128, 18), MUNCHAUSEN_CQL, (1, 1, 1)),
        ((3000, 18), {}, (2, 1, 2)),
        ((64, 5000), {}, (2, 1, 3)),
        ((64, 5000), MUNCHAUSEN_CQL, (4, 1, 5)),
    ],
    ids=["32x18", "512x18", "128x18-munchausen-cql", "3000x18", "64x5000", "64x5000-munchausen-cql"],
)
def test_launches(
    executor: cuda.Executor, shape: tuple[int, int], options: dict[str, Any], counts: tuple[int, int, int]
) -> None:
    assert tuple(len(launches) for launches in steps(executor, shape, **options).values()) == counts


@pytest.mark.parametrize("shape", [(64, 5001), (256, 512)], ids=str)
@pytest.mark.parametrize("options", [{}, MUNCHAUSEN_CQL], ids=["dqn", "munchausen-cql"])
def test_wide_matrices_are_read_and_written_once(
    executor: cuda.Executor, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    """Besides the bytes of the matrices there is what there is one of for each row."""
    size = shape[0] * shape[1] * 4
    matrices = {"forward": (3, 0), "backward": (1, 1)} if options else {"forward": (1, 0), "backward": (0, 1)}
    found = steps(executor, shape, **options)
    for what, (read, written) in matrices.items():
        loads = sum(launch.counts["load_bytes"] for launch in found[what])
        stores = sum(launch.counts["store_bytes"] for launch in found[what])
        assert read * size <= loads <= read * size + 0.05 * size
        assert written * size <= stores <= written * size + 0.05 * size
        assert sum(launch.counts["atomic"] for launch in found[what]) == 0


def test_many_rows(executor: cuda.Executor) -> None:
    """More blocks than sum_kernel has threads."""
    arguments = make((150_000, 2))
    expected = oracle(**arguments)
    got = fused_dqn_loss_and_grad(**arguments, return_td_error=True, backend="compiled")
    assert executor.launches[0].grid[0] > 512
    for name, x in zip(("loss", "grad_q", "td_error"), got, strict=True):
        assert_close(name, x, getattr(expected, name))
