"""csrc/cuda on CPU tensors: its own host code, over a CUDA runtime whose launches are executed.

The sources are compiled as they are, but for the name of the ops' library and the dispatch key that they register for.
"""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.library import Library

from bench.gpu_code.ptx import build
from bench.gpu_code.ptx.executor import Counts, Kernel, Memory, PtxError, Range
from bench.measure.machine import ROOT
from dqn_fused import _backends, _ops, node
from dqn_fused._backends import compiled_backend

LIBRARY = "dqn_fused_ptx"
SOURCES = ROOT / "csrc"
RUNTIME = Path(__file__).parent / "runtime" / "runtime.cpp"
INCLUDE = Path(torch.__file__).parent / "include"
# Headers first: behind the definition, CUDA stands for the CPU.
WRAPPER = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#define CUDA CPU
#include "{source}"
"""
OPS = tuple(name for name in _ops.NAMES if not name.startswith("triton_"))


class NotExecutedError(NotImplementedError):
    """Something that is left out by design."""


class Executed(NamedTuple):
    """A launch that has been executed."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    counts: Counts


def why_not() -> str | None:
    """Why csrc/cuda cannot be compiled here."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    return None if (SOURCES / "cuda").is_dir() else "no source tree"


@cache
def compiled(target: str) -> Path:
    """Folder with ops.so and the PTX of each source."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise build.CannotBuildError("no nvcc")
    arch = target.removeprefix("sm_")
    options = [
        f"-gencode=arch=compute_{arch},code=compute_{arch}", "-std=c++17", "-O3", "-DUSE_CUDA",
        f"-Ddqn_fused={LIBRARY}", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(INCLUDE),
        "-Xcompiler", "-fPIC",
    ]  # fmt: skip
    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    key = [build.run([nvcc, "--version"]), torch.__version__, *options, WRAPPER]

    def make(into: Path) -> None:
        objects = []
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            wrapper = into / source.name
            wrapper.write_text(WRAPPER.format(source=source))
            objects.append(str(into / f"{source.stem}.o"))
            command = [nvcc, "-c", "-keep", "-keep-dir", str(into), *options, str(wrapper), "-o", objects[-1]]
            build.run(command)
        link = ["-shared", "-fPIC", "-O1", "-Wl,-Bsymbolic", str(RUNTIME), *objects, "-L", str(INCLUDE.parent / "lib")]
        build.run([build.compiler(), *link, "-ltorch_cpu", "-lc10", "-ldl", "-o", str(into / "ops.so")])
        for path in into.iterdir():
            if path.suffix not in (".ptx", ".so"):
                path.unlink()

    contents = [path.read_bytes() for path in (*files, RUNTIME)]
    return build.once(f"cuda-{target}", [*(x.encode() for x in key), *contents], make)


class Executor:
    """Runs the ops of a library that has been compiled for a target, one for the whole process."""

    def __init__(self, target: str) -> None:
        folder = compiled(target)
        self.schemas = Library(LIBRARY, "FRAGMENT")
        for name in OPS:
            if not hasattr(getattr(torch.ops, LIBRARY), name):
                schema = str(getattr(_ops, name)._schema).replace("dqn_fused::", "")
                self.schemas.define(schema)
                self.schemas.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.ops.load_library(folder / "ops.so")
        self.library = ctypes.CDLL(str(folder / "ops.so"))
        self.texts = [path.read_text() for path in sorted(folder.glob("*.ptx"))]
        self.kernels: dict[str, Kernel] = {}
        self.launches: list[Executed] = []
        self.seed, self.races = 0, True
        self.error: BaseException | None = None
        self.memory = Memory()
        self.ranges: list[Range] = []
        of_launch = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_void_p
        )
        of_tensor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self.hooks = of_launch(self.launched), of_tensor(self.allocated)
        self.library.ptx_hooks(*self.hooks)

    def call(self, name: str) -> Callable[..., Any]:
        op = getattr(getattr(torch.ops, LIBRARY), name).default

        def called(*given: Any) -> Any:
            if any(isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in given):
                raise NotExecutedError("a batch of gradients, which PyTorch unpacks below the op, has no address")
            # As the dispatcher would: a tensor with a lazy minus sign is copied.
            args = [x.resolve_neg() if isinstance(x, Tensor) else x for x in given]
            self.ranges = self.memory.ranges(x for x in args if isinstance(x, Tensor))
            self.error = None
            try:
                result = op(*args)
            except RuntimeError:
                if self.error is not None:
                    raise self.error from None
                raise
            finally:
                self.library.ptx_release()
            for x in result if isinstance(result, tuple) else (result,):
                if x is not None:
                    self.check_written(name, x)
            return result

        return called

    def check_written(self, name: str, x: Tensor) -> None:
        """Every byte of an output, before it leaves."""
        for address, _, written in self.ranges:
            if written is not None and x.numel() and address == x.data_ptr() and not written.all():
                raise PtxError(f"{name}: byte {int(written.argmin())} of an output was never written")

    def allocated(self, address: int | None, size: int, fresh: int) -> None:
        if address and size:
            self.ranges.append(Range(address, size, np.zeros(size, np.uint8) if fresh else None))

    def launched(self, name: bytes, geometry: Any, shared: int, arguments: int) -> int:
        try:
            kernel = self.kernel(name.decode())
            grid, block = tuple(geometry[0:3]), tuple(geometry[3:6])
            counts = kernel.launch(
                grid, block, shared, ctypes.c_void_p(arguments), self.ranges,
                seed=self.seed + len(self.launches), races=self.races,
            )  # fmt: skip
            self.launches.append(Executed(name.decode(), grid, block, counts))
        except BaseException as error:  # it cannot pass through C++
            self.error = error
            return 999
        return 0

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            text = next(text for text in self.texts if f".entry {name}(" in text)
            self.kernels[name] = Kernel(text, name)
        return self.kernels[name]


@cache
def executor(target: str) -> Executor:
    return Executor(target)


@contextmanager
def executing(target: str, seed: int = 0, races: bool = True) -> Iterator[Executor]:
    """Let the ops of csrc/cuda serve CPU tensors in place of the compiled backend's."""
    one = executor(target)
    one.launches.clear()
    one.seed, one.races = seed, races
    refuses, cuda = compiled_backend.refuses, torch.device("cuda")
    ops = SimpleNamespace(**{name: one.call(name) for name in OPS})
    missing = _backends._missing

    def found(name: str) -> str | None:
        if name != "compiled":
            return missing(name)
        _backends._LOADED[name] = compiled_backend
        return None

    with (
        patch.object(compiled_backend, "_ops", ops),
        patch.object(compiled_backend, "_REASONS", {"cuda": None}),
        patch.object(compiled_backend, "CHECKS_CPU", False),
        patch.object(compiled_backend, "refuses", lambda device: refuses(cuda)),
        patch.object(_backends, "_missing", found),
        patch.dict(_backends._CHOSEN, clear=True),
        patch.object(node, "serves", set()),
    ):
        yield one
