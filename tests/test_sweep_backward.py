"""The gradient of a tile of Q-values as a kernel, against float64; the kernel compiled for GPUs that are not here."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounds import ARGUMENT, EXP, Arithmetic, Values, assert_close, roundings
from conftest import INTERPRETED, TRITON_DEVICE, TRITON_MARK
from data import source
from torch import Tensor

from dqn_fused.head import sweep as tiles
from dqn_fused.head import sweep_backward as library
from dqn_fused.head.sweep import Sweep
from dqn_fused.head.sweep_backward import SweepBackward

pytest.importorskip("triton")
from dqn_fused._backends import triton_sweep, triton_sweep_backward

EVERYTHING = (True, True, True)
SHAPES = [(1, 1, 1), (5, 13, 3), (70, 41, 16), (1, 1000, 70), (70, 300, 70), (0, 13, 3)]


def make(m: int, A: int, D: int, dtype: torch.dtype = torch.float32, device: str = TRITON_DEVICE) -> SweepBackward:
    g = source()

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(device)

    hidden, weight, bias = (normal(*size).to(dtype) for size in ((m, D), (A, D), (A,)))
    q = hidden.double() @ weight.double().T + bias.double()
    largest = q.amax(1).float()
    policy = normal(m) / (q - largest.unsqueeze(1)).exp().sum(1).float()
    actions = torch.randint(A, (m,), generator=g).to(device)
    return SweepBackward(hidden, weight, bias, None, largest, policy, actions, normal(m), EVERYTHING)


def legal(m: int, A: int) -> Tensor:
    mask = torch.rand((m, A), generator=source(3)) < 0.4
    mask[:, A // 2] = True
    return mask.to(TRITON_DEVICE)


def wide(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def check(work: SweepBackward, columns: slice | None = None) -> Tensor:
    """The gradient of some columns and its sums, within what float32 may make of them; returns the gradient."""
    n, A = work.hidden.shape[0], work.weight.shape[0]
    columns = slice(0, A) if columns is None else columns
    grad, sums = triton_sweep_backward.tile_gradient(work, work.hidden, work.weight[columns], slice(0, n), columns)
    assert grad.dtype is work.hidden.dtype
    value, error = expected = exact(work, columns)
    assert_close("gradient", grad, expected)
    terms = error + roundings(n) * Arithmetic(torch.float32).unit * np.abs(value)
    assert_close("sums", sums, Values(value.sum(0), terms.sum(0)))
    return grad


def check_products(work: SweepBackward) -> None:
    """The gradients of hidden, weight and bias."""
    hidden, weight, bias = triton_sweep_backward.sweep_backward(work)
    unit = Arithmetic(torch.float32).unit
    value, error = exact(work, slice(0, len(work.weight)))
    for name, got, (g, e), by in (
        ("hidden", hidden, (value, error), wide(work.weight)),
        ("weight", weight, (value.T, error.T), wide(work.hidden)),
        ("bias", bias, (value.T, error.T), np.ones((len(value), 1))),
    ):
        terms = e + (roundings(g.shape[1]) + 1) * unit * np.abs(g)
        found = got.reshape(len(g), -1)
        assert_close(f"grad_{name}", found, Values(g @ by, terms @ np.abs(by)))


def exact(work: SweepBackward, columns: slice) -> Values:
    """The gradient of some columns of Q-values in float64, and what float32 may make of it."""
    arithmetic = Arithmetic(torch.float32)
    q = arithmetic.product(wide(work.hidden), wide(work.weight[columns]).T)
    if work.bias is not None:
        q = arithmetic.rounded_to(torch.float32, q._replace(value=q.value + wide(work.bias[columns])))
    z = q.value - wide(work.largest)[:, None]
    value, unit = np.exp(z) * wide(work.policy)[:, None], arithmetic.unit
    error = np.abs(value) * (unit * (ARGUMENT * np.abs(z) + EXP + 2) + np.expm1(q.error))
    if work.mask is not None:
        mask = work.mask[:, columns].cpu().numpy()
        value, error = np.where(mask, value, 0), np.where(mask, error, 0)
    taken = np.zeros_like(value)
    for i, (action, more) in enumerate(zip(work.actions.tolist(), wide(work.taken), strict=True)):
        if columns.start <= action < columns.stop:
            taken[i, action - columns.start] = more
    return Values(value + taken, error + unit * np.where(taken != 0, np.abs(value) + np.abs(taken), 0))


@TRITON_MARK
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: "n{}-A{}-D{}".format(*x))
def test_shapes(shape: tuple[int, int, int]) -> None:
    n, A, _ = shape
    work = make(*shape)
    check(work)
    check(work._replace(mask=legal(n, A), bias=None))
    if A > 1:
        check(work._replace(mask=legal(n, A)), slice(A // 3, A - 1))


@TRITON_MARK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype: torch.dtype) -> None:
    for shape in ((5, 300, 70), (33, 41, 16)):
        work = make(*shape, dtype)
        check(work._replace(mask=legal(*shape[:2])))
        check(work)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "shifted": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@TRITON_MARK
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    view = VIEWS[name]
    for D in (24, 70):
        work = make(6, 41, D)._replace(mask=legal(6, 41))
        check(work._replace(weight=view(work.weight)) if name != "expanded" else work)
        check(work._replace(mask=view(work.mask)))
        check(work._replace(bias=torch.stack([work.bias, work.bias], 1)[:, 0]))
    for change in ({"hidden": view(work.hidden)}, {"weight": view(work.weight)}):
        check_products(work._replace(**change))


@TRITON_MARK
def test_nan_is_of_its_row() -> None:
    work = make(6, 300, 16)
    policy = work.policy.clone()
    policy[2] = torch.nan
    grad, sums = triton_sweep_backward.tile_gradient(
        work._replace(policy=policy), work.hidden, work.weight, slice(0, 6), slice(0, 300)
    )
    assert grad.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert grad[[0, 1, 3, 4, 5]].isfinite().all()
    assert sums.isnan().all()


@TRITON_MARK
@pytest.mark.parametrize("shape", [(5, 13, 3), (70, 41, 16)], ids=lambda x: "n{}-A{}-D{}".format(*x))
def test_q_values_whose_exponential_overflows(shape: tuple[int, int, int]) -> None:
    """Rows behind the last of a tile have the bias for Q-values: exp(200) by their policy of 0 is NaN in the sums."""
    work = make(*shape)
    check(work._replace(bias=work.bias + 200, largest=work.largest + 200))


@TRITON_MARK
def test_a_row_without_a_legal_action_has_no_gradient() -> None:
    mask = legal(6, 300)
    mask[[1, 3]] = False
    work = make(6, 300, 16)._replace(mask=mask)
    largest, policy = work.largest.clone(), work.policy.clone()
    largest[[1, 3]] = torch.tensor([-torch.inf, torch.nan], device=TRITON_DEVICE)
    policy[[1, 3]], work.taken[[1, 3]] = 0, 0
    grad, _ = triton_sweep_backward.tile_gradient(
        work._replace(largest=largest, policy=policy), work.hidden, work.weight, slice(0, 6), slice(0, 300)
    )
    assert grad.any(1).tolist() == [True, False, True, False, True, True]
    assert grad.isfinite().all()


@TRITON_MARK
def test_the_same_bits_every_time() -> None:
    work = make(33, 300, 16)
    first, second = (triton_sweep_backward.sweep_backward(work) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_float64_and_the_choice_between_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel: float64 is the library's, and so is what the sweep left to it."""
    called = []
    monkeypatch.setattr(
        triton_sweep_backward, "tile_gradient", lambda *given: (called.append(1), library._tile_gradient(*given))[1]
    )
    work = make(5, 41, 3, torch.float64, "cpu")
    work = work._replace(**{k: getattr(work, k).double() for k in ("largest", "policy", "taken")})
    for choice in (True, False):
        monkeypatch.setattr(triton_sweep_backward, "pays", lambda swept, choice=choice: choice)
        for given, kernel in ((work, False), (make(5, 41, 3, device="cpu"), choice)):
            called.clear()
            ours = triton_sweep_backward.auto_sweep_backward(given)
            assert bool(called) == kernel
            assert all(torch.equal(x, y) for x, y in zip(ours, library.sweep_backward(given), strict=True))
    assert not triton_sweep.pays(Sweep(work.hidden, work.weight, None, None, "soft", 1.0))


