"""Kernels compiled for GPUs that are not here: the fixtures that do it, and what is asserted of every kernel."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import triton

from bench.gpu_code import aot
from bench.gpu_code.aot import ALWAYS, TARGETS, Target, amd_usage, resource_usage

MAX_REGISTERS = 128  # of a thread: 4 programs of 4 warps then fit a multiprocessor of 65,536 registers
# Where ptxas now and then parks a few words to fit one more block, by choice: registers of a thread, and bytes parked.
PARKED = dict.fromkeys(range(81), 16)
PARKED_BY_TENSOR_CORES = dict.fromkeys((80, 128), 24)  # to fit a second or third program of 8 warps

Compiled = list[aot.Launch]


@pytest.fixture(params=range(len(TARGETS)), ids=[t.name for t in TARGETS])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    chosen = TARGETS[request.param]
    with aot.targeting(request.param) as reason:
        if reason is not None and chosen.name not in ALWAYS:
            pytest.skip(f"triton {triton.__version__} cannot compile for {chosen.name}: {reason}")
        yield chosen


@pytest.fixture
def compiled(target: Target) -> Iterator[Compiled]:
    """Compile instead of launching; what would have been launched, in that order."""
    with aot.compiling() as launches:
        yield launches


def check_resources(
    name: str, kernel: Any, target: Target, most: int = MAX_REGISTERS, parked: dict[int, int] = PARKED
) -> None:
    if "ptx" in kernel.asm:
        usage = resource_usage(kernel.asm["cubin"])
        assert usage["LOCAL"] == 0, f"{name} on {target.name} uses local memory: {usage}"
        assert usage["STACK"] <= parked.get(usage["REG"], 0), f"{name} on {target.name} spills: {usage}"
        assert usage["REG"] <= most, f"{name} on {target.name}: {usage}"
        return
    usage = amd_usage(kernel.asm["amdgcn"])
    assert usage["vgpr_spill_count"] == usage["private_segment_fixed_size"] == 0, f"{name} on {target.name}: {usage}"
    assert usage["vgpr_count"] <= most, f"{name} on {target.name}: {usage}"


def check_no_fusion(name: str, kernel: Any) -> None:
    """Lanes that hold the same row must add up the same: in one `mul; add` was fused, in its copy `mul; shfl; add` not.

    Triton's default was to fuse, up to 3.9. The exponentials and logarithms of the library are fma with .ftz.
    """
    assert not kernel.metadata.enable_fp_fusion, name
    if "ptx" in kernel.asm:
        assert not re.search(r"\bfma\.rn\.f32\b", kernel.asm["ptx"]), f"{name}: fused"


def check_instructions(name: str, kernel: Any, target: Target, float64: bool) -> None:
    if "ptx" in kernel.asm:
        code = kernel.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", code), f"{name}: atomics"
        doubles = set(re.findall(r"\b[a-z]+\.(?:\w+\.)*f64\b", code)) - {"mov.f64"}
    else:
        code = kernel.asm["amdgcn"]
        assert not re.search(r"_atomic_", code), f"{name}: atomics"
        doubles = set(re.findall(r"\bv_\w+_f64\w*", code))
    if not float64:
        assert not doubles, f"{name} on {target.name}: float64 arithmetic {sorted(doubles)}"
