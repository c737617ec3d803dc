"""Processes of torch.distributed for tests: what they import is imported once, and they run once in a run of pytest."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing

from bench.gpu_code.ptx.build import filled

# Imports are most of what such a process does. The server that all are forked from has no threads: it runs nothing.
PRELOADED = ["pytest", "numpy", "dqn_fused", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(PRELOADED)


def run_once(work: Callable[[int, int, str], None], ranks: int, run_folder: Path) -> Path:
    """Call work(rank, ranks, folder) in as many processes, once in a run; return the folder with their results."""

    def start(folder: Path) -> None:
        torch.multiprocessing.start_processes(work, (ranks, str(folder)), ranks, start_method=METHOD)

    return filled(run_folder / f"{work.__module__}-{ranks}", start)
