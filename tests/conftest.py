"""The settings that can run here; torch.empty filled with NaN, so that an element that is never written shows."""

import importlib
import importlib.util
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from data import SEED

from dqn_fused import node
from dqn_fused._backends import DISTRIBUTIONAL, serving

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; their threads would wait for each other
    torch.set_num_threads(1)

# Behind the installed package: bench/ and examples/ are imported from the source tree.
sys.path.append(str(Path(__file__).parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# PTX executed on the CPU (bench/gpu_code/ptx) by an engine that g++ builds.
EXECUTED = not INTERPRETED and shutil.which("g++") is not None
CUDA_SOURCES = shutil.which("nvcc") is not None and (Path(__file__).parents[1] / "csrc/cuda").is_dir()
PTX_TARGETS = ("sm_75", "sm_80", "sm_90", "sm_120")
# Tests of torch's graphs and memory rather than of kernels; the executor itself allocates memory.
NOT_ON_PTX = ("memory", "compile", "graph", "batched")
# Of the slow cases one in so many is run by default; --sample=1 runs all of them.
SAMPLE = {
    "ptx": 60, "interpret": 8, "aot": 24, "graph": 12, "processes": 3, "opcheck": 4, "executor": 4, "product": 3,
    "without_node": 4,
}  # fmt: skip
# Which one: .ci/run takes it from the commit, so that the commits together run every case.
SAMPLED = int(os.environ.get("DQN_FUSED_TEST_SAMPLE", SEED))

# Where the tests of Triton's kernels themselves run: in the interpreter, on a GPU, or on executed PTX.
_GPU = torch.cuda.is_available() and not INTERPRETED
TRITON_DEVICE = "cuda" if _GPU else "cpu"
TRITON_MARK = pytest.mark.interpret if INTERPRETED else pytest.mark.ptx if EXECUTED and not _GPU else pytest.mark.gpu


class Setting(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str


def _settings() -> list[object]:
    settings = []
    for name in serving(torch.device("cpu")):
        if name == "triton":
            settings.append(pytest.param(Setting(name, "cpu"), id="triton-interpreter", marks=pytest.mark.interpret))
        else:
            settings.append(pytest.param(Setting(name, "cpu"), id=f"{name}-cpu"))
    if node.MODULE is not None:  # the same without the node in C++
        settings.append(
            pytest.param(Setting("compiled", "cpu"), id="compiled-cpu-python", marks=pytest.mark.without_node)
        )
    if EXECUTED and importlib.util.find_spec("triton") is not None:
        settings.append(pytest.param(Setting("triton", "cpu"), id="triton-ptx", marks=pytest.mark.ptx))
    if EXECUTED and CUDA_SOURCES:
        settings.append(pytest.param(Setting("compiled", "cpu"), id="cuda-ptx", marks=pytest.mark.ptx("cuda")))
    if _GPU:
        for name in serving(torch.device("cuda")):
            settings.append(pytest.param(Setting(name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu))
    return settings


def distributional_settings(family: str) -> list[Any]:
    """The settings that serve a family of distributional losses."""
    settings = [
        pytest.param(Setting(name, "cpu"), id=f"{name}-cpu")
        for name in serving(torch.device("cpu"), family)
        if name != "triton"
    ]
    if node.MODULE is not None:  # as in _settings
        settings.append(
            pytest.param(Setting("compiled", "cpu"), id="compiled-cpu-python", marks=pytest.mark.without_node)
        )
    if "triton" in DISTRIBUTIONAL[family]:
        if INTERPRETED:
            settings.append(
                pytest.param(Setting("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpret)
            )
        elif EXECUTED and importlib.util.find_spec("triton") is not None:
            settings.append(pytest.param(Setting("triton", "cpu"), id="triton-ptx", marks=pytest.mark.ptx))
    if _GPU:
        for name in serving(torch.device("cuda"), family):
            settings.append(pytest.param(Setting(name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu))
    return settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        metafunc.parametrize("setting", _settings())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=0, help="take one of so many slow cases, 1 for all of them")
    parser.addoption("--one-in", type=int, default=1, help="take one of so many of all cases")
    parser.addoption("--ptx-target", choices=PTX_TARGETS, help="GPU that PTX is compiled for; default: by case")


def pytest_report_header() -> str:
    return f"DQN_FUSED_TEST_SAMPLE={SAMPLED} DQN_FUSED_TEST_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any("::" in argument for argument in config.args)
    every = 1 if by_name else config.getoption("--sample")
    one_in = 1 if by_name else config.getoption("--one-in")
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (kept if _taken(item, every, one_in) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


def _taken(item: pytest.Item, every: int, one_in: int) -> bool:
    marks = {mark.name for mark in item.iter_markers()} & SAMPLE.keys()
    if "ptx" in marks and any(word in item.name for word in NOT_ON_PTX):
        return False
    sizes = [one_in, *(every or SAMPLE[mark] for mark in marks)]
    return all((_number(item) - SAMPLED) % size == 0 for size in sizes)


def _number(item: pytest.Item) -> int:
    """A number of the case, the same in every run: it decides when the case is sampled, its target and its schedule."""
    return zlib.crc32(item.nodeid.encode())


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share, for what takes long to make: see build.filled."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed what a test draws without a generator of its own."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, or with a large number where there is no NaN."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: object, **kwargs: object) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            if x.numel() and not torch.compiler.is_compiling():
                with torch.no_grad():  # Inductor of torch 2.10 makes leaves that require grad
                    x.fill_(torch.nan if x.is_floating_point() else 99)
            return x

        return allocated

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forget what was compiled before, and count the graphs from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def without_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record losses by autograd.TDLoss, not by the node in C++, in the cases that are marked so."""
    if request.node.get_closest_marker("without_node") is not None:
        monkeypatch.setattr(node, "serves", set())


@pytest.fixture(autouse=True)
def fast_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let numpy take maxima: the interpreter calls Python for each element of a reduction that it does not know.

    Not in the tests about NaN that counts, where numpy would hide a maximum that drops it.
    """
    if not INTERPRETED or ("nan" in request.node.name and "terminated_row" not in request.node.name):
        return
    from dqn_fused.kernels.rows import nan_max

    operations = importlib.import_module("triton.runtime.interpreter").ReduceOps
    reduce = operations.apply_impl

    def apply(self: Any, x: Any) -> Any:
        return self.min_max(x[0], np.max) if self.combine_fn is nan_max else reduce(self, x)

    monkeypatch.setattr(operations, "apply_impl", apply)


@pytest.fixture(autouse=True)
def execute_ptx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[None]:
    """Serve CPU tensors, in the cases marked ptx, by executing what is compiled for a GPU: Triton's, or csrc/cuda.

    What the test has patched is restored first: pytest does it last, and would bring back what is patched here.
    """
    marker = request.node.get_closest_marker("ptx")
    if marker is None:
        yield
        return
    number = _number(request.node)
    target = request.config.getoption("--ptx-target") or PTX_TARGETS[number // SAMPLE["ptx"] % len(PTX_TARGETS)]
    if marker.args == ("cuda",):
        from bench.gpu_code.ptx import cuda

        target = request.config.getoption("--ptx-target") or "sm_90"  # nvcc takes 20 s a target
        with cuda.executing(target, seed=number):
            yield
            monkeypatch.undo()
    else:
        from bench.gpu_code.ptx import triton

        with triton.executing(target, seed=number, keep=False):
            yield
            monkeypatch.undo()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Skip what the executor leaves out by design: wgmma and tcgen05."""
    try:
        return (yield)
    except NotImplementedError as error:
        if pyfuncitem.get_closest_marker("ptx") is not None and type(error).__name__ == "NotExecutedError":
            pytest.skip(str(error))
        raise
