"""What a call of the Triton backend allocates and launches, kept for the next call of the same description.

Triton looks at each of some seventy arguments at every launch, which takes longer than everything else on the host.
What it finds, and what the launches are, follows from the description of a call: the dtypes, shapes, strides and
alignment of its tensors and the values of all other arguments. So the second call with the same description launches
what Triton compiled for the first one, as Triton would launch it.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter, mul
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from dqn_fused._backends import BackendUnavailableError, too_large

OLDEST, NEWEST = (3, 6), (3, 9)  # whose JITFunction.run is known
VERSION = tuple(int(x) for x in re.findall(r"\d+", triton.__version__)[:2])
KNOWN = OLDEST <= VERSION <= NEWEST and not knobs.runtime.interpret
ROCM = torch.version.hip is not None
MODES = attrgetter(*(x for x in ("instrumentation_mode", "fpsan_homomorphic_casts") if hasattr(knobs.compilation, x)))
INSPECTED = hasattr(knobs.runtime, "add_stages_inspection_hook")
ALIGNED = 16  # bytes: all that Triton asks of an address
STREAM = 3  # its place among what is passed to a launcher
MOST = 1024  # descriptions kept: non_final_mask alone makes one of each number of next states

Device = torch.device
Run = Callable[..., Any]  # kernel, programs, arguments; returns what was compiled
Build = Callable[["Program", Sequence[Any], Any], None]


def call(build: Build, names: Sequence[str], given: Sequence[Any], spec: Any, device: Device, run: Run) -> list[Any]:
    """Run what build puts into a program, on the current device, and return what the program returns.

    given are the arguments of a call, and names what build calls those that are tensors.
    """
    given, described, addresses = _described(given)
    state = _state()
    if state is not None:
        key = (build, spec, device, run, state, described)
        program = KEPT.get(key)
        if program is not None:
            return program.direct(given, addresses, device, run)
    program = Program(names)
    build(program, given, spec)
    results = program.ordinary(given, device, run)
    if state is not None and program.keep():
        if len(KEPT) >= MOST:
            KEPT.clear()
        KEPT[key] = program
    return results


KEPT: dict[Any, "Program"] = {}


def _state() -> tuple[Any, ...] | None:
    """The state outside the arguments that decides what is compiled; None where Triton must launch."""
    if not KNOWN:
        return None
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    if INSPECTED and runtime.add_stages_inspection_hook is not None:
        return None
    return driver.active, runtime.debug, MODES(knobs.compilation), ROCM and knobs.amd.use_buffer_ops


def _described(given: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...], list[int]]:
    """The arguments, their description, which contains numbers as they are, and the addresses of the tensors.

    An address does not carry the lazy minus sign of conj().imag: such tensors are copied.
    """
    read: list[Any] = []
    described: list[Any] = []
    addresses = []
    for x in given:
        if x is not None and isinstance(x, Tensor):
            if x.is_neg():
                x = x.resolve_neg()
            address = x.data_ptr()
            described.append((x.dtype, x.shape, x.stride(), address % ALIGNED))
            addresses.append(address)
        else:
            described.append(x)
            addresses.append(0)
        read.append(x)
    if ROCM:  # where offsets within a storage of less than 2 GiB are int32
        described += [x.untyped_storage().nbytes() >= 2**31 for x in read if isinstance(x, Tensor)]
    return read, tuple(described), addresses


def check_sizes(*sizes: int) -> None:
    """Refuse what the kernels cannot count."""
    reason = too_large(max(sizes))
    if reason is not None:
        raise BackendUnavailableError(f"backend 'triton' cannot serve: {reason}")


class Empty(NamedTuple):
    """A tensor that a launch fills."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # contiguous
    dtype: torch.dtype

    def make(self, tensors: Sequence[Any], device: Device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)  # 0.5 us less than empty


class Number(NamedTuple):
    """A number in memory."""

    value: float
    dtype: torch.dtype

    def make(self, tensors: Sequence[Any], device: Device) -> Tensor:
        return torch.full((), self.value, dtype=self.dtype, device=device)


class Moved(NamedTuple):
    """A tensor of the call whose pointer is moved back by some elements, within its storage."""

    slot: int
    shift: int

    def make(self, tensors: Sequence[Any], device: Device) -> Tensor:
        x = tensors[self.slot]
        return x.as_strided(x.shape, x.stride(), x.storage_offset() - self.shift)


