"""The package as it is installed and documented: wheel, imports, backends, report, examples in docstrings."""

import doctest
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import dqn_fused
from dqn_fused import BackendUnavailableError, backends, fused_dqn_loss

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, away from the source tree."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=clean | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("name", ["dqn_fused", "dqn_fused.loss", "dqn_fused.reference", "dqn_fused._backends"])
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_public_names() -> None:
    for name in dqn_fused.__all__:
        assert getattr(dqn_fused, name).__doc__


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert dqn_fused.__version__ == version("dqn_fused")


def test_triton_stays_away_from_a_cpu_tensors_way() -> None:
    code = """
import sys, torch
before = "triton" in sys.modules
from dqn_fused import fused_dqn_loss
q = torch.zeros(2, 3, requires_grad=True)
fused_dqn_loss(q, torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2, 3)).backward()
print(before or "triton" not in sys.modules)
"""
    assert python(code) == "True"


def test_nothing_is_printed_at_import() -> None:
    assert python("import dqn_fused") == ""


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
    assert module.refuses(torch.device("cpu" if module.INTERPRETED else "cuda")) is None


def test_a_triton_whose_driver_does_not_start_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an image without a C compiler the first launch would fail; "auto" must find another road."""
    module = pytest.importorskip("dqn_fused._backends.triton_backend")

    class Driver:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.triton.runtime, "driver", Driver())
    assert module.unavailable() == "triton's driver does not start: Failed to find C compiler"


def test_report() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "dqn_fused"], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert f"torch      {torch.__version__}" in out
    for name in backends():
        assert f"backend    {name}: " in out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built the way pip install . builds it, in an environment of its own; without a network, in this one."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        subprocess.run([*command, "--no-build-isolation"], cwd=folder, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_kernels_and_no_top_level_kernels(wheel: Path) -> None:
    """A top-level package called kernels is Hugging Face's."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"dqn_fused", f"dqn_fused-{dqn_fused.__version__}.dist-info"}
    for name in ("kernels/td_loss.py", "kernels/launch.py", "_backends/triton_backend.py", "py.typed", "reference.py"):
        assert f"dqn_fused/{name}" in names


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Installed elsewhere than here, before this environment's own copy on the path."""
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
