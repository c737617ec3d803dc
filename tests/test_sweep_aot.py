"""The sweep compiled for GPUs that are not here: tensor cores by their instruction, registers, wide loads."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

triton = pytest.importorskip("triton")

from test_triton_aot import Compiled, check_instructions, compiled, target  # noqa: E402, F401

from bench.aot import Target, amd_usage, machine_code, resource_usage  # noqa: E402
from dqn_fused.head import Sweep  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

MAX_REGISTERS = 256  # of a thread: one program of 8 warps fills a multiprocessor of 65,536
MAX_SHARED = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10}
MAX_SHARED_ELSEWHERE = 99 << 10  # of sm_120; sm_80 has more, sm_86 and sm_89 do not
TENSOR_CORES = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma_f32",
    "gfx1100": "v_wmma_f32",
}
EVERYWHERE = set(TENSOR_CORES)
# 1,000 features are no multiple of 16: rows are read 16 bytes at a time nevertheless. 64 are read once. The number of
# actions is odd: rows of the mask begin at any byte.
CASES: dict[str, tuple[torch.dtype, str, dict[str, Any], set[str]]] = {
    "bf16-max": (torch.bfloat16, "highest", {"kind": "max", "D": 1000}, EVERYWHERE),
    "f16-soft-mask": (torch.float16, "highest", {"kind": "soft", "D": 64, "masked": True}, EVERYWHERE),
    "bf16-argmax-mask": (torch.bfloat16, "highest", {"kind": "argmax", "D": 1024, "masked": True}, {"sm_80", "gfx942"}),
    "f32-ieee-max-mask": (
        torch.float32,
        "highest",
        {"kind": "max", "D": 1024, "masked": True},
        {"sm_90", "gfx942", "gfx1100"},
    ),
    "f32-tf32-argmax": (torch.float32, "high", {"kind": "argmax", "D": 1024}, EVERYWHERE - {"gfx942", "gfx1100"}),
}


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def launch(dtype: torch.dtype, precision: str, kind: str, D: int, masked: bool = False, m: int = 256) -> None:
    from dqn_fused._backends.triton_sweep import sweep

    torch.set_float32_matmul_precision(precision)
    A = 50257
    hidden, weight, bias = (torch.zeros(size, dtype=dtype) for size in ((m, D), (A, D), (A,)))
    sweep(Sweep(hidden, weight, bias, torch.ones(m, A, dtype=torch.bool) if masked else None, kind, 0.5))


@pytest.mark.parametrize("case", CASES)
def test_machine_code(target: Target, compiled: Compiled, case: str) -> None:  # noqa: F811
    dtype, precision, options, targets = CASES[case]
    if target.name not in targets:
        pytest.skip("as on other targets")
    launch(dtype, precision, **options)
    assert [name for name, *_ in compiled] == ["sweep_fwd_kernel", "sweep_combine_kernel"]
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=False)
    kernel = compiled[0].kernel
    # float32 without rounding is for vector units, but for the matrix units of gfx942, which have it.
    exact = dtype is torch.float32 and precision == "highest" and target.name != "gfx942"
    assert has(kernel, TENSOR_CORES[target.name]) != exact
    assert reads_128_bits(kernel), "the weight is not read 16 bytes at a time"


@pytest.mark.parametrize("m", [1, 40])
def test_few_rows(target: Target, compiled: Compiled, m: int) -> None:  # noqa: F811
    if target.name not in ("sm_90", "gfx942"):
        pytest.skip("as on other targets")
    launch(torch.bfloat16, "highest", "argmax", 1024, masked=True, m=m)
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
    assert has(compiled[0].kernel, "v_mfma_f32" if target.name == "gfx942" else "HMMA" if m == 1 else "HGMMA")


def check_resources(name: str, kernel: Any, target: Target) -> None:  # noqa: F811
    assert kernel.metadata.shared <= MAX_SHARED.get(target.name, MAX_SHARED_ELSEWHERE)
    if "ptx" in kernel.asm:
        usage = resource_usage(kernel.asm["cubin"])
        # At 128 or 80 registers ptxas now and then parks a few words to fit a second or third program of 8 warps.
        allowed = 24 if usage["REG"] in (80, 128) else 0
        assert usage["LOCAL"] == 0, f"{name} on {target.name} uses local memory: {usage}"
        assert usage["STACK"] <= allowed, f"{name} on {target.name} spills: {usage}"
        assert usage["REG"] <= MAX_REGISTERS, f"{name} on {target.name}: {usage}"
        return
    usage = amd_usage(kernel.asm["amdgcn"])
    assert usage["vgpr_spill_count"] == usage["private_segment_fixed_size"] == 0, f"{name} on {target.name}: {usage}"
    assert usage["vgpr_count"] <= MAX_REGISTERS, f"{name} on {target.name}: {usage}"


def has(kernel: Any, instruction: str) -> bool:
    return bool(re.search(rf"\b{instruction}", machine_code(kernel)))


def reads_128_bits(kernel: Any) -> bool:
    return bool(re.search(r"\bLDGSTS(\.\w+)*\.128\b|\b(global|buffer)_load_(dwordx4|b128)\b", machine_code(kernel)))
