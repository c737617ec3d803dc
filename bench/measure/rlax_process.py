"""rlax in a process of its own: in one process, the threads of JAX and of PyTorch compete for the cores."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bench.measure.machine import ROOT
from bench.measure.variants import GAMMA, Arguments


class RlaxProcess:
    """Starts with the first arguments; serves only the CPU, float32, and the losses that rlax has."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "RlaxProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process.wait()
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    @staticmethod
    def serves(variant: str, batch: Arguments) -> bool:
        q = batch["q"]
        wanted = variant in ("dqn", "double") and q.is_cpu and q.dtype is torch.float32
        return wanted and all(find_spec(name) is not None for name in ("jax", "rlax"))

    def load(self, variant: str, batch: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
        """Compile there for these arguments; returns what gives (loss, dq), computed once."""
        if not self.serves(variant, batch):
            raise ValueError(f"rlax has no {variant} loss for these tensors")
        import numpy as np

        arrays: dict[str, Any] = {name: x.detach().numpy() for name, x in batch.items()}
        arrays |= {"actions": arrays["actions"].astype(np.int32), "gamma": np.float32(GAMMA)}
        with tempfile.TemporaryDirectory() as folder:
            source, answer = Path(folder) / "in.npz", Path(folder) / "out.npz"
            np.savez(source, **arrays)
            self._ask(f"load\t{source}\t{answer}")
            with np.load(answer) as file:
                loss, grad = torch.from_numpy(file["loss"]), torch.from_numpy(file["grad"])
        return lambda: (loss, grad)

    def seconds(self, repeats: int) -> float:
        """Seconds of so many calls of what was loaded last."""
        return float(self._ask(f"run\t{repeats}"))

    def _ask(self, request: str) -> str:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.measure.rlax_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"rlax's process has ended: {process.wait()}")
        return answer
