"""What a release needs: one version, a wheel for every torch and Python, workflows that call what the Makefile has."""

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import setuptools.command.bdist_wheel  # what setup.py imports, before a test says that this is another platform
import torch
from packaging.requirements import Requirement

import dqn_fused

ROOT = Path(__file__).parents[1]
SYMBOLS = ROOT / "tools/symbols.py"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CXX = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(not SYMBOLS.exists(), reason="no source tree")
reads_elf = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, (CXX, "nm", "readelf"))), reason="no compiler for Linux"
)


def symbols(library: Path) -> tuple[int, str]:
    command = [sys.executable, str(SYMBOLS), str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode, result.stdout.strip()


@reads_elf
def test_the_cpu_library_asks_for_the_stable_abi_alone() -> None:
    library = Path(dqn_fused.__file__).parent / "_C_cpu.so"
    if not library.exists():
        pytest.skip("not built")
    code, out = symbols(library)
    assert code == 0, out
    assert re.fullmatch(r".*_C_cpu\.so: \d\d symbols, all of the stable ABI", out)


@reads_elf
def test_what_not_every_torch_has_is_named(tmp_path: Path) -> None:
    """Of Python, of C++, of a torch later than the oldest, and c10, which exports parts of std::."""
    (tmp_path / "ask.cpp").write_text("""
        namespace at { int get_num_threads(); }
        extern "C" {
        int torch_get_num_threads(unsigned*);
        const char* torch_exception_get_what();
        long PyLong_AsLong(void*);
        long ask(unsigned* n) {
          return torch_get_num_threads(n) + *torch_exception_get_what() + PyLong_AsLong(n) + at::get_num_threads();
        }
        }
    """)
    library, torch_libraries = tmp_path / "ask.so", str(Path(torch.__file__).parent / "lib")
    link = ["-L", torch_libraries, "-Wl,--no-as-needed", "-lc10"]
    command = [CXX, "-shared", "-fPIC", str(tmp_path / "ask.cpp"), "-o", str(library), *link]
    subprocess.run(command, check=True)
    code, out = symbols(library)
    assert code == 1
    names = out.partition(": ")[2].split(", ")
    assert names == ["PyLong_AsLong", "_ZN2at15get_num_threadsEv", "torch_exception_get_what", "libc10.so"]


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setup(monkeypatch: pytest.MonkeyPatch, platform: str, mode: str) -> list[Any]:
    """Extensions that setup.py would build."""
    called: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: called.update(arguments))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("DQN_FUSED_BUILD", mode)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return list(called["ext_modules"])


def test_the_library_is_compiled_for_the_torch_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    (extension,) = setup(monkeypatch, sys.platform, "cpu")
    assert f"-DTORCH_TARGET_VERSION={module_of(SYMBOLS).TARGET}" in extension.extra_compile_args["cxx"]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_elsewhere_nothing_is_built_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str
) -> None:
    assert setup(monkeypatch, platform, "auto") == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dqn_fused: the compiled library is left out: it is tested on Linux only; ")


def test_what_is_asked_for_by_name_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"the cpu library is left out: .*; the torch backend serves"):
        setup(monkeypatch, "win32", "cpu")
    assert [extension.name for extension in setup(monkeypatch, "darwin", "cpu")] == ["dqn_fused._C_cpu"]


def test_an_old_setuptools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new environment of Python 3.11 has 65.5, which knows neither the metadata nor the wheel's command."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"expected setuptools 77 or later, got 65\.5\.0; pip install --upgrade"):
        setup(monkeypatch, sys.platform, "0")


def test_the_version_is_written_once() -> None:
    release = re.sub(r"\.dev\d+$", "", dqn_fused.__version__)
    headings = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0][0] == release
    assert (headings[0][1] == "unreleased") == (release != dqn_fused.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    tree = ast.parse((ROOT / "dqn_fused/__init__.py").read_text())
    literals = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    assert [node.value for node in literals] == [dqn_fused.__version__]


def test_interpreters_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """release_check changes its folder: the relative path that wheels.yml gives was then looked for in out/release."""
    from tools.release_check import interpreter

    python = tmp_path / "build/newest/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert interpreter("build/newest/bin/python") == str(python)
    monkeypatch.setenv("PATH", str(python.parent))
    assert interpreter("python") == str(python)


def test_workflows_call_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for workflow in WORKFLOWS:
        for arguments in re.findall(r"run: make (.*)", workflow.read_text()):
            called |= {word for word in re.sub(r'"[^"]*"', "", arguments).split() if "=" not in word}
    assert called <= targets
    assert {"test", "test-anywhere", "lint", "docs", "release-check", "environment"} <= called


def test_workflows_have_the_versions_that_are_supported() -> None:
    text, project = (ROOT / ".github/workflows/test.yml").read_text(), (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    quoted = ", ".join(f'"{python}"' for python in pythons)
    assert f"python: [{quoted}]" in text
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert f"torch=={oldest}.*" in text
    assert f'requires-python = ">={pythons[0]}"' in project
    assert f'target-version = "py{pythons[0].replace(".", "")}"' in project
    assert f'python_version = "{pythons[0]}"' in project


def test_the_tests_install_on_every_supported_python() -> None:
    """With triton==3.9.0 pip found no solution where torch came from PyPI, whose CUDA build of 2.13.0 requires 3.7.1,
    and no wheel for Python 3.10. A machine with a CPU build and Python 3.11 did not show it."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    requirements = {x.name: x.specifier for x in map(Requirement, [x for x in lines if not x.startswith("#")])}
    assert {"3.7.1", "3.8.0", "3.9.0"} == set(
        requirements["triton"].filter(["3.5.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0"])
    )
    for command in ((ROOT / "Makefile").read_text(), (ROOT / ".github/workflows/test.yml").read_text()):
        (pattern,) = re.findall(r'grep -vE "(\S+)" requirements-dev.txt', command)
        others = [x for x in lines if not re.search(pattern, x)]
        assert not [x for x in others if x.startswith(("torch", "triton"))], "another version of them is asked for"


def test_a_bug_report_asks_for_the_facts() -> None:
    assert "python -m dqn_fused --json" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
