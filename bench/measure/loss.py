"""The loss family at the sizes people use, each provider against eager. One row a variant, size, dtype and provider."""

from statistics import median
from typing import NamedTuple

import torch

from bench.measure import cuda, machine
from bench.measure.gate import passed
from bench.measure.memory import peak_memory
from bench.measure.providers import FLOOR, Provider, floor, providers
from bench.measure.rlax_process import RlaxProcess
from bench.measure.timing import figures, interleaved, timer
from bench.measure.traffic import GIGA, least_bytes, matrix_bytes
from bench.measure.variants import VARIANTS, dtype_name, random_arguments
from bench.reporting.results import Row

SIZES = [
    (32, 4), (128, 2), (32, 6), (32, 18), (128, 18), (512, 15), (1024, 18), (16384, 18),
    (1024, 512), (4096, 1024), (256, 26702), (256, 50257), (64, 128256),
]  # fmt: skip
FAMILY_SIZES = [(32, 18), (1024, 512), (256, 26702)]
HALF_SIZES = [(32, 18), (16384, 18), (1024, 512), (256, 50257)]
QUICK_SIZES = [(128, 2), (32, 18), (1024, 512)]


class Work(NamedTuple):
    variant: str
    n: int
    A: int
    dtype: torch.dtype = torch.float32
    compiled: bool = True  # whether torch.compile takes part

    def __str__(self) -> str:
        return f"{self.variant} {self.n} x {self.A} {dtype_name(self.dtype)}"


def quick(device: str, variants: list[str]) -> list[Work]:
    work = [Work("dqn", n, A) for n, A in QUICK_SIZES]
    work += [Work(name, 32, 18, compiled=False) for name in VARIANTS if name != "dqn"]
    return [piece for piece in work if piece.variant in variants]


def full(device: str, variants: list[str]) -> list[Work]:
    """The most important first, in case the time does not suffice for all."""
    work = [Work("dqn", n, A) for n, A in SIZES]
    halves = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,)
    family = [Work(name, n, A) for name in VARIANTS if name != "dqn" for n, A in FAMILY_SIZES]
    half = [Work("dqn", n, A, dtype, compiled=device == "cpu") for dtype in halves for n, A in HALF_SIZES]
    return [piece for piece in work + half + family if piece.variant in variants]


def measure(work: Work, device: str, seconds: float, problems: list[str], rlax: RlaxProcess) -> list[Row]:
    torch._dynamo.reset()  # a compiled function keeps eight sizes, then goes eager
    variant, itemsize = VARIANTS[work.variant], work.dtype.itemsize
    batch = random_arguments(variant, work.n, work.A, work.dtype, device)
    found = passed(providers(work.variant, batch, device, work.compiled, rlax), work.dtype, work, problems)
    if not found:
        return []
    local = {name: provider for name, provider in found.items() if provider.elsewhere is None}
    peaks = {name: peak_memory(provider.call) for name, provider in local.items() if not provider.replays}
    size = least_bytes(variant, work.n, work.A, itemsize)
    sizes = dict.fromkeys(found, size) | {FLOOR: _floor_bytes(work, device, size)}
    found[FLOOR] = floor(variant, batch, size)
    times = interleaved({name: provider.timer for name, provider in found.items()}, seconds)
    on_device, graphs = _on_a_gpu(work, found, seconds, problems) if device == "cuda" else ({}, {})
    rows = []
    for name in found:
        measured = figures(times[name], times["eager"])
        # A replay does not include the host's time to issue the work.
        rate = {
            key: sizes[key] / (graphs[key] if name in graphs else median(times[key]) * 1e6) for key in (name, FLOOR)
        }
        rows.append(
            machine.about("loss", device)
            | {"variant": work.variant, "n": work.n, "A": work.A, "dtype": dtype_name(work.dtype), "provider": name}
            | measured._asdict()
            | {"device_us": on_device.get(name, ""), "graph_us": graphs.get(name, "")}
            | {"bytes": sizes[name], "gb_per_s": round(rate[name] * 1e6 / GIGA, 3)}
            | {"of_floor": float(f"{rate[name] / rate[FLOOR]:.4g}"), "peak_bytes": peaks.get(name, "")}
        )
    return rows


def _floor_bytes(work: Work, device: str, size: int) -> int:
    if device == "cuda":
        return size // 2 * 2
    matrices = dict.fromkeys(VARIANTS[work.variant].reads)
    itemsize = work.dtype.itemsize
    return sum(matrix_bytes(name, work.n, work.A, itemsize) for name in (*matrices, "gradient"))


def _on_a_gpu(
    work: Work, found: dict[str, Provider], seconds: float, problems: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """(microseconds in kernels, microseconds of a replay of the CUDA graph) by provider."""
    kernels: dict[str, float] = {}
    graphs = {}
    for name, provider in found.items():
        us = cuda.device_us(provider.call)
        if us is not None:
            kernels[name] = us
        if provider.capturable:
            try:
                graphs[name] = timer(cuda.captured(provider.call))
            except RuntimeError as error:
                problems.append(f"{name}, {work}, in a CUDA graph: {error}")
    if FLOOR not in graphs:
        return kernels, {}
    times = interleaved(graphs, seconds / 2, rounds=7)
    return kernels, {name: round(1e6 * median(values), 2) for name, values in times.items()}
