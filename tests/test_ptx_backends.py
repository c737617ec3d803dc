"""On executed PTX, what the suite reaches on a GPU only: illegal actions in the kernels, rows that lie 2^31 elements
apart, any order of blocks and warps."""

import mmap
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CUDA_SOURCES, EXECUTED
from test_loss import compact, make
from torch import Tensor

if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from bench.gpu_code.ptx.executor import Kernel, PtxError
from dqn_fused import fused_dqn_loss

TARGET = "sm_90"
NAMES = ["triton", pytest.param("compiled", marks=pytest.mark.skipif(not CUDA_SOURCES, reason="no nvcc, or no csrc"))]


@pytest.fixture(params=NAMES, ids=["triton", "cuda"])
def executor(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Name of a backend that is executed, and its executor."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from bench.gpu_code.ptx import triton as backend
    else:
        from bench.gpu_code.ptx import cuda as backend  # type: ignore[no-redef]
    with backend.executing(TARGET) as found:
        yield request.param, found


def far_rows(rows: int, columns: int, stride: int, dtype: Any = np.float32) -> Tensor:
    """Rows that lie `stride` elements apart, in pages of memory of which only those that are used exist."""
    size = ((rows - 1) * stride + columns) * np.dtype(dtype).itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    flat = torch.from_numpy(np.frombuffer(pages, dtype))
    x = flat.as_strided((rows, columns), (stride, 1))
    x.copy_(torch.from_numpy(np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)))
    return x


def step(backend: str, arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = arguments["q"].detach().requires_grad_()
    loss, td_error = fused_dqn_loss(
        **{**arguments, "q": q}, **options, reduction="none", return_td_error=True, backend=backend
    )
    return loss.detach(), td_error, torch.autograd.grad(loss.sum(), q)[0]


@pytest.mark.parametrize("shape", [(40, 18), (6, 700)], ids=str)
def test_an_illegal_action_is_nan_and_nothing_else(
    executor: tuple[str, Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA nobody looks at the values: such a row is NaN, its gradient zero, and no memory outside is touched."""
    monkeypatch.setattr("dqn_fused.arguments.looks_at_values", lambda device: False)
    arguments = make(shape)
    expected = step(executor[0], arguments)
    arguments["actions"][1], arguments["actions"][4] = shape[1], -1
    illegal = torch.zeros(shape[0], dtype=torch.bool)
    illegal[[1, 4]] = True
    loss, td_error, grad = step(executor[0], arguments)
    assert torch.equal(loss.isnan(), illegal)
    assert torch.equal(td_error.isnan(), illegal)
    assert not grad[illegal].any()
    for got, value in zip((loss, td_error, grad), expected, strict=True):
        assert torch.equal(got[~illegal], value[~illegal])


@pytest.mark.parametrize("columns", [7, 130])
@pytest.mark.parametrize("name", ["q", "next_q", "next_q_online", "next_action_mask"])
def test_rows_that_lie_far_apart(executor: tuple[str, Any], name: str, columns: int) -> None:
    """Offsets are int64 before the multiplication."""
    arguments = make((4, columns)) | {"next_q_online": torch.randn(4, columns)}
    arguments["next_action_mask"] = torch.ones(4, columns, dtype=torch.bool)
    far = far_rows(4, columns, 2**30, np.uint8 if name == "next_action_mask" else np.float32)
    arguments[name] = (far != 0) if name == "next_action_mask" else far.clone()
    if name == "next_action_mask":
        far = far.view(torch.bool)
        far.copy_(arguments[name])
    near = step(executor[0], arguments)
    for got, value in zip(step(executor[0], arguments | {name: far}), near, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("shape", [(600, 18), (5, 1000), (2, 9001)], ids=str)
def test_the_same_bits_in_any_order(executor: tuple[str, Any], shape: tuple[int, int]) -> None:
    arguments = compact(make(shape))
    results = []
    for seed in range(3):
        executor[1].seed = 1000 * seed
        q = arguments["q"].detach().requires_grad_()
        loss = fused_dqn_loss(**{**arguments, "q": q}, backend=executor[0])
        results.append((loss.detach(), torch.autograd.grad(loss, q)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.skipif(not CUDA_SOURCES, reason="no nvcc, or no csrc")
def test_a_barrier_removed_from_the_cuda_kernels() -> None:
    from bench.gpu_code.ptx import cuda

    arguments, removed = make((2000, 18)), 0
    with cuda.executing(TARGET) as executor:
        fused_dqn_loss(**arguments, backend="compiled")
        for name in {launch.name for launch in executor.launches}:
            kernel = executor.kernels[name]
            start = kernel.text.index(f".entry {name}(")
            end = kernel.text.find(".entry", start + 1)
            body = kernel.text[start : end if end > 0 else None]
            for match in re.finditer(r"bar\.sync\s+0;", body):
                at = start + match.start()
                executor.kernels[name] = Kernel(kernel.text[:at] + kernel.text[at + len(match[0]) :], name)
                with pytest.raises(PtxError, match=r"race|never written"):
                    fused_dqn_loss(**arguments, backend="compiled")
                removed += 1
            executor.kernels[name] = kernel
        fused_dqn_loss(**arguments, backend="compiled")
    assert removed >= 2
