"""What needs a GPU: CUDA graphs, and the time in kernels that the profiler reports."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.measure.memory import silent_stderr

WARM_UP = 3  # calls on a side stream before a capture, as the documentation of CUDA graphs has it


class Launch(NamedTuple):
    """A kernel, copy or fill, or on the CPU an operation, in one call."""

    name: str
    times: float
    us: float


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph: replays it and returns its results, which the next replay overwrites.

    The call must read and write the same tensors each time, and not synchronise.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def reduce_overhead(
    loss: Callable[..., Any], batch: dict[str, Any], step: Callable[..., Callable[[], tuple[Tensor, Tensor]]]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of torch.compile(mode="reduce-overhead"): Inductor's kernels in its own CUDA graphs."""
    run = step(torch.compile(loss, mode="reduce-overhead", dynamic=False), batch)

    def call() -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # the results of the call before may be overwritten
        return run()

    return call


def launches(call: Callable[[], object], device: str = "cuda", times: int = 10) -> list[Launch]:
    """What one call launches, a mean of `times` calls, the longest first; empty where the profiler sees no kernels."""
    for _ in range(WARM_UP):
        call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with silent_stderr(), profile(activities=activities) as recorded:
        for _ in range(times):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    counts: dict[str, int] = defaultdict(int)
    us: dict[str, float] = defaultdict(float)
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    for event in recorded.events():
        # An annotation appears on the device, too, with the duration of everything it covers.
        if event.device_type == wanted and not event.is_user_annotation:
            counts[event.name] += 1
            us[event.name] += event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
    found = [Launch(name, counts[name] / times, us[name] / times) for name in counts]
    return sorted(found, key=lambda launch: -launch.us)


def device_us(call: Callable[[], object]) -> float | None:
    """Microseconds in kernels, copies and fills of one call; None where the profiler sees none."""
    found = launches(call)
    return round(sum(launch.us for launch in found), 2) if found else None
