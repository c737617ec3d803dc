"""The same bits under any order in which warps run: executed PTX, where the order is the executor's to choose."""

from collections.abc import Iterator

import pytest
import torch
from conftest import EXECUTED
from data import source
from test_loss import make

pytest.importorskip("triton")

from dqn_fused import Soft, fused_dqn_loss_and_grad
from dqn_fused._backends import triton_launch

pytestmark = pytest.mark.skipif(not EXECUTED, reason="needs g++, and Triton's compiler instead of its interpreter")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_lanes_that_hold_the_same_row_store_the_same(target: str) -> None:
    """Strided rows of 1,003 actions: with FP fusion lanes i and i ^ 16 stored sums that differed in the last bit.

    `mul; shfl; add` had become `mul; shfl; fma` in them, and the losses of 25 of 1,000 rows changed with the schedule.
    """
    from bench.gpu_code.ptx import triton

    if (reason := triton.why_not()) is not None:
        pytest.skip(reason)
    arguments = make((40, 1003))
    for name in ("q", "next_q"):
        arguments[name] = torch.randn(40, 2006, generator=source(1))[:, ::2]
    found = []
    for seed in range(4):
        with triton.executing(target, seed=seed):
            found.append(
                fused_dqn_loss_and_grad(
                    **arguments,
                    target=Soft(1.0),
                    cql_alpha=1.0,
                    reduction="none",
                    return_td_error=True,
                    backend="triton",
                )
            )
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, found[0], strict=True))


@pytest.fixture(scope="module")
def nothing_is_left() -> Iterator[None]:
    run = triton_launch.run
    yield
    assert triton_launch.run is run


@pytest.mark.ptx
@pytest.mark.usefixtures("nothing_is_left")
def test_the_executor_goes_though_the_test_has_patched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed, and served every later test of the process. No test failed alone, nor in the order of the files."""
    monkeypatch.setattr(triton_launch, "run", None)
