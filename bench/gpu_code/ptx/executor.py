"""Kernels of PTX, executed by the engine on the bytes of tensors."""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.gpu_code.ptx import build

MESSAGE = 4096  # bytes
CATEGORIES = (
    "integer", "float", "special", "convert", "select", "move", "matrix", "shuffle", "barrier", "control",
    "global_load", "global_store", "shared_load", "shared_store", "atomic", "other",
)  # fmt: skip
MEMORY = (
    "warps", "instructions", "load_bytes", "store_bytes", "load_sectors", "store_sectors", "wavefronts", "conflicts"
)  # fmt: skip
MOST_INSTRUCTIONS = 1_000_000_000  # of all warps of a launch, after which it is considered endless


class PtxError(RuntimeError):
    """An error that the executor found; the message names kernel, instruction and thread."""


Flags = np.ndarray[Any, np.dtype[np.uint8]]


class Range(NamedTuple):
    """Bytes of memory that a kernel may access; written has a flag for each byte, or is None if all are written."""

    address: int
    size: int
    written: Flags | None = None


class Counts(dict[str, int]):
    """MEMORY and CATEGORIES of a launch, or the sum of several."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts({name: x + other[name] for name, x in self.items()})


class Kernel:
    """One kernel of a PTX text."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        message = ctypes.create_string_buffer(MESSAGE)
        self.handle = library().ptx_parse(text.encode(), name.encode(), message, MESSAGE)
        if not self.handle:
            raise PtxError(message.value.decode(errors="replace"))
        weakref.finalize(self, library().ptx_free, ctypes.c_void_p(self.handle))
        sizes = (ctypes.c_int * 256)()
        count = library().ptx_parameters(ctypes.c_void_p(self.handle), sizes, len(sizes))
        self.sizes = list(sizes)[:count]

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        arguments: Any,
        ranges: Iterable[Range],
        seed: int = 0,
        races: bool = True,
        most_instructions: int = MOST_INSTRUCTIONS,
        trace: bool = False,
    ) -> Counts:
        """Run a grid of blocks; arguments is a C array of pointers, one a parameter.

        races: whether accesses are held against each other; 16 bytes of memory for each byte accessed.
        trace: whether trace() is to say afterwards how shared memory was accessed.
        """
        described: list[int] = []
        for address, size, written in ranges:
            described += [address, size, 0 if written is None else written.ctypes.data]
        message = ctypes.create_string_buffer(MESSAGE)
        values = (ctypes.c_uint64 * (len(MEMORY) + len(CATEGORIES)))()
        done = library().ptx_launch(
            ctypes.c_void_p(self.handle), (ctypes.c_uint32 * 6)(*grid, *block), shared, arguments,
            (ctypes.c_uint64 * max(1, len(described)))(*described), len(described) // 3,
            ctypes.c_uint64(seed), ctypes.c_uint64(most_instructions), races, trace, values, message, MESSAGE,
        )  # fmt: skip
        if not done:
            raise PtxError(message.value.decode(errors="replace"))
        return Counts(zip((*MEMORY, *CATEGORIES), values, strict=True))

    def line(self, instruction: int) -> int:
        """The line of the text that contains an instruction."""
        place = library().ptx_text(ctypes.c_void_p(self.handle), instruction).decode()
        return int(place.split(",")[0].removeprefix("line "))


class Trace(NamedTuple):
    """How the last launch accessed shared memory."""

    # (n, 6): block, warp, barriers of the block before, address, size, 0 for a load or else what identifies the bytes
    events: np.ndarray[Any, np.dtype[np.uint64]]
    barriers: np.ndarray[
        Any, np.dtype[np.uint64]
    ]  # (n, 2): block and instruction, in the order that a block passes them


def trace() -> Trace:
    """The trace of the last launch with trace=True."""

    def taken(which: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        count = ctypes.c_uint64()
        address = library().ptx_trace(which, ctypes.byref(count))
        if not count.value:
            return np.zeros((0, columns), np.uint64)
        words = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))
        return np.ctypeslib.as_array(words, (count.value, columns)).copy()

    return Trace(taken(0, 6), taken(1, 2))


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.engine()))
    loaded.ptx_parse.restype = ctypes.c_void_p
    loaded.ptx_launch.restype = ctypes.c_bool
    loaded.ptx_trace.restype = ctypes.c_void_p
    loaded.ptx_text.restype = ctypes.c_char_p
    return loaded


def extent(x: Tensor) -> tuple[int, int]:
    """Address and size of what a tensor spans, and up to 15 bytes behind it within its storage.

    A launch that reads 16 bytes at a time is given a view that begins at the boundary before the tensor, and so ends as
    much before its end.
    """
    storage = x.untyped_storage()
    if x.numel() == 0:
        return x.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    after = x.data_ptr() + (last + 1) * x.element_size() + 15
    return x.data_ptr(), min(after, storage.data_ptr() + storage.nbytes()) - x.data_ptr()


class Memory:
    """Which bytes of which tensors have been written: those of torch.empty begin unwritten.

    It keeps the storages, so that no address is given away while there are flags for it.
    """

    def __init__(self) -> None:
        self.flags: dict[int, tuple[torch.UntypedStorage, Flags]] = {}

    def unwritten(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.nbytes():
            self.flags[storage.data_ptr()] = storage, np.zeros(storage.nbytes(), np.uint8)

    def ranges(self, tensors: Iterable[Tensor]) -> list[Range]:
        """The memory that may be accessed through tensors; ranges that overlap become one."""
        spans: list[tuple[int, int, int]] = []  # first, after, storage
        for x in tensors:
            first, size = extent(x)
            if size:
                spans.append((first, first + size, x.untyped_storage().data_ptr()))
        merged: list[tuple[int, int, int]] = []
        for first, after, storage in sorted(spans):
            if merged and merged[-1][2] == storage and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], after), storage
            else:
                merged.append((first, after, storage))
        return [Range(first, after - first, self._written(first, storage)) for first, after, storage in merged]

    def _written(self, first: int, storage: int) -> Flags | None:
        found = self.flags.get(storage)
        return None if found is None else found[1][first - storage :]
