"""Compile C++ into a folder keyed by the sources, once."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from filelock import FileLock  # a requirement of torch

from bench.measure.machine import ROOT

ENGINE = Path(__file__).parent / "engine"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-ffp-contract=off")  # a fused multiply-add only where the PTX says so


class CannotBuildError(RuntimeError):
    """A compiler is missing, or it fails."""


def folder() -> Path:
    """Where libraries are kept."""
    given = os.environ.get("DQN_FUSED_PTX_CACHE")
    return Path(given) if given else ROOT / "build" / "ptx"


def once(name: str, key: Sequence[bytes], make: Callable[[Path], None]) -> Path:
    """The folder that make has filled for this key, now or earlier. Processes may race for it."""
    digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    return filled(folder() / f"{name}-{digest}", make)


def filled(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which make fills unless it is there already. One process fills it, the others wait."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / target.name
                made.mkdir()
                make(made)
                made.rename(target)  # whole or not at all
    return target


def run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise CannotBuildError("no C++ compiler")
    return found


@cache
def engine() -> Path:
    """The library of engine/."""
    cxx, files = compiler(), sorted(ENGINE.iterdir())
    key = [run([cxx, "--version"]).encode(), *(item.encode() for item in FLAGS), *(f.read_bytes() for f in files)]

    def make(into: Path) -> None:
        def translate(source: Path) -> str:
            run([cxx, *FLAGS, "-c", str(source), "-o", str(into / f"{source.stem}.o")])
            return str(into / f"{source.stem}.o")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(translate, (f for f in files if f.suffix == ".cpp")))
        run([cxx, "-shared", *objects, "-o", str(into / "engine.so")])

    return once("engine", key, make) / "engine.so"
