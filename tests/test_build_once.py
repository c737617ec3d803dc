"""What the executor of PTX compiles, it compiles once, however many workers of the suite ask for it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.gpu_code.ptx import build


def test_one_of_many_fills_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each worker compiled csrc/cuda, 30 s of nvcc, and all but one threw the result away: the folder was right."""
    monkeypatch.setenv("DQN_FUSED_PTX_CACHE", str(tmp_path / "cache"))
    calls = []

    def make(into: Path) -> None:
        calls.append(into)
        time.sleep(0.2)
        (into / "made").write_text("once")

    with ThreadPoolExecutor(4) as pool:
        folders = {*pool.map(lambda _: build.once("library", [b"key"], make), range(4))}
    assert len(calls) == 1
    (folder,) = folders
    assert (folder / "made").read_text() == "once"
    assert build.once("library", [b"another key"], make) != folder
    assert len(calls) == 2


def test_a_failing_compiler_leaves_nothing_and_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DQN_FUSED_PTX_CACHE", str(tmp_path))

    def fail(into: Path) -> None:
        (into / "half").touch()
        raise build.CannotBuildError("no compiler")

    for _ in range(2):
        with pytest.raises(build.CannotBuildError):
            build.once("library", [b"key"], fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
