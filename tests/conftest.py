"""Which roads run here, and torch.empty poisoned with NaN so that an element nobody wrote shows."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from data import SEED

from dqn_fused._backends import serving

# Behind the installed package: bench/ and examples/ are imported from the source tree.
sys.path.append(str(Path(__file__).parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Road(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str


def _roads() -> list[object]:
    roads = []
    for name in serving(torch.device("cpu")):
        if name == "triton":
            roads.append(pytest.param(Road(name, "cpu"), id="triton-interpreter", marks=pytest.mark.interpret))
        else:
            roads.append(pytest.param(Road(name, "cpu"), id=f"{name}-cpu"))
    if torch.cuda.is_available() and not INTERPRETED:
        for name in serving(torch.device("cuda")):
            roads.append(pytest.param(Road(name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu))
    return roads


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "road" in metafunc.fixturenames:
        metafunc.parametrize("road", _roads())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, or with a large number where there is no NaN."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        x = empty(*args, **kwargs)  # type: ignore[call-overload]
        if x.numel() and not torch.compiler.is_compiling():
            x.fill_(torch.nan if x.is_floating_point() else 99)
        return x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def fast_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let numpy take maxima: the interpreter calls Python for each element of a reduction that it does not know.

    Not in the tests about NaN, where numpy would hide a maximum that drops it.
    """
    if not INTERPRETED or "nan" in request.node.name:
        return
    from dqn_fused.kernels.rows import nan_max

    operations = importlib.import_module("triton.runtime.interpreter").ReduceOps
    reduce = operations.apply_impl

    def apply(self: Any, x: Any) -> Any:
        return self.min_max(x[0], np.max) if self.combine_fn is nan_max else reduce(self, x)

    monkeypatch.setattr(operations, "apply_impl", apply)
