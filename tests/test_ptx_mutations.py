"""The executor can fail: kernels that are broken in their PTX are noticed, each in the way that it is broken."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXECUTED
from data import source
from test_loss import make
from test_ptx_backends import far_rows

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from mutations import (
    Case,
    Outputs,
    execute,
    kernels,
    loosen_each_guard,
    noticed,
    remove_each_barrier,
    without,
)
from test_sweep_backward import legal
from test_sweep_backward import make as make_backward

from bench.gpu_code.ptx.triton import NotExecutedError, executing
from dqn_fused import fused_dqn_loss
from dqn_fused._backends import triton_sweep, triton_sweep_backward
from dqn_fused.head.sweep import Sweep

pytestmark = pytest.mark.executor


def loss(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **changes: Any) -> Outputs:
    arguments = make(shape, dtype) | changes
    q = arguments.pop("q").requires_grad_()
    value, td_error = fused_dqn_loss(q, **arguments, backend="triton", return_td_error=True)
    return [value.detach(), td_error, torch.autograd.grad(value, q)[0]]


def family(shape: tuple[int, ...]) -> Outputs:
    legal = torch.ones(shape, dtype=torch.bool)
    legal[:, ::3] = False
    g = torch.Generator().manual_seed(1)
    return loss(
        shape, target="munchausen", target_q=torch.randn(shape, generator=g), cql_alpha=0.5,
        action_mask=legal, next_action_mask=legal, weights=torch.rand(shape[:-1], generator=g),
    )  # fmt: skip


def sweep(m: int, kind: str, dtype: torch.dtype, **changes: Any) -> Outputs:
    g = source()
    hidden, weight, bias = (torch.randn(size, generator=g).to(dtype) for size in ((m, 160), (300, 160), (300,)))
    work = Sweep(hidden, weight, bias, None, kind, 0.5)._replace(**changes)
    return [x for x in triton_sweep.sweep(work) if x is not None]


def sweep_backward(m: int, dtype: torch.dtype, **changes: Any) -> Outputs:
    work = make_backward(m, 300, 160, dtype)._replace(mask=legal(m, 300))._replace(**changes)
    gradient, sums = triton_sweep_backward.tile_gradient(work, work.hidden, work.weight, slice(0, m), slice(0, 300))
    return [gradient, sums]


CASES: dict[str, Case] = {
    "narrow": lambda: loss((300, 18)),
    "narrow-family": lambda: family((33, 19)),
    "several-programs": lambda: loss((1100, 18), torch.bfloat16),
    "wide": lambda: loss((5, 1000)),
    "wide-family": lambda: family((3, 500)),
    "sweep": lambda: sweep(40, "argmax", torch.bfloat16),
    "sweep-float32": lambda: sweep(5, "soft", torch.float32),
    "sweep-backward": lambda: sweep_backward(40, torch.bfloat16),
    "sweep-backward-float32": lambda: sweep_backward(5, torch.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_a_barrier_removed(name: str) -> None:
    remove_each_barrier(CASES[name])


def test_max_that_drops_nan() -> None:
    """max.NaN.f32 to max.f32: the loss of a row with a NaN would be a number."""
    next_q = torch.randn(5, 1000)
    next_q[2, 700] = torch.nan

    def case() -> Outputs:
        return loss((5, 1000), next_q=next_q, terminated=torch.zeros(5))

    expected, launches, _ = execute(case)
    assert expected[1].isnan().tolist() == [False, False, True, False, False]
    (text,) = (text for text, name in kernels(launches).items() if name == "row_fwd_kernel")
    assert noticed(case, text, text.replace("max.NaN.f32", "max.f32"), expected) == "value"


@pytest.mark.parametrize("shape", [(33, 19), (5, 1003)])
def test_a_mask_off_by_one(shape: tuple[int, int]) -> None:
    loosen_each_guard(lambda: loss(shape))


@pytest.mark.parametrize("name", ["sweep", "sweep-float32", "sweep-backward", "sweep-backward-float32"])
def test_a_mask_of_the_sweep_off_by_one(name: str) -> None:
    loosen_each_guard(CASES[name])


@pytest.mark.parametrize("matrix", ["hidden", "weight", "mask"])
@pytest.mark.parametrize("call", [lambda **given: sweep(5, "soft", torch.float32, **given),
                                  lambda **given: sweep_backward(5, torch.float32, **given)],
                         ids=["sweep", "sweep-backward"])  # fmt: skip
def test_rows_of_the_sweep_that_lie_far_apart(call: Any, matrix: str) -> None:
    """Offsets are int64 before the multiplication."""
    rows, columns = {"hidden": (5, 160), "weight": (300, 160), "mask": (5, 300)}[matrix]
    # The weight has so many rows that 2^24 elements between them, and 2^32 in all, are enough.
    far = far_rows(rows, columns, 2**24 if matrix == "weight" else 2**30, np.uint8 if matrix == "mask" else np.float32)
    if matrix == "mask":
        far = far.view(torch.bool).copy_(far != 0)
    expected = execute(lambda: call(**{matrix: far.clone()}))[0]
    assert all(map(torch.equal, execute(lambda: call(**{matrix: far}))[0], expected))


@pytest.mark.parametrize("name", ["sweep", "sweep-backward"])
def test_a_wait_for_asynchronous_copies_removed(name: str) -> None:
    case = CASES[name]
    expected, launches, _ = execute(case)
    removed = 0
    for text in kernels(launches):
        for match in re.finditer(r"cp\.async\.wait_group\s+\d+;", text):
            message = noticed(case, text, without(text, match), expected)
            if message is None:  # one behind the loop, for nothing: no copies are left
                assert match[0].split()[-1] == "0;"
                continue
            assert "asynchronous copy" in message
            removed += 1
    assert removed
    # One group too few is waited for.
    (text,) = (text for text, kernel in kernels(launches).items() if kernel != "sweep_combine_kernel")
    count = re.search(r"cp\.async\.wait_group\s+([1-9]\d*);", text)
    assert count is not None
    mutated = text[: count.start(1)] + str(int(count[1]) + 1) + text[count.end(1) :]
    assert "asynchronous copy" in (noticed(case, text, mutated, expected) or "")


@pytest.mark.parametrize("columns", [7, 130])
def test_an_offset_narrowed_to_32_bits(columns: int) -> None:
    """Rows 2^30 elements apart: an offset in int32 reads foreign memory, and the right one is read without a GPU."""
    next_q = far_rows(5, columns, 2**30)

    def case() -> Outputs:
        return loss((5, columns), next_q=next_q)

    expected, launches, _ = execute(case)
    near = execute(lambda: loss((5, columns), next_q=next_q.clone()))[0]
    assert all(torch.equal(x, y) for x, y in zip(expected, near, strict=True))
    messages = []
    for text in kernels(launches):
        for match in re.finditer(r"(mul|mad)\.(wide\.s32|lo\.s64)\s+(%rd\d+), (%r\w+), (%r\w+)(?:, (%rd\d+))?;", text):
            operation, kind, d, a, b, c = match.groups()
            low = f"cvt.u32.u64 a, {a}; cvt.u32.u64 b, {b};" if kind == "lo.s64" else f"mov.b32 a, {a}; mov.b32 b, {b};"
            low = f"{{ .reg .b32 a, b, x; .reg .b64 y; {low} mul.lo.s32 x, a, b; cvt.s64.s32 y, x; "
            narrow = low + (f"add.s64 {d}, y, {c}; }}" if operation == "mad" else f"mov.b64 {d}, y; }}")
            messages.append(noticed(case, text, text[: match.start()] + narrow + text[match.end() :], expected))
    assert any("outside of every tensor" in (message or "") for message in messages)


def test_what_is_not_executed_is_refused() -> None:
    def case() -> Outputs:
        return sweep(200, "max", torch.bfloat16)

    with executing("sm_90"), pytest.raises(NotExecutedError, match="wgmma"):
        case()
