"""Processes of torch.distributed for tests: what they import is imported once, and they run once in a run of pytest."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing
from filelock import FileLock  # which torch requires

# Imports are most of what such a process does: a server has done them, and all processes are forked from it.
PRELOADED = ["pytest", "numpy", "dqn_fused", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(PRELOADED)


def start_server() -> None:
    """Start the server, which must not have threads: they would be missing in what is forked."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENBLAS_NUM_THREADS", "1")  # numpy's
            forkserver.ensure_running()


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
            start_server()
            torch.multiprocessing.start_processes(work, (ranks, str(folder)), ranks, start_method=METHOD)
            done.touch()
    return folder
