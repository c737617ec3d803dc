"""Times that survive a noisy machine: providers interleaved, medians of rounds, ratios within one round."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

Timer = Callable[[int], float]  # number of calls -> seconds for all of them


class Figures(NamedTuple):
    us: float
    us_p20: float
    us_p80: float
    speedup: float  # median over the rounds of base / this


def timer(call: Callable[[], object]) -> Timer:
    """Time a call in this process; on a GPU, until everything it has issued is done."""

    def run(repeats: int) -> float:
        _synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _synchronize()
        return time.perf_counter() - start

    return run


def interleaved(timers: Mapping[str, Timer], seconds: float = 0.5, rounds: int = 15) -> dict[str, list[float]]:
    """Seconds a call, one figure a round; in each round every provider runs for about seconds / rounds.

    Each round has an order of its own, the same in every run of the program. With an order that only alternates, every
    provider keeps its neighbours: one graph under two names was then 3 % apart (mean of five runs), and is now 1 %.
    """
    repeats = {name: max(1, int(seconds / rounds / _once(timer, seconds / rounds))) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(timers[name](repeats[name]) / repeats[name])
    return times


def figures(values: Sequence[float], base: Sequence[float]) -> Figures:
    """Median and spread of a provider's rounds, and how many times as fast as base it is."""
    low, middle, high = spread(values)
    ratio = median(b / v for b, v in zip(base, values, strict=True))
    return Figures(round(1e6 * middle, 2), round(1e6 * low, 2), round(1e6 * high, 2), round(ratio, 3))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 5], median(ordered), ordered[len(ordered) * 4 // 5]


def _once(timer: Timer, enough: float) -> float:
    """Seconds of one warm call: the least of a few, so that one hiccup does not decide how often it is repeated."""
    seconds = [timer(1)]
    while len(seconds) < 6 and sum(seconds) < 4 * enough:
        seconds.append(timer(1))
    return max(min(seconds), 1e-9)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
