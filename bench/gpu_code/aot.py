"""The Triton kernels compiled for GPUs that are not here: the backend's own launches, caught by a stub driver."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dqn_fused import _backends
from dqn_fused._backends import triton_backend, triton_launch
from dqn_fused.arguments import Batch, accumulation_dtype, check_batch, check_loss
from dqn_fused.autograd import Saved
from dqn_fused.categorical_arguments import check_categorical_options, check_logits
from dqn_fused.quantile_arguments import check_quantile_options, check_quantiles
from dqn_fused.row_loss import SavedRows

CUDA = [80, 90, 100, 120]
HIP = ["gfx942", "gfx1100"]
ALWAYS = {"sm_80", "sm_90"}  # every triton supported knows them
SMS = 132  # multiprocessors that the launches are sized for: those of an H100 and an H200
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Target(NamedTuple):
    name: str
    target: Any


def _targets(cuda: list[int], hip: list[str]) -> list[Target]:
    return [Target(f"sm_{arch}", GPUTarget("cuda", arch, 32)) for arch in cuda] + [
        Target(arch, GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)) for arch in hip
    ]


TARGETS = _targets(CUDA, HIP)
MORE_TARGETS = _targets([75, 86, 89], ["gfx90a", "gfx950", "gfx1201"])  # for which a sample is compiled


class Launch(NamedTuple):
    """What the backend would have launched."""

    name: str
    kernel: Any  # as compiled
    programs: int
    arguments: dict[str, Any]  # by name


class StubDriver:
    """The part of a driver that compiling needs. Each target has a device number, by which kernels are cached."""

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


@triton.jit
def probe_kernel(x):  # type: ignore[no-untyped-def]
    """The smallest kernel that a target can be asked to compile."""
    tl.store(x, 1.0)


@contextmanager
def targeting(index: int) -> Iterator[str | None]:
    """Compile for one of TARGETS, and MORE_TARGETS behind them; yields why this triton cannot."""
    driver.set_active(StubDriver(1000 + index, (TARGETS + MORE_TARGETS)[index].target))
    try:
        yield why_not(index)
    finally:
        if torch.cuda.is_available():  # without a device there is no driver to go back to
            driver.reset_active()


@functools.cache
def why_not(index: int) -> str | None:
    """Why this triton compiles nothing for a target: it does not know it yet, or a linker is missing."""
    try:
        probe_kernel.warmup(torch.float32, grid=(1,), **triton_launch.OPTIONS)
    except Exception as error:
        return str(error)
    return None


@contextmanager
def compiling() -> Iterator[list[Launch]]:
    """Compile whatever the backend would launch meanwhile."""
    found: list[Launch] = []
    with (
        patch.object(triton_launch, "run", compile_only(found)),
        patch.object(triton_launch, "sms", lambda device: SMS),
    ):
        yield found


def compile_only(found: list[Launch]) -> Callable[..., None]:
    """A replacement of triton_launch.run that compiles instead of launching."""

    def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **triton_launch.OPTIONS, **meta)
        named = dict(zip(kernel.arg_names, args, strict=False))
        found.append(Launch(kernel.fn.__name__, compiled, programs, named))

    return run


@contextmanager
def serving_cpu() -> Iterator[None]:
    """Let the public functions take the Triton backend for CPU tensors."""
    missing = _backends._missing

    def found(name: str) -> str | None:
        if name != "triton":
            return missing(name)
        _backends._LOADED[name] = triton_backend
        return None

    def refuses(device: torch.device) -> str | None:
        return None if device.type == "cpu" else "expected CPU tensors"

    with (
        patch.object(_backends, "_missing", found),
        patch.object(triton_backend, "refuses", refuses),
        patch.dict(_backends._CHOSEN, clear=True),
        patch.dict(_backends._CHOSEN_DISTRIBUTIONAL, clear=True),
    ):
        yield


def launch(arguments: dict[str, Any], **options: Any) -> None:
    """Let the backend make its launches: forward, backward, and both in one."""
    for call in calls(arguments, **options).values():
        call()


def calls(arguments: dict[str, Any], **options: Any) -> dict[str, Callable[[], object]]:
    """The backend's three functions on a batch; forward must come before backward."""
    spec = check_loss(**options)
    batch = check_batch(Batch(**{"gamma": 0.99, **arguments}), spec)
    outputs: list[Any] = []

    def forward() -> None:
        outputs[:] = triton_backend.forward(batch, spec)

    def backward() -> None:
        _, td_error, normaliser = outputs
        grad_loss = torch.ones_like(td_error) if spec.reduction == "none" else torch.ones((), dtype=td_error.dtype)
        triton_backend.backward(grad_loss, Saved.of(batch, spec, td_error, normaliser), spec)

    return {
        "forward": forward,
        "backward": backward,
        "loss_and_grad": lambda: triton_backend.loss_and_grad(batch, spec),
    }


