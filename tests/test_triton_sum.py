"""What small tensors do not reach: more partial sums than one block holds, and the arithmetic of large matrices."""

from typing import Any

import pytest
import torch
from bounds import Arithmetic, Number, Values, assert_close
from conftest import TRITON_DEVICE, TRITON_MARK
from oracle import oracle
from test_loss import compact, make

triton = pytest.importorskip("triton")
pytestmark = TRITON_MARK


@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 9000])
def test_sum_of_any_number_of_partial_sums(n: int) -> None:
    from dqn_fused._backends.triton_launch import launch, run, sum_kernel, tl

    partial = torch.randn(n, device=TRITON_DEVICE)
    loss = torch.empty((), device=TRITON_DEVICE)
    run(sum_kernel, 1, loss, partial, n, BLOCK=launch.MAX_PROGRAMS, ACC=tl.float32, num_warps=launch.SUM_WARPS)
    expected = Arithmetic(torch.float32).total(Number(x) for x in partial.tolist())
    assert_close("sum", loss, Values.of([expected], ()))


@pytest.mark.parametrize("cql_alpha", [0.0, 0.5])
@pytest.mark.parametrize("A", [2, 3, 18, 700])
def test_the_backward_of_more_than_2_31_elements(A: int, cql_alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offsets are int64: the same gradient, here of a small matrix."""
    from dqn_fused import fused_dqn_loss
    from dqn_fused._backends import triton_launch

    arguments = make((37, A), device=TRITON_DEVICE)
    q = arguments["q"].requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(fused_dqn_loss(**arguments, cql_alpha=cql_alpha, backend="triton"), q)[0]

    expected = oracle(**arguments, cql_alpha=cql_alpha).grad_q
    assert_close("grad_q", gradient(), expected)
    run, seen = triton_launch.run, []

    def far(*args: Any, **meta: Any) -> None:
        seen.append(meta.get("FAR"))
        run(*args, **meta | {"FAR": True} if "FAR" in meta else meta)

    monkeypatch.setattr(triton_launch, "run", far)
    assert_close("grad_q", gradient(), expected)
    assert False in seen


@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
def test_several_tiles_in_each_of_several_programs(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the partial sums are capped, here at 4 and not at 4,096."""
    from dqn_fused import fused_dqn_loss_and_grad
    from dqn_fused._backends import triton_program
    from dqn_fused._backends.triton_launch import launch

    arguments = form(make((1000, 18), device=TRITON_DEVICE))
    expected = oracle(**arguments)
    monkeypatch.setattr(triton_program, "KEPT", {})
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(launch, "forward", launch.forward.__wrapped__)  # without what it remembers
    assert launch.forward(1000, 18, 2, True) == launch.Forward(16, 32, 16, 4, 4)
    loss, grad = fused_dqn_loss_and_grad(**arguments, backend="triton")
    assert_close("loss", loss, expected.loss)
    assert_close("grad_q", grad, expected.grad_q)
