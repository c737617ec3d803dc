"""The loss at the sizes people use, each road against eager in one run. One CSV row a size and road."""

import csv
import os
import platform
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bench.providers import Batch, floor, random_batch, steps
from bench.timing import interleaved

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


def check(results: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """No figure without the right result: every road's loss and gradient equal eager's."""
    loss, grad = results["eager"]
    for name, (other_loss, other_grad) in results.items():
        try:
            torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-7)
        except AssertionError as error:
            raise AssertionError(f"{name} differs from eager: {error}") from error


def measure(batch: Batch, device: str, seconds: float) -> list[dict[str, Any]]:
    calls = steps(device, batch)
    check({name: call() for name, call in calls.items()})
    times = interleaved(calls | {"floor": floor(batch)}, seconds)
    rows = []
    for name, values in times.items():
        ordered = sorted(values)
        rows.append(
            {
                "n": batch.q.shape[0],
                "A": batch.q.shape[1],
                "dtype": str(batch.q.dtype).removeprefix("torch."),
                "provider": name,
                "us": round(1e6 * median(ordered), 2),
                "us_p20": round(1e6 * ordered[len(ordered) // 5], 2),
                "us_p80": round(1e6 * ordered[len(ordered) * 4 // 5], 2),
                "speedup": round(median(e / t for e, t in zip(times["eager"], values, strict=True)), 2),
            }
        )
    return rows


def run(out: Path, seconds: float) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    rows = []
    for n, A in tqdm(SIZES, desc="sizes"):
        torch._dynamo.reset()  # a compiled function keeps eight sizes, then goes eager
        rows += [about | row for row in measure(random_batch(n, A, torch.float32, device), device, seconds)]
    path = out / f"loss-{device}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(f"\n{about['device']}, {about['threads']} threads, torch {about['torch']}; written to {path}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds of forward and backward, and how many times as fast as eager."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| n x A | " + " | ".join(providers) + " |", "|---|" + "---:|" * len(providers)]
    by_size: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        by_size.setdefault((row["n"], row["A"]), {})[row["provider"]] = row
    for (n, A), found in by_size.items():
        cells = [f"{found[p]['us']:,.0f} us ({found[p]['speedup']:.2f}x)" if p in found else "" for p in providers]
        lines.append(f"| {n} x {A} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
