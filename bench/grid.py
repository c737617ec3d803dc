"""The loss family at the sizes people use, each road against eager in one run. One CSV row a variant, size and road."""

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bench.memory import peak_memory
from bench.providers import floor, steps
from bench.timing import interleaved
from bench.variants import VARIANTS, random_arguments

FAMILY_SIZES = [(32, 18), (1024, 512), (256, 26702)]
SIZES = [
    (32, 4), (128, 2), (32, 18), (128, 18), (1024, 18), (16384, 18),
    (1024, 512), (4096, 1024), (256, 26702), (64, 128256),
]  # fmt: skip


def machine(device: str) -> dict[str, str]:
    """What a figure depends on, in every row."""
    try:
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def check(results: dict[str, tuple[torch.Tensor, ...]]) -> None:
    """No figure without the right result: every road's loss and gradient equal eager's."""
    loss, grad = results["eager"]
    scale = grad.abs().max().item()
    for name, (other_loss, other_grad, *_) in results.items():
        try:
            torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-5 * scale)
        except AssertionError as error:
            raise AssertionError(f"{name} differs from eager: {error}") from error


def measure(variant: str, n: int, A: int, device: str, seconds: float) -> list[dict[str, Any]]:
    eager, matrices, options, _ = VARIANTS[variant]
    batch = random_arguments(VARIANTS[variant], n, A, torch.float32, device)
    calls = steps(device, batch, eager, **options)
    check({name: call() for name, call in calls.items()})
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    times = interleaved(calls | {"floor": floor(batch, *matrices)}, seconds)
    rows = []
    for name, values in times.items():
        ordered = sorted(values)
        rows.append(
            {
                "variant": variant,
                "n": n,
                "A": A,
                "dtype": "float32",
                "provider": name,
                "us": round(1e6 * median(ordered), 2),
                "us_p20": round(1e6 * ordered[len(ordered) // 5], 2),
                "us_p80": round(1e6 * ordered[len(ordered) * 4 // 5], 2),
                "speedup": round(median(e / t for e, t in zip(times["eager"], values, strict=True)), 2),
                "peak_bytes": peaks.get(name, ""),
            }
        )
    return rows


def run(out: Path, seconds: float, variants: Sequence[str]) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    rows = []
    work = [(variant, n, A) for variant in variants for n, A in (SIZES if variant == "dqn" else FAMILY_SIZES)]
    for variant, n, A in tqdm(work, desc="sizes"):
        torch._dynamo.reset()  # a compiled function keeps eight sizes, then goes eager
        rows += [about | row for row in measure(variant, n, A, device, seconds)]
    path = out / f"loss-{device}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for variant in variants:
        print(f"\n{variant}\n\n{table([row for row in rows if row['variant'] == variant])}")
    print(f"\n{about['device']}, {about['threads']} threads, torch {about['torch']}; written to {path}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds of forward and backward, how many times as fast as eager, and MB allocated at the peak."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    family = rows[0]["variant"] != "dqn"
    lines = ["| n x A | " + " | ".join(providers) + " |", "|---|" + "---:|" * len(providers)]
    by_size: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        by_size.setdefault((row["n"], row["A"]), {})[row["provider"]] = row
    for (n, A), found in by_size.items():
        cells = [cell(found[p], family) if p in found else "" for p in providers]
        lines.append(f"| {n} x {A} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any], memory: bool) -> str:
    text = f"{row['us']:,.0f} us ({row['speedup']:.2f}x)"
    peak = row["peak_bytes"]
    return f"{text}, {peak / 1e6:,.1f} MB" if memory and peak != "" and peak >= 1e5 else text
