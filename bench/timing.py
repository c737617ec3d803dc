"""Times that survive a noisy machine: providers interleaved, medians of rounds, ratios within one run."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float = 0.5, rounds: int = 15
) -> dict[str, list[float]]:
    """Seconds a call, one figure a round; in each round every provider runs for about seconds / rounds."""
    repeats = {name: max(1, int(seconds / rounds / _once(call))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            _synchronize()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def _once(call: Callable[[], object]) -> float:
    """Seconds of one call when warm."""
    for _ in range(3):
        call()
    times = []
    for _ in range(5):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
