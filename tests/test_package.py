"""The package as it is installed and documented: wheel, imports, backends, report, examples in docstrings."""

import doctest
import importlib
import json
import os
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dqn_fused
from bench.gpu_code.ptx.build import filled
from dqn_fused import BackendUnavailableError, _backends, backends, fused_dqn_loss
from dqn_fused.__main__ import facts, report
from dqn_fused.head.sweep import Sweep

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, away from the source tree."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=clean | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "name", ["dqn_fused", "dqn_fused.loss", "dqn_fused.reference", "dqn_fused._backends", "dqn_fused._warmup"]
)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_an_unwritten_leaf_is_poisoned() -> None:
    """By the fixture that fills what torch.empty returns: filling a leaf that requires grad raised, in torch 2.10's
    Inductor too, which then failed to compile."""
    x = torch.empty(3, requires_grad=True)
    assert x.isnan().all()
    assert x.requires_grad


def test_public_names() -> None:
    for name in dqn_fused.__all__:
        assert getattr(dqn_fused, name).__doc__


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert dqn_fused.__version__ == version("dqn_fused")


@pytest.mark.parametrize(
    "name", ["arguments", "options", "quantile_arguments", "categorical_arguments", "autograd", "row_loss", "head.loss"]
)
def test_what_dynamo_traces_has_no_properties(name: str) -> None:
    """Those of a named tuple it does not trace in torch 2.10: the graph breaks, or with fullgraph=True raises."""
    module = importlib.import_module(f"dqn_fused.{name}")
    classes = [x for x in vars(module).values() if isinstance(x, type)]
    tuples = [x for x in classes if issubclass(x, tuple) and hasattr(x, "_fields")]
    assert tuples
    for each in tuples:
        assert not [field for field, value in vars(each).items() if isinstance(value, property)], each


def test_a_cpu_tensor_needs_no_triton_and_nothing_is_printed() -> None:
    code = """
import sys, torch
before = "triton" in sys.modules
from dqn_fused import fused_dqn_loss
q = torch.zeros(2, 3, requires_grad=True)
fused_dqn_loss(q, torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2, 3)).backward()
print(before or "triton" not in sys.modules)
"""
    assert python(code) == "True"


def test_without_triton_everything_else_works() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, dqn_fused
status = dqn_fused.backends()["triton"]
q = torch.zeros(2, 3, requires_grad=True)
arguments = (q, torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2, 3))
print(status.available, "triton" in status.reason, dqn_fused.fused_dqn_loss(*arguments).item())
try:
    dqn_fused.fused_dqn_loss(*arguments, backend="triton")
except dqn_fused.BackendUnavailableError as error:
    print(error)
"""
    lines = python(code).splitlines()
    assert lines[0] == "False True 1.0"
    assert lines[1].startswith("backend 'triton' cannot serve: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton serves here")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton serves here")
def test_a_named_backend_does_not_fall_back() -> None:
    pytest.importorskip("triton")
    status = backends()["triton"]
    assert not status.available
    assert "no CUDA or ROCm device" in status.reason
    with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot serve: no CUDA or ROCm device"):
        fused_dqn_loss(
            torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2, 3), backend="triton"
        )


def test_triton_refuses_a_device_that_is_not_its_own() -> None:
    module = pytest.importorskip("dqn_fused._backends.triton_backend")
    assert "got meta" in module.refuses(torch.device("meta"))
    assert module.refuses(torch.device("cpu" if module.triton_launch.INTERPRETED else "cuda")) is None


def test_a_triton_whose_driver_does_not_start_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an image without a C compiler the first launch would fail; "auto" must find another backend."""
    module = pytest.importorskip("dqn_fused._backends.triton_backend")

    class Driver:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(module.triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.triton.runtime, "driver", Driver())
    assert module.unavailable() == "triton's driver does not start: Failed to find C compiler"


