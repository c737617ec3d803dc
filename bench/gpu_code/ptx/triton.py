"""The Triton backend on CPU tensors: its own launches, compiled for a GPU and executed."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.gpu_code.aot import StubDriver, serving_cpu
from bench.gpu_code.ptx.executor import Counts, Kernel, Memory, Trace, trace
from dqn_fused._backends import triton_launch

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_120")
NOT_EXECUTED = ("wgmma", "tcgen05")
C_TYPES: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


class NotExecutedError(NotImplementedError):
    """The kernel has instructions that the executor leaves out by design."""


class Executed(NamedTuple):
    """A launch that has been executed."""

    name: str
    kernel: Any  # as compiled
    parsed: Kernel
    programs: int
    arguments: dict[str, Any]  # by name
    counts: Counts


class Executor:
    """Takes the place of triton_launch.run."""

    def __init__(
        self,
        seed: int = 0,
        races: bool = True,
        change: Callable[[str, str], str] | None = None,
        trace: bool = False,
        keep: bool = True,
        kernels: dict[str, Kernel] | None = None,
    ) -> None:
        self.seed, self.races, self.trace = seed, races, trace
        self.keep = keep  # the launches, and with them their arguments
        self.change = change  # of the PTX of a kernel, by name: the mutations of the tests
        self.memory = Memory()
        self.launches: list[Executed] = []
        self.count = 0
        self.traces: list[Trace] = []
        self._kernels = {} if kernels is None or change else kernels  # parsed, by their text

    def run(self, kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **triton_launch.OPTIONS, **meta)
        ptx, name = compiled.asm["ptx"], compiled.metadata.name
        if any(instruction in ptx for instruction in NOT_EXECUTED):
            raise NotExecutedError(f"{name} multiplies by {' or '.join(NOT_EXECUTED)}, which are not executed")
        parsed = self._kernels.get(ptx)
        if parsed is None:
            parsed = self._kernels[ptx] = Kernel(self.change(name, ptx) if self.change else ptx, name)
        named = dict(zip(kernel.arg_names, args, strict=False)) | meta
        values = packed(compiled, kernel.arg_names, named)
        # Behind the kernel's own parameters there are two pointers to scratch memory, which is not used.
        values += [ctypes.c_uint64(0) for _ in range(len(parsed.sizes) - len(values))]
        assert [ctypes.sizeof(x) for x in values] == parsed.sizes, f"{name}: {values} for {parsed.sizes}"
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        counts = parsed.launch(
            (programs, 1, 1), (32 * compiled.metadata.num_warps, 1, 1), compiled.metadata.shared, pointers,
            self.memory.ranges(x for x in named.values() if isinstance(x, Tensor)),
            seed=self.seed + self.count, races=self.races, trace=self.trace,
        )  # fmt: skip
        self.count += 1
        if self.trace:
            self.traces.append(trace())
        if self.keep:
            self.launches.append(Executed(name, compiled, parsed, programs, named, counts))

    def empty(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """torch.empty, whose result the executor expects a kernel to write before it is read."""

        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("dqn_fused._backends.triton"):
                self.memory.unwritten(x)
            return x

        return allocated


def packed(compiled: Any, names: list[str], given: dict[str, Any]) -> list[Any]:
    """The arguments of the compiled kernel, by its own signature: a constant has no parameter."""
    values = []
    for key, kind in compiled.src.signature.items():
        name = names[key] if isinstance(key, int) else key
        if kind == "constexpr":
            continue
        x = given[name]
        values.append(ctypes.c_uint64(x.data_ptr()) if kind.startswith("*") else C_TYPES[kind](x))
    return values


@contextmanager
def targeting(target: str) -> Iterator[None]:
    """Compile for a GPU that is not here. Each has its own device number, by which kernels are cached."""
    arch = int(target.removeprefix("sm_"))
    driver.set_active(StubDriver(2000 + arch, GPUTarget("cuda", arch, 32)))
    try:
        yield
    finally:
        if torch.cuda.is_available():
            driver.reset_active()


_KERNELS: dict[str, Kernel] = {}


@contextmanager
def executing(target: str, **options: Any) -> Iterator[Executor]:
    """Let the Triton backend serve CPU tensors by executing what it compiles for a target."""
    executor = Executor(kernels=_KERNELS, **options)
    with ExitStack() as stack:
        stack.enter_context(targeting(target))
        stack.enter_context(serving_cpu())
        for owner, name, value in (
            (triton_launch, "run", executor.run),
            (torch, "empty", executor.empty(torch.empty)),
            (torch, "empty_like", executor.empty(torch.empty_like)),
            (torch, "empty_strided", executor.empty(torch.empty_strided)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield executor


def why_not() -> str | None:
    """Why nothing can be executed here."""
    from bench.gpu_code.ptx import build

    if triton_launch.INTERPRETED:
        return "the interpreter replaces the compiler"
    try:
        build.engine()
    except (build.CannotBuildError, OSError) as error:
        return str(error)
    return None