class Launch:
    """A kernel, its programs and its arguments, of which those in slots are tensors."""

    def __init__(self, kernel: Any, programs: int, args: list[Any], slots: list[tuple[int, int]], meta: dict[str, Any]):
        self.kernel, self.programs, self.args, self.slots, self.meta = kernel, programs, args, slots, meta
        self.compiled: Any = None

    def ordinary(self, tensors: Sequence[Any], run: Run) -> None:
        """Let Triton launch it."""
        args = self.args.copy()
        for i, slot in self.slots:
            args[i] = tensors[slot]
        self.compiled = run(self.kernel, self.programs, *args, **self.meta)

    def keep(self) -> bool:
        """Prepare for direct launches; False if there can be none."""
        kernel, compiled = self.kernel, self.compiled
        if type(kernel) is not JITFunction or type(compiled) is not CompiledKernel:
            return False
        # As JITFunction.run passes it: grid, stream, no hooks, then all arguments, the constants among them.
        grid, about = (self.programs, 1, 1), (compiled.function, compiled.packed_metadata, None, None, None)
        constants = [self.meta[name] for name in kernel.arg_names[len(self.args) :]]
        self.launcher, self.passed = compiled.run, [*grid, None, *about, *self.args, *constants]
        self.passed_slots = [(i + STREAM + 1 + len(about), slot) for i, slot in self.slots]
        return True


class Program:
    """Allocations, then launches. Tensors have names, and slots by which they are found: the call's own come first."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.steps: list[Empty | Number | Moved] = []
        self.launches: list[Launch] = []
        self.results: list[int | None] = []  # slots

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> str:
        """Allocate a tensor."""
        strides = tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()
        return self._add(name, Empty(tuple(shape), strides, dtype))

    def number(self, value: float, dtype: torch.dtype) -> float | str:
        """A number as a kernel takes it: an argument arrives as float32, so for float64 arithmetic it is in memory."""
        return self._add(f"number {len(self.steps)}", Number(value, dtype)) if dtype is torch.float64 else value

    def moved(self, name: str, shift: int) -> str:
        """Move the pointer of a tensor back, if at all."""
        if shift == 0:
            return name
        return self._add(f"{name} moved", Moved(self.names.index(name), shift))

    def launch(self, kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        """Launch a kernel; an argument that is a string names a tensor."""
        check_sizes(programs)
        slots = [(i, self.names.index(x)) for i, x in enumerate(args) if isinstance(x, str)]
        self.launches.append(Launch(kernel, programs, list(args), slots, meta))

    def returns(self, *names: str | None) -> None:
        """Name what the call returns."""
        self.results = [None if name is None else self.names.index(name) for name in names]

    def _add(self, name: str, step: Empty | Number | Moved) -> str:
        self.names.append(name)
        self.steps.append(step)
        return name

    def ordinary(self, given: Sequence[Any], device: Device, run: Run) -> list[Any]:
        """Let Triton launch everything."""
        tensors = list(given)
        for step in self.steps:
            tensors.append(step.make(tensors, device))
        for launch in self.launches:
            launch.ordinary(tensors, run)
        self.aligned = not any(x.data_ptr() % ALIGNED for x in tensors[len(given) :])
        return self._returned(tensors)

    def keep(self) -> bool:
        """Prepare for direct launches; False if there can be none. Whether a pointer moves is not described."""
        if not self.aligned or any(isinstance(step, Moved) for step in self.steps):
            return False
        return all(launch.keep() for launch in self.launches)

    def direct(self, given: Sequence[Any], addresses: list[int], device: Device, run: Run) -> list[Any]:
        """Launch what is kept, on the current stream. Addresses take the place of tensors."""
        tensors, unaligned = [*given], 0
        for step in self.steps:
            x = step.make(tensors, device)
            address = x.data_ptr()
            unaligned |= address
            tensors.append(x)
            addresses.append(address)
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launch in self.launches:
            if unaligned % ALIGNED or launch.kernel.pre_run_hooks:
                launch.ordinary(tensors, run)
                continue
            passed = launch.passed.copy()
            passed[STREAM] = stream
            for i, slot in launch.passed_slots:
                passed[i] = addresses[slot]
            launch.launcher(*passed)
        return self._returned(tensors)

    def _returned(self, tensors: list[Any]) -> list[Any]:
        return [None if slot is None else tensors[slot] for slot in self.results]
