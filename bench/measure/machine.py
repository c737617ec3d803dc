"""What a figure depends on, for every row of every table."""

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def about(kind: str, device: str) -> dict[str, str | int]:
    """Device, threads and versions; device is "cpu" or "cuda"."""
    return {
        "kind": kind,
        "device": device_name(device),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _cpu()


def busy() -> str | None:
    """Whether other work takes the cores: an operation whose threads wait for one takes a hundred times as long.

    It need not be a large one: torch.max over a dimension asks for all threads even at 32 rows.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < cores / 4:
        return None
    return (
        f"the machine is busy: load {load:.1f} on {cores} cores; figures of operations on several threads will be off"
    )


def slug(name: str) -> str:
    """A device as the name of a folder: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed(package: str) -> str:
    """Version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def commit() -> str:
    """What git describes the source as; "unknown" without git or a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
