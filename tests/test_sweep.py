"""The sweep over the actions as a kernel, against products in float64; and the choice between it and the library."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounds import Arithmetic, Number, Values, assert_close, log_sum
from conftest import INTERPRETED, TRITON_DEVICE, TRITON_MARK
from data import source
from oracle import chosen
from torch import Tensor

from dqn_fused.head import sweep as tiles
from dqn_fused.head.sweep import Statistics, Sweep, log_total

pytest.importorskip("triton")
pytestmark = TRITON_MARK
KINDS = ["max", "argmax", "soft"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(m: int, A: int, D: int, kind: str = "max", dtype: torch.dtype = torch.float32, **change: Any) -> Sweep:
    g = source()
    hidden, weight, bias = (torch.randn(size, generator=g).to(TRITON_DEVICE, dtype) for size in ((m, D), (A, D), (A,)))
    return Sweep(hidden, weight, bias, None, kind, 0.5)._replace(**change)


def legal(m: int, A: int) -> Tensor:
    mask = torch.rand((m, A), generator=source(3)) < 0.4
    mask[:, A // 2] = True
    return mask.to(TRITON_DEVICE)


def worth(work: Sweep, found: Statistics) -> Tensor:
    """Largest Q-value or soft value of each row."""
    return found.largest if found.total is None else found.largest + log_total(found, work.temperature)


def check(work: Sweep) -> Tensor:
    """Value and index against products in float64, within what float32 may make of them; returns the value."""
    from dqn_fused._backends.triton_sweep import sweep

    found = sweep(work)
    value, index = worth(work, found), found.first
    assert value.dtype is torch.float32
    assert (index is None) == (work.kind != "argmax")
    arithmetic = Arithmetic(torch.float32)
    hidden, weight = (x.to(work.hidden.dtype).double().cpu().numpy() for x in (work.hidden, work.weight))
    with np.errstate(invalid="ignore"):
        q = arithmetic.product(hidden, weight.T)
        if work.bias is not None:
            q = arithmetic.rounded_to(torch.float32, q._replace(value=q.value + work.bias.double().cpu().numpy()))
    masks = [None] * len(hidden) if work.mask is None else work.mask.cpu().numpy()
    expected = []
    for i, (x, error, mask) in enumerate(zip(*q, masks, strict=True)):
        if mask is not None and not mask.any():
            expected.append(Number(-math.inf))
        elif work.kind == "soft":
            expected.append(log_sum(arithmetic, x, error, mask, work.temperature).number)
        else:
            expected.append(chosen((x, error), (x, error), mask))
        if index is None or math.isnan(expected[i].value) or expected[i].value == -math.inf:
            continue
        j, first = int(index[i]), int(np.flatnonzero((x == expected[i].value) & (True if mask is None else mask))[0])
        assert mask is None or mask[j]
        assert j == first or x[j] + error[j] > x[first] - error[first], (
            f"row {i}: {j} is not the first largest, {first}"
        )
    assert_close("value", value, Values.of(expected, (len(hidden),)))
    return value


SHAPES = [(1, 1, 1), (5, 13, 3), (70, 41, 16), (1, 1000, 70), (5, 300, 16), (70, 300, 70), (0, 13, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: "m{}-A{}-D{}".format(*x))
def test_shapes(shape: tuple[int, int, int], kind: str) -> None:
    m, A, _ = shape
    work = make(*shape, kind)
    check(work)
    check(work._replace(mask=legal(m, A), bias=None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_half_precision(dtype: torch.dtype, kind: str) -> None:
    """Against products of the same halves that are not rounded: below the spacing of the halves themselves."""
    for shape in ((5, 300, 70), (33, 41, 16)):
        work = make(*shape, kind, dtype)
        check(work._replace(mask=legal(*shape[:2])))
    check(work._replace(bias=work.bias.float()))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies float32")
@pytest.mark.parametrize("kind", KINDS)
def test_tf32(kind: str) -> None:
    """Of bfloat16 values tf32 loses nothing: what is left is the sum."""
    torch.set_float32_matmul_precision("high")
    try:
        for shape in ((5, 300, 70), (70, 141, 40)):
            work = make(*shape, kind, torch.bfloat16)
            work = Sweep(work.hidden.float(), work.weight.float(), work.bias.float(), None, kind, 0.5)
            check(work)
            check(work._replace(mask=legal(*shape[:2])))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mixed_dtypes() -> None:
    """The weight is rounded to the dtype of hidden, as by autocast. (The interpreter truncates to bfloat16.)"""
    work = make(5, 41, 16)
    half = work._replace(hidden=work.hidden.half())
    check(half)
    check(half._replace(weight=work.weight.half()))
    check(work._replace(weight=work.weight.half()))
    double = make(5, 41, 16, dtype=torch.float64)
    assert kernel(double).dtype is torch.float64
    assert torch.equal(kernel(double), worth(double, tiles.sweep(double))), "there is no kernel: it is the library's"


def kernel(work: Sweep) -> Tensor:
    from dqn_fused._backends.triton_sweep import sweep

    return worth(work, sweep(work))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "shifted": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "rows": lambda x: torch.stack([x, x], 1)[:, 0],
    "every other": lambda x: torch.stack([x, x], 2)[..., 0],
    "backwards by a view": lambda x: x.flip(0).as_strided(x.shape, x.stride()),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    view = VIEWS[name]
    for kind, D in (("argmax", 24), ("soft", 70)):
        work = make(6, 41, D, kind, mask=legal(6, 41))
        check(work._replace(hidden=view(work.hidden)))
        check(work._replace(weight=view(work.weight)))
        check(work._replace(mask=view(work.mask)))
        check(work._replace(bias=torch.stack([work.bias, work.bias], 1)[:, 0]))


def test_strides_beyond_int32() -> None:
    """A mask[:, t] of (B, T, A): the last row of a tile lies 2^31 elements behind its first.

    The offset within a tile was int32 and wrapped round to the other side, which is part of the same storage here.
    """
    if TRITON_DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("12 GB")
    m, A = 16, 5
    stride = 2**31 // (m - 1) + 64
    start = 2**31
    if TRITON_DEVICE == "cuda":
        storage = torch.zeros(start + m * stride, dtype=torch.bool, device=TRITON_DEVICE)
    else:  # of calloc: pages are there once they are written
        storage = torch.from_numpy(np.zeros(start + m * stride, dtype=bool))
    mask = storage.as_strided((m, A), (stride, 1), start)
    mask[:] = legal(m, A)
    check(make(m, A, 3, "argmax", mask=mask))


def test_the_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    work = make(6, 41, 24)
    weight, seen = work.weight.t().contiguous().t(), []
    backend = importlib.import_module("dqn_fused._backends.triton_launch")
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda *args, **meta: (seen.extend(args), run(*args, **meta)))
    check(work._replace(weight=weight))
    assert any(x is weight or (isinstance(x, Tensor) and x.data_ptr() == weight.data_ptr()) for x in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinities(kind: str) -> None:
    for special in (torch.nan, torch.inf, -torch.inf):
        work = make(6, 300, 3, kind)
        bias = work.bias.clone()
        bias[[17, 40, 290]] = special
        value = check(work._replace(bias=bias))
        assert value.isnan().all() == (special != special)
        # Illegal ones are not read into the result, legal ones of some rows are.
        mask = legal(6, 300)
        mask[:, [17, 40, 290]] = False
        assert check(work._replace(bias=bias, mask=mask)).isfinite().all()
        mask[2, 290] = True
        check(work._replace(bias=bias, mask=mask))
        # In one row of hidden, so that the others must not see it.
        hidden = work.hidden.clone()
        hidden[1] = special
        value = check(work._replace(hidden=hidden, weight=work.weight.abs()))
        assert value[[0, 2, 3, 4, 5]].isfinite().all()
    bias[:] = torch.tensor([torch.inf, torch.nan, -torch.inf]).to(TRITON_DEVICE).repeat(100)
    check(work._replace(bias=bias))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_legal_action(kind: str) -> None:
    mask = legal(6, 300)
    mask[[0, 3]] = False
    mask[5, :290] = False
    value = check(make(6, 300, 3, kind, mask=mask))
    assert value.isneginf().tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_three_products_of_tf32_are_as_good_as_float32(kind: str) -> None:
    """By the bound of the others, which one product misses by far where tensor cores multiply."""
    try:
        torch.set_float32_matmul_precision("high")
        for shape in ((5, 41, 16), (33, 300, 70)):
            work = make(*shape, kind)
            check(work)
            check(work._replace(mask=legal(*shape[:2]), hidden=work.hidden * 1e3))
        value = check(work._replace(bias=torch.full_like(work.bias, torch.inf)))
        assert value.isposinf().all()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_what_torch_is_told() -> None:
    from dqn_fused._backends import triton_sweep

    matmul = torch.backends.cuda.matmul
    try:
        for level, precision in {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}.items():
            torch.set_float32_matmul_precision(level)
            assert triton_sweep._precision() == precision
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # for which there is no level: asking for it is an error
        assert triton_sweep._precision() == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_ties() -> None:
    """Equal rows of the weight in one tile, in two and in two splits: the first is chosen. Integers are exact."""
    for places in ([5, 6], [5, 70], [5, 280, 299], [299]):
        work = make(6, 300, 3, "argmax")
        work = work._replace(hidden=work.hidden.round(), weight=work.weight.round(), bias=torch.zeros_like(work.bias))
        work.bias[:] = -100
        work.bias[places] = 100
        work.weight[places] = work.weight[places[0]].clone()
        check(work)
    work = make(6, 300, 3, "argmax")
    check(work._replace(weight=torch.zeros_like(work.weight), bias=None))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 30.0, 1e6])
def test_temperature(temperature: float) -> None:
    work = make(5, 300, 16, "soft", temperature=temperature)
    check(work)
    mask = legal(5, 300)
    mask[2] = False
    check(work._replace(mask=mask, hidden=work.hidden * 1e3))


def test_the_same_bits_every_time() -> None:
    for kind in KINDS:
        work = make(5, 1000, 16, kind)
        assert torch.equal(kernel(work), kernel(work))


def test_rows_are_independent_of_the_others() -> None:
    """NaN in all rows but some, which are those of a smaller problem."""
    work = make(33, 300, 16, "soft")
    check(work._replace(hidden=work.hidden[7:12]))
    hidden = torch.full_like(work.hidden, torch.nan)
    hidden[7:12] = work.hidden[7:12]
    assert check(work._replace(hidden=hidden)).isnan().sum() == 28


def test_the_choice_between_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from dqn_fused._backends import triton_sweep

    def pays(m: int, D: int, dtype: torch.dtype) -> bool:
        hidden, weight = (
            torch.empty(m, D, dtype=dtype, device="meta"),
            torch.empty(10**5, D, dtype=dtype, device="meta"),
        )
        return triton_sweep.pays(Sweep(hidden, weight, None, None, "max", 1.0))

    assert [pays(1024, D, torch.bfloat16) for D in (64, 480, 496)] == [True, True, False]
    assert pays(128, 8192, torch.bfloat16)
    bounds = {"highest": 24, "high": 80, "medium": 480}
    for precision, D in bounds.items():
        torch.set_float32_matmul_precision(precision)
        assert pays(1024, D, torch.float32)
        assert not pays(1024, D + 16, torch.float32)
    torch.set_float32_matmul_precision("highest")
    assert not pays(16, 64, torch.float64)
    work = make(5, 41, 3)  # of integers, whose products are exact
    work = work._replace(hidden=work.hidden.round(), weight=work.weight.round(), bias=work.bias.round())
    for choice in (True, False):
        monkeypatch.setattr(triton_sweep, "pays", lambda work, choice=choice: choice)
        assert torch.equal(triton_sweep.auto_sweep(work).largest, tiles.sweep(work).largest)