if not INTERPRETED:  # which replaces the compiler
    from ahead import Compiled, check_instructions, compiled, target  # noqa: F401
    from test_sweep_aot import EVERYWHERE, check_resources, default_precision  # noqa: F401

    from bench.gpu_code import aot
    from bench.gpu_code.aot import Target
    from bench.gpu_code.machine_code import widths

    CASES: dict[str, tuple[torch.dtype, str, dict[str, Any], set[str]]] = {
        "bf16": (torch.bfloat16, "highest", {"D": 1000}, EVERYWHERE),
        "f16-mask": (torch.float16, "highest", {"D": 64, "masked": True}, EVERYWHERE),
        "f32-ieee-mask": (torch.float32, "highest", {"D": 1024, "masked": True}, EVERYWHERE),
        "f32-tf32": (torch.float32, "medium", {"D": 1024}, EVERYWHERE - {"gfx942", "gfx1100"}),
        "f32-tf32x3": (torch.float32, "high", {"D": 1024}, {"sm_80", "sm_90"}),
    }

    @pytest.mark.aot
    @pytest.mark.parametrize("case", CASES)
    def test_machine_code(target: Target, compiled: Compiled, case: str) -> None:  # noqa: F811
        dtype, precision, options, targets = CASES[case]
        if target.name not in targets:
            pytest.skip("as on other targets")
        launch(dtype, precision, **options)
        assert {name for name, *_ in compiled} == {"sweep_bwd_kernel"}
        for name, kernel, *_ in compiled:
            check_resources(name, kernel, target)
            check_instructions(name, kernel, target, float64=False)
            # AMD's compiler stores an accumulator as the matrix units have it.
            for what in ("load",) if "amdgcn" in kernel.asm else ("load", "store"):
                assert 128 in widths(aot.machine_code(kernel), what), what

    def launch(dtype: torch.dtype, precision: str, D: int, masked: bool = False, m: int = 256) -> None:
        torch.set_float32_matmul_precision(precision)
        A = 50257
        hidden, weight, bias = (torch.zeros(size, dtype=dtype) for size in ((m, D), (A, D), (A,)))
        mask = torch.ones(m, A, dtype=torch.bool) if masked else None
        of_rows, actions = torch.zeros(m), torch.zeros(m, dtype=torch.int64)
        work = SweepBackward(hidden, weight, bias, mask, of_rows, of_rows, actions, of_rows, EVERYTHING)
        columns = next(tiles.column_blocks(hidden, A))
        triton_sweep_backward.tile_gradient(work, hidden, weight[columns], slice(0, m), columns)
