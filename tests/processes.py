"""Processes of torch.distributed for tests: what they import is imported once, and they run once in a run of pytest."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing
from filelock import FileLock  # which torch requires

# Imports are most of what such a process does. The server that all are forked from has no threads: it runs nothing.
PRELOADED = ["pytest", "numpy", "dqn_fused", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(PRELOADED)


def run_once(work: Callable[[int, int, str], None], ranks: int, factory: pytest.TempPathFactory) -> Path:
    """Call work(rank, ranks, folder) in as many processes; return the folder that their results are in.

    The workers of pytest-xdist share the results: the first that asks starts the processes, the others wait for them.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / f"{work.__module__}-{ranks}"
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            torch.multiprocessing.start_processes(work, (ranks, str(folder)), ranks, start_method=METHOD)
            done.touch()
    return folder
