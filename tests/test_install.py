"""What pip installs: pure Python where nothing can be compiled, and never a failure that was not asked for."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dqn_fused.node import file_name

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "c++")
WHEEL = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-cache-dir", "-v", "-w"]

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without anything built."""
    ignore = shutil.ignore_patterns(".*", "*.so", "build", "dist", "out", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignore))


def build(tree: Path, *options: str, **environment: str) -> tuple[str, list[str], str]:
    """(file name, contents, log) of the wheel of a source tree."""
    out = tree.parent / "wheels"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DQN_FUSED", "CUDA"))}
    result = subprocess.run(
        [*WHEEL, str(out), *options, str(tree)], capture_output=True, text=True, env=env | environment, cwd=tree.parent
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as file:
        return wheel.name, file.namelist(), log


def without_optimisation(folder: Path) -> str:
    """A compiler that takes half the time: these tests look at the wheel, and others at what the library computes."""
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which(CXX)} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def libraries(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".so")]


def test_isolated_wheel_is_pure(tree: Path) -> None:
    """As in pip's isolated build, torch cannot be imported. The build's own requirement comes from this environment."""
    blocked = tree.parent / "blocked" / "torch"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('isolated')")
    name, names, log = build(tree, "--no-build-isolation", PYTHONPATH=str(blocked.parent))
    assert name.endswith("-py3-none-any.whl")
    assert libraries(names) == []
    assert {"dqn_fused/py.typed", "dqn_fused/kernels/td_loss.py"} <= set(names)
    assert log.count("library is left out: torch cannot be imported") >= 1


def test_nothing_is_built_where_it_is_not_wanted(tree: Path) -> None:
    name, names, log = build(tree, "--no-build-isolation", DQN_FUSED_BUILD="0")
    assert name.endswith("-py3-none-any.whl")
    assert libraries(names) == []
    assert "left out" not in log


def test_a_failing_compiler_is_survived(tree: Path) -> None:
    name, names, log = build(tree, "--no-build-isolation", CXX="/bin/false", CC="/bin/false", DQN_FUSED_BUILD="auto")
    assert name.endswith("-py3-none-any.whl")
    assert libraries(names) == []
    assert "the cpu library is left out: it does not compile" in log


@pytest.mark.parametrize(
    "environment", [{"DQN_FUSED_BUILD": "cpu", "CXX": "/bin/false", "CC": "/bin/false"}, {"DQN_FUSED_BUILD": "tpu"}]
)
def test_what_was_asked_for_by_name_is_built_or_an_error(tree: Path, environment: dict[str, str]) -> None:
    with pytest.raises(
        AssertionError, match=r"library is left out: it does not compile|expected auto, 0, or one or more of"
    ):
        build(tree, "--no-build-isolation", **environment)


def test_an_nvcc_of_another_cuda_is_left_out(tree: Path) -> None:
    """A script that answers as the nvcc of CUDA 1 would; with a torch without CUDA there is nothing to build for."""
    nvcc = tree.parent / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 1.0, V1.0"\necho "#$ TOP=/nowhere" >&2\n')
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    _, _, log = build(tree, "--no-build-isolation", PATH=path, CXX="/bin/false", CC="/bin/false")
    assert "the cuda library is left out: " in log
    assert "nvcc is of CUDA 1 and torch of" in log or "this torch has no CUDA" in log


@pytest.mark.processes
@pytest.mark.skipif(shutil.which(CXX) is None, reason="no compiler")
def test_a_wheel_with_the_cpu_library(tree: Path) -> None:
    """The library knows no Python: one wheel serves every version."""
    name, names, _ = build(tree, "--no-build-isolation", DQN_FUSED_BUILD="cpu", CXX=without_optimisation(tree.parent))
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert libraries(names) == ["dqn_fused/_C_cpu.so"]
    target = tree.parent / "target"
    (wheel,) = (tree.parent / "wheels").iterdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
    )
    code = "import dqn_fused; print(dqn_fused.__file__, dqn_fused.backends()['compiled'].available)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(target)}, cwd=target,
    )  # fmt: skip
    assert result.stdout.split() == [str(target / "dqn_fused" / "__init__.py"), "True"]


@pytest.mark.processes
@pytest.mark.skipif(shutil.which(CXX) is None, reason="no compiler")
def test_a_wheel_with_the_node_is_for_one_python(tree: Path) -> None:
    compiler = without_optimisation(tree.parent)
    name, names, _ = build(tree, "--no-build-isolation", DQN_FUSED_BUILD="autograd", CXX=compiler)
    assert libraries(names) == [f"dqn_fused/{file_name()}"]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in name
