"""The sweep compiled for GPUs that are not here: tensor cores by their instruction, registers, the main loop."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

triton = pytest.importorskip("triton")

import ahead  # noqa: E402
from ahead import Compiled, check_instructions, compiled, target  # noqa: E402, F401

from bench.gpu_code import aot  # noqa: E402
from bench.gpu_code.aot import Target, machine_code  # noqa: E402
from bench.gpu_code.machine_code import main_loop, read_in_flight, widths  # noqa: E402
from dqn_fused.head.sweep import Sweep  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

MAX_REGISTERS = 256  # of a thread: one program of 8 warps fills a multiprocessor of 65,536
MAX_SHARED = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx950": 160 << 10}
MAX_SHARED |= dict.fromkeys(("sm_75", "gfx942", "gfx1100", "gfx90a", "gfx1201"), 64 << 10)
MAX_SHARED_ELSEWHERE = 99 << 10  # of sm_86, sm_89 and sm_120; sm_80 has more
VECTOR_UNITS = r"\bFFMA\b|\bv_\w*fma\w*"  # multiply float32 without rounding, but for the matrix units of CDNA
TENSOR_CORES = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma_f32",
    "gfx1100": "v_wmma_f32",
}
EVERYWHERE = set(TENSOR_CORES)
TENSOR_CORES |= {
    "sm_75": VECTOR_UNITS,  # its own are unknown to Triton
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "gfx90a": "v_mfma_f32",
    "gfx950": "v_mfma_f32",
    "gfx1201": "v_wmma_f32",
}
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
    "f32-tf32-argmax": (torch.float32, "medium", {"kind": "argmax", "D": 1024}, EVERYWHERE - {"gfx942", "gfx1100"}),
    "f32-tf32x3-argmax": (torch.float32, "high", {"kind": "argmax", "D": 1024}, {"sm_80", "sm_90"}),
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
def test_machine_code(target: Target, compiled: Compiled, case: str) -> None:
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
    check_main_loop(kernel, VECTOR_UNITS if exact else TENSOR_CORES[target.name])
    if target.name == "sm_90" and not exact:
        # The halves of float32 are made in registers for each step, and 64 features are one step.
        check_asynchronous_products(kernel, overlapped=precision != "high" and options["D"] > 64)


@pytest.mark.parametrize("index", range(len(aot.MORE_TARGETS)), ids=[t.name for t in aot.MORE_TARGETS])
def test_more_targets(index: int) -> None:
    extra = aot.MORE_TARGETS[index]
    with aot.targeting(len(aot.TARGETS) + index) as reason:
        if reason is not None:
            pytest.skip(f"triton {triton.__version__} cannot compile for {extra.name}: {reason}")
        with aot.compiling() as compiled:
            launch(torch.bfloat16, "highest", "argmax", 1000)
        for name, kernel, *_ in compiled:
            check_resources(name, kernel, extra)
            check_instructions(name, kernel, extra, float64=False)
        check_main_loop(compiled[0].kernel, TENSOR_CORES[extra.name])


@pytest.mark.parametrize("m", [16, 256])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_tensor_cores(dtype: torch.dtype, precision: str, m: int) -> None:
    """float16 took tiles of tensor cores on sm_75, for which Triton has none: 7.3 KB of stack a thread, as bfloat16."""
    index = [target.name for target in aot.MORE_TARGETS].index("sm_75")
    with aot.targeting(len(aot.TARGETS) + index) as reason:
        assert reason is None
        with aot.compiling() as compiled:
            launch(dtype, precision, "soft", 64, masked=True, m=m)
        for name, kernel, *_ in compiled:
            check_resources(name, kernel, aot.MORE_TARGETS[index])


@pytest.mark.parametrize("sms", [108, 132, 170, 304])
@pytest.mark.parametrize("m", [256, 4096, 17024])
def test_programs_for_other_devices(
    target: Target,
    compiled: Compiled,
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    sms: int,
) -> None:
    """One program a multiprocessor at a time: of those in the last wave few are missing."""
    if target.name != "sm_90":
        pytest.skip("the same for all of NVIDIA's")
    monkeypatch.setattr(aot, "SMS", sms)
    launch(torch.bfloat16, "highest", "max", 64, m=m)
    programs = compiled[0].programs
    assert programs / sms >= 0.86 * -(-programs // sms)


def check_main_loop(kernel: Any, multiplies: str) -> None:
    """All of the weight, and of hidden where it is not read once, is loaded 16 bytes at a time within the loop."""
    loop, constants = main_loop(machine_code(kernel), multiplies), kernel.src.constants
    tile = {kernel.src.fn.arg_names[i]: x for (i, *_), x in constants.items()}
    itemsize = 2 if any(x in str(kernel.src.signature) for x in ("bf16", "fp16")) else 4
    rows = tile["COLUMNS"] + (0 if tile["ONCE"] else tile["ROWS"])
    wide = sum(bits == 128 for bits in widths(loop, "load"))
    lanes = kernel.metadata.num_warps * kernel.metadata.warp_size
    assert wide * 16 * lanes >= rows * tile["FEATURES"] * itemsize, "operands are not read 16 bytes at a time"


def check_asynchronous_products(kernel: Any, overlapped: bool) -> None:
    """wgmma runs beside the loads of the next step, and no accumulator is touched while it does."""
    assert not read_in_flight(kernel.asm["ptx"])
    loop = main_loop(machine_code(kernel), "HGMMA")
    # ptxas serialises what it cannot prove safe: then each product is a group of its own, and waited for.
    assert len(re.findall(r"HGMMA.*gsb0", loop)) < len(re.findall("HGMMA", loop))
    depths = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", loop)
    assert ("1" in depths) == overlapped, "the products of one step are not waited for until the next"


@pytest.mark.parametrize("m", [1, 40])
def test_few_rows(target: Target, compiled: Compiled, m: int) -> None:
    if target.name not in ("sm_90", "gfx942"):
        pytest.skip("as on other targets")
    launch(torch.bfloat16, "highest", "argmax", 1024, masked=True, m=m)
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
    assert has(compiled[0].kernel, "v_mfma_f32" if target.name == "gfx942" else "HMMA" if m == 1 else "HGMMA")


def check_resources(name: str, kernel: Any, target: Target) -> None:
    assert kernel.metadata.shared <= MAX_SHARED.get(target.name, MAX_SHARED_ELSEWHERE)
    ahead.check_resources(name, kernel, target, MAX_REGISTERS, ahead.PARKED_BY_TENSOR_CORES)


def has(kernel: Any, instruction: str) -> bool:
    return bool(re.search(rf"\b{instruction}", machine_code(kernel)))


def test_accumulators_read_in_flight_are_found(target: Target, compiled: Compiled) -> None:
    """The check itself: without the wait before the maximum, every element is read too early."""
    if target.name != "sm_90":
        pytest.skip("has no wgmma")
    launch(torch.bfloat16, "highest", "max", 1000)
    ptx = compiled[0].kernel.asm["ptx"]
    assert not read_in_flight(ptx)
    assert len(read_in_flight(re.sub(r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1", ptx))) >= 64
