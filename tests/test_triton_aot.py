"""The Triton kernels compiled for GPUs that are not here: the backend's own launches, caught by a stub driver.

What the interpreter cannot show is asserted on the machine code: registers and spills, 128-bit loads and stores, no
float atomics, no float64 arithmetic where none was asked for.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import INTERPRETED
from test_loss import compact, dtype_id, make

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from dqn_fused._backends import triton_backend  # noqa: E402
from dqn_fused.arguments import check_batch, check_loss  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

CUDA = [80, 90, 100, 120]
HIP = ["gfx942", "gfx1100"]
MAX_REGISTERS = 128  # of a thread: 4 programs of 4 warps then fit a multiprocessor of 65,536 registers


Compiled = list[tuple[str, Any]]


class Target(NamedTuple):
    name: str
    target: Any


TARGETS = [Target(f"sm_{arch}", GPUTarget("cuda", arch, 32)) for arch in CUDA] + [
    Target(arch, GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)) for arch in HIP
]


class StubDriver:
    """As much of a driver as compiling needs. One device number a target, because kernels are cached by it."""

    def __init__(self, index: int, target: Any) -> None:
        self.index, self.target = index, target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(params=range(len(TARGETS)), ids=[t.name for t in TARGETS])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    chosen = TARGETS[request.param]
    driver.set_active(StubDriver(1000 + request.param, chosen.target))
    yield chosen
    if torch.cuda.is_available():  # without a device there is no driver to go back to
        driver.reset_active()


@pytest.fixture
def compiled(target: Target, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Compile instead of launching; (kernel name, compiled kernel) in the order of the launches."""
    kernels: Compiled = []

    def compile_only(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        try:
            kernels.append((kernel.fn.__name__, kernel.warmup(*args, grid=(programs,), **meta)))
        except Exception as error:
            # An older triton knows fewer targets, and its AMD backend wants a linker of its own.
            if re.search(r"(?i)unsupported|unknown|not supported|not recognized|linker .* not found", str(error)):
                pytest.skip(f"triton {triton.__version__} cannot compile for {target.name}: {error}")
            raise

    monkeypatch.setattr(triton_backend, "run", compile_only)
    monkeypatch.setattr(triton_backend, "_sms", lambda device: 132)
    return kernels


def launch(arguments: dict[str, Any], reduction: str = "mean") -> None:
    """Let the backend make its launches: forward, backward, and both in one."""
    defaults = {"terminated": None, "gamma": 0.99, "non_final_mask": None}
    batch, spec = check_batch(**{**defaults, **arguments}), check_loss("mse", reduction)
    _, td_error = triton_backend.forward(batch, spec)
    grad_loss = torch.ones_like(td_error) if reduction == "none" else torch.ones((), dtype=td_error.dtype)
    q = arguments["q"]
    triton_backend.backward(grad_loss, td_error, batch.actions, q.shape, q.dtype, spec)
    triton_backend.loss_and_grad(batch, spec)


CASES = {
    "small": ({"shape": (128, 2)}, {"td_loss_fwd_kernel", "td_loss_bwd_kernel"}),
    "atari": ({"shape": (512, 18)}, {"td_loss_fwd_kernel", "td_loss_bwd_kernel"}),
    "many_rows": ({"shape": (16384, 18)}, {"td_loss_fwd_kernel", "sum_kernel", "td_loss_bwd_kernel"}),
    "hundreds": ({"shape": (1024, 512)}, {"td_loss_fwd_kernel", "sum_kernel", "td_loss_bwd_kernel"}),
    "large": ({"shape": (2048, 4099)}, {"td_loss_fwd_kernel", "sum_kernel", "td_loss_bwd_kernel"}),
    "split": ({"shape": (3, 50257)}, {"row_max_fwd_kernel", "td_loss_fwd_kernel", "td_loss_bwd_kernel"}),
}
WIDE = {"hundreds": "td_loss_fwd_kernel", "large": "td_loss_fwd_kernel", "split": "row_max_fwd_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(target: Target, compiled: Compiled, case: str, dtype: torch.dtype) -> None:
    """Both regimes in every dtype. 4,099 and 50,257 are odd: rows start at any alignment and are read 16 bytes wide."""
    arguments, kernels = CASES[case]
    launch(make(**arguments, dtype=dtype))
    assert {name for name, _ in compiled} == kernels
    for name, kernel in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=dtype is torch.float64)
        if name == WIDE.get(case):
            assert loads_128_bits(kernel, target), "next_q is not read 16 bytes at a time"
        if name == "td_loss_bwd_kernel" and (dtype.itemsize >= 4 or target.name.startswith("sm_")):
            assert stores_128_bits(kernel, target), "grad_q is not written 16 bytes at a time"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("variant", ["mask", "gamma_scalar", "gamma_per_sample", "mixed_dtypes", "three_dimensions"])
def test_variants_compile(target: Target, compiled: Compiled, variant: str, reduction: str) -> None:
    arguments = make((6, 4, 70) if variant == "three_dimensions" else (24, 70))
    if variant == "mask":
        arguments = compact(arguments)
    elif variant == "gamma_scalar":
        arguments["gamma"] = torch.tensor(0.9)
    elif variant == "gamma_per_sample":
        arguments["gamma"] = torch.rand(24)
    elif variant == "mixed_dtypes":
        arguments["actions"] = arguments["actions"].to(torch.int32)
        arguments["rewards"] = arguments["rewards"].to(torch.int64)
        arguments["terminated"] = arguments["terminated"].float()
        arguments["next_q"] = arguments["next_q"].to(torch.bfloat16)
    else:
        arguments["q"] = torch.randn(6, 5, 70)[:, 1:]
    launch(arguments, reduction)
    for name, kernel in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=False)


def check_resources(name: str, kernel: Any, target: Target) -> None:
    if "ptx" in kernel.asm:
        usage = resource_usage(kernel.asm["cubin"])
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} on {target.name} spills: {usage}"
        assert usage["REG"] <= MAX_REGISTERS, f"{name} on {target.name}: {usage}"
        return
    code = kernel.asm["amdgcn"]
    # Scalar registers may spill into lanes of vector registers: no memory, hence the private segment is what counts.
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code))
    assert usage["vgpr_spill_count"] == usage["private_segment_fixed_size"] == "0", f"{name} on {target.name}: {usage}"
    assert int(usage["vgpr_count"]) <= MAX_REGISTERS, f"{name} on {target.name}: {usage}"


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


def loads_128_bits(kernel: Any, target: Target) -> bool:
    if "ptx" in kernel.asm:
        return bool(re.search(r"ld\.global(\.\w+)*\.v(4\.b32|2\.b64)", kernel.asm["ptx"]))
    return bool(re.search(r"(global|buffer)_load_(dwordx4|b128)", kernel.asm["amdgcn"]))


def stores_128_bits(kernel: Any, target: Target) -> bool:
    if "ptx" in kernel.asm:
        return bool(re.search(r"st\.global(\.\w+)*\.v(4\.b32|2\.b64)", kernel.asm["ptx"]))
    return bool(re.search(r"(global|buffer)_store_(dwordx4|b128)", kernel.asm["amdgcn"]))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as cuobjdump reads them off the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(subprocess.check_output(["mktemp", "--suffix=.cubin"], text=True).strip())
    try:
        path.write_bytes(cubin)
        out = subprocess.check_output([tool, "--dump-resource-usage", path], text=True)
    finally:
        path.unlink()
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}