def quantile_calls(arguments: dict[str, Any], **options: Any) -> dict[str, Callable[[], object]]:
    """The same for the quantile loss."""
    given = {"gamma": 0.99, **arguments}
    taus, online = given.pop("taus", None), given.pop("next_quantiles_online", None)
    q, next_q = given.pop("quantiles"), given.pop("next_quantiles")
    options = {"kappa": 1.0, "quantile_reduction": "sum", "reduction": "mean", "taus": taus, **options}
    spec = check_quantile_options(**options)
    batch, spec = check_quantiles(Batch(q=q, next_q=next_q, next_q_online=online, **given), spec)
    grad_loss = torch.ones(batch.shape if spec.reduction == "none" else (), dtype=accumulation_dtype(batch.q))
    outputs: list[Any] = []

    def forward() -> None:
        outputs[:] = triton_backend.quantile_loss(batch, spec)

    def backward() -> None:
        triton_backend.rows_backward(grad_loss, SavedRows.of(batch, outputs[2], spec.reduction))

    return {
        "forward": forward,
        "backward": backward,
        "loss_and_grad": lambda: triton_backend.quantile_loss_and_grad(batch, spec),
    }


def categorical_calls(arguments: dict[str, Any], **options: Any) -> dict[str, Callable[[], object]]:
    """The same for the categorical losses; without next_logits, the loss for a ready target."""
    given, options = {"gamma": 0.99, "next_logits": None, **arguments}, {"reduction": "mean", **options}
    spec = check_categorical_options(given.pop("support"), **options)
    if "target" in given:
        given["rewards"] = given.pop("target")
    q, next_q, online = (given.pop(name, None) for name in ("logits", "next_logits", "next_logits_online"))
    batch, spec = check_logits(Batch(q=q, next_q=next_q, next_q_online=online, **given), spec)
    grad_loss = torch.ones(batch.shape if spec.reduction == "none" else (), dtype=accumulation_dtype(batch.q))
    outputs: list[Any] = []

    def forward() -> None:
        outputs[:] = triton_backend.categorical_loss(batch, spec)

    def backward() -> None:
        triton_backend.rows_backward(grad_loss, SavedRows.of(batch, outputs[2], spec.reduction))

    return {
        "forward": forward,
        "backward": backward,
        "loss_and_grad": lambda: triton_backend.categorical_loss_and_grad(batch, spec),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL, as cuobjdump reads them off the machine code."""
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", disassembled("cuobjdump", "--dump-resource-usage", cubin))
    return {key: int(value) for key, value in found}


def amd_usage(code: str) -> dict[str, int]:
    """Vector registers, those spilled, and the private segment in bytes.

    Scalar registers may spill into lanes of vector registers: no memory, hence the private segment is what counts.
    """
    found = re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code)
    return {key: int(value) for key, value in found}


def machine_code(kernel: Any) -> str:
    return kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else disassembled("nvdisasm", "-c", kernel.asm["cubin"])


@functools.cache  # backward is compiled once and launched twice
def disassembled(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, text=True, check=True, capture_output=True).stdout  # it warns of its own formats


def loads_128_bits(kernel: Any) -> bool:
    if "ptx" in kernel.asm:
        return bool(re.search(r"ld\.global(\.\w+)*\.v(4\.b32|2\.b64)", kernel.asm["ptx"]))
    return bool(re.search(r"(global|buffer)_load_(dwordx4|b128)", kernel.asm["amdgcn"]))


def stores_128_bits(kernel: Any) -> bool:
    if "ptx" in kernel.asm:
        return bool(re.search(r"st\.global(\.\w+)*\.v(4\.b32|2\.b64)", kernel.asm["ptx"]))
    return bool(re.search(r"(global|buffer)_store_(dwordx4|b128)", kernel.asm["amdgcn"]))
