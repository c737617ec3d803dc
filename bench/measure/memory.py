"""Bytes that a call allocates at its peak, beyond what was allocated before it."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object]) -> int:
    """Largest sum of live allocations of PyTorch's allocator during a call, results included; it has run before."""
    gc.collect()
    gc.disable()  # earlier garbage that is freed during the call would lower the sum
    try:
        return _peak_on_a_gpu(call) if torch.cuda.is_available() else _peak_on_the_cpu(call)
    finally:
        gc.enable()


def _peak_on_a_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_the_cpu(call: Callable[[], object]) -> int:
    with silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return peak


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's library writes two lines to file descriptor 2 each time."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