@pytest.fixture
def triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Triton backend as on a machine with a GPU, whose launches do nothing."""
    module: ModuleType = pytest.importorskip("dqn_fused._backends.triton_backend")
    monkeypatch.setattr(module.triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(module.triton_launch, "on", lambda device: nullcontext())
    monkeypatch.setattr(module.triton_launch, "run", lambda *args, **meta: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    module._probe.cache_clear()
    yield module
    module._probe.cache_clear()


def test_a_triton_that_cannot_compile_is_not_chosen(
    triton_on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver starts, and the first kernel fails: asked once for each device, and not within a capture."""
    launches = []

    def run(*args: object, **meta: object) -> None:
        launches.append(args)
        raise RuntimeError("ptxas does not know sm_123")

    device = torch.device("cuda", 0)
    assert triton_on_cuda.refuses(device) is None
    triton_on_cuda._probe.cache_clear()
    monkeypatch.setattr(triton_on_cuda.triton_launch, "run", run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_on_cuda.refuses(device) is None
    assert not launches
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        reason = triton_on_cuda.refuses(device)
        assert reason == "triton cannot run a kernel on cuda:0: RuntimeError: ptxas does not know sm_123"
    assert len(launches) == 1
    assert triton_on_cuda.refuses(torch.device("cuda")) == reason, "the current device"
    assert len(launches) == 1


@pytest.mark.parametrize(
    "works", [("compiled", "triton", "torch"), ("triton", "torch"), ("compiled", "torch"), ("torch",)]
)
def test_the_choice_on_cuda(monkeypatch: pytest.MonkeyPatch, works: tuple[str, ...]) -> None:
    """Up to 64 actions the compiled backend, above them Triton, where they are available."""
    fakes = {
        name: SimpleNamespace(refuses=lambda device, name=name: None if name in works else "it does not")
        for name in _backends.MODULES
    }
    monkeypatch.setattr(_backends, "_missing", lambda name: None)
    monkeypatch.setattr(_backends, "_LOADED", fakes)
    monkeypatch.setattr(_backends, "_CHOSEN", {})
    device = torch.device("cuda", 0)
    names = {id(module): name for name, module in fakes.items()}
    narrow, wide = ("compiled", "triton", "torch"), ("triton", "compiled", "torch")
    for order, counts in ((narrow, (1, 64)), (wide, (65, 50_257, None))):
        expected = next(name for name in order if name in works)
        for actions in counts:
            assert names[id(_backends.choose("auto", device, actions))] == expected
            for name in _backends.MODULES:
                if name in works:
                    assert names[id(_backends.choose(name, device, actions))] == name
                else:
                    with pytest.raises(BackendUnavailableError, match="it does not"):
                        _backends.choose(name, device, actions)


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("family", ["quantile", "categorical"])
def test_the_choice_of_a_distributional_loss_on_cuda(
    monkeypatch: pytest.MonkeyPatch, family: str, serves: bool
) -> None:
    """Triton, else PyTorch's operations: the compiled ops of these losses are the CPU's."""
    reasons = {"compiled": None, "triton": None if serves else "it does not", "torch": None}
    fakes = {name: SimpleNamespace(refuses=lambda device, name=name: reasons[name]) for name in _backends.MODULES}
    monkeypatch.setattr(_backends, "_missing", lambda name: None)
    monkeypatch.setattr(_backends, "_LOADED", fakes)
    monkeypatch.setattr(_backends, "_CHOSEN_DISTRIBUTIONAL", {})
    device = torch.device("cuda", 0)
    assert _backends.choose_distributional(family, "auto", device, 8) is fakes["triton" if serves else "torch"]
    with pytest.raises(BackendUnavailableError, match=f"it has no {family} loss for tensors on cuda"):
        _backends.choose_distributional(family, "compiled", device, 8)
    if not serves:
        with pytest.raises(BackendUnavailableError, match="it does not"):
            _backends.choose_distributional(family, "triton", device, 8)


def test_more_atoms_than_a_program_of_triton_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^16 took the compiler a minute and 6 KB of stack a thread, 2^20 no end. Quantiles have no such limit."""
    fakes = {name: SimpleNamespace(refuses=lambda device: None) for name in _backends.MODULES}
    monkeypatch.setattr(_backends, "_missing", lambda name: None)
    monkeypatch.setattr(_backends, "_LOADED", fakes)
    monkeypatch.setattr(_backends, "_CHOSEN_DISTRIBUTIONAL", {})
    device = torch.device("cuda", 0)
    for _ in range(2):  # the second time from the memo
        for K, expected in ((16384, "triton"), (16385, "torch")):
            assert _backends.choose_distributional("categorical", "auto", device, K) is fakes[expected]
            assert _backends.choose_distributional("quantile", "auto", device, K) is fakes["triton"]
        assert _backends.choose_distributional("categorical", "triton", device, 16384) is fakes["triton"]
        with pytest.raises(BackendUnavailableError, match="up to 16384 atoms, got 16385"):
            _backends.choose_distributional("categorical", "triton", device, 16385)


def test_auto_leaves_batches_that_triton_cannot_count_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("dqn_fused.kernels.launch")
    fakes = {name: SimpleNamespace(refuses=lambda device: None) for name in _backends.MODULES}
    monkeypatch.setattr(_backends, "_missing", lambda name: None)
    monkeypatch.setattr(_backends, "_LOADED", fakes)
    monkeypatch.setattr(_backends, "_CHOSEN", {})
    monkeypatch.setattr(_backends, "_CHOSEN_DISTRIBUTIONAL", {})
    device, most = torch.device("cuda", 0), launch.MOST
    for _ in range(2):  # the second time from the memo
        for n, large in ((most, False), (most + 1, True)):
            assert _backends.choose("auto", device, 65, n) is fakes["compiled" if large else "triton"]
            assert _backends.choose("auto", device, n, 1) is fakes["compiled" if large else "triton"]
            expected = fakes["torch" if large else "triton"]
            assert _backends.choose_distributional("categorical", "auto", device, 8, n) is expected
            assert _backends.choose_distributional("quantile", "auto", device, 8, n) is expected
            assert _backends.choose_distributional("quantile", "auto", device, n, 1) is expected
    with pytest.raises(BackendUnavailableError, match=f"up to {most} samples, .* got {most + 1}"):
        _backends.choose_distributional("quantile", "triton", device, 8, most + 1)


def test_the_sweep_leaves_layers_that_it_cannot_count() -> None:
    module = pytest.importorskip("dqn_fused._backends.triton_sweep")
    most = pytest.importorskip("dqn_fused.kernels.launch").MOST
    weight = torch.empty(2, 1, device="meta")
    for m, served in ((most, True), (most + 1, False)):
        work = Sweep(torch.empty(m, 1, device="meta"), weight, None, None, "soft", 1.0)
        assert module.pays(work) == served
    with pytest.raises(BackendUnavailableError, match=f"got {most + 1}"):
        module.sweep(work)


def test_a_choice_within_a_capture_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a capture Triton is taken untried; afterwards it is tried."""
    reasons: dict[str, str | None] = {"compiled": "not built", "triton": None, "torch": None}
    fakes = {name: SimpleNamespace(refuses=lambda device, name=name: reasons[name]) for name in _backends.MODULES}
    monkeypatch.setattr(_backends, "_missing", lambda name: None)
    monkeypatch.setattr(_backends, "_LOADED", fakes)
    monkeypatch.setattr(_backends, "_CHOSEN", {})
    device = torch.device("cuda", 0)
    monkeypatch.setattr(_backends, "capturing", lambda: True)
    assert _backends.choose("auto", device, 4) is fakes["triton"]
    reasons["triton"] = "it cannot compile"
    monkeypatch.setattr(_backends, "capturing", lambda: False)
    assert _backends.choose("auto", device, 4) is fakes["torch"]


def test_the_sweep_without_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has none of before compute capability 8.0: the library, which has them, multiplies halves there."""
    module = pytest.importorskip("dqn_fused._backends.triton_sweep")
    monkeypatch.setattr(torch.version, "hip", None)
    device = SimpleNamespace(type="cuda")
    for capability, cores in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert module._tensor_cores(device) == cores

    def pays(D: int, dtype: torch.dtype) -> bool:
        hidden, weight = (torch.empty(size, D, dtype=dtype, device="meta") for size in (1024, 10**5))
        return bool(module.pays(Sweep(hidden, weight, None, None, "max", 1.0)))

    monkeypatch.setattr(module, "_tensor_cores", lambda device: False)
    for dtype in (torch.float16, torch.bfloat16):
        assert not pays(64, dtype)
    assert pays(24, torch.float32)
    assert not pays(40, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_precision", lambda: "tf32")
        assert not pays(40, torch.float32), "the library multiplies float32 there as it is"


def test_report() -> None:
    """As text and as JSON, for a program: the same facts."""
    command, environment = [sys.executable, "-m", "dqn_fused"], {**os.environ, "DQN_FUSED_CHECK": "1"}
    run = partial(subprocess.run, cwd="/", capture_output=True, text=True, check=True, env=environment)
    found = json.loads(run([*command, "--json"]).stdout)
    assert found["dqn_fused"] == dqn_fused.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["backends"] == {name: status._asdict() for name, status in backends().items()}
    assert found["environment"]["DQN_FUSED_CHECK"] == "1"
    text = run(command).stdout.strip()
    assert text == report(found)
    assert f"torch      {torch.__version__}" in text
    for name in backends():
        assert f"backend    {name}: " in text


def test_report_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    found = facts()
    assert found["devices"] == [{"device": "cuda:0", "name": "a GPU", "compute_capability": "9.0"}]
    assert "cuda:0     a GPU, compute capability 9.0" in report(found)


@pytest.fixture(scope="module")
def wheel(run_folder: Path) -> Path:
    """A wheel built the way pip install . builds it, in an environment of its own; without a network, in this one.

    That environment has no torch, so nothing is compiled in either.
    """

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            pure = {**os.environ, "DQN_FUSED_BUILD": "0"}
            subprocess.run([*command, "--no-build-isolation"], cwd=folder, check=True, env=pure)

    (path,) = filled(run_folder / "wheel", make).glob("*.whl")
    return path


def test_wheel_holds_the_kernels_and_no_top_level_kernels(wheel: Path) -> None:
    """A top-level package called kernels is Hugging Face's."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"dqn_fused", f"dqn_fused-{dqn_fused.__version__}.dist-info"}
    for name in ("kernels/td_loss.py", "kernels/launch.py", "_backends/triton_backend.py", "py.typed", "reference.py"):
        assert f"dqn_fused/{name}" in names


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Installed in another folder, which is on the path before this environment's own copy."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True)
    code = """
import torch, dqn_fused, dqn_fused.kernels.launch
q = torch.ones(2, 3, requires_grad=True)
dqn_fused.fused_dqn_loss(q, torch.tensor([0, 2]), torch.zeros(2), torch.zeros(2, 3)).backward()
print(dqn_fused.__file__, q.grad.sum().item())
"""
    path, total = python(code, PYTHONPATH=str(tmp_path)).split()
    assert Path(path).is_relative_to(tmp_path)
    assert total == "2.0"
