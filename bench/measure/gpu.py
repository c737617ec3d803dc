"""Everything that needs a GPU, by one command and in one folder: tests, launches, figures, pictures and a log.

It needs no network, and only torch, triton and this project; other packages that are missing are named in the log.
"""

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch

from bench.measure import machine, suite
from bench.measure.cuda import launches
from bench.measure.deadline import Deadline
from bench.measure.providers import ours, step
from bench.measure.update import BOTH, CARTPOLE, EAGER, FUSED, Learner
from bench.measure.variants import VARIANTS, random_arguments
from bench.reporting.results import Row, Table

OPTIONAL = ("matplotlib", "tqdm", "rlax", "torchrl", "pytest", "hypothesis", "numpy")
PROFILED = [(32, 18), (256, 50257)]
TESTS, PROFILE = 0.35, 0.1  # of the time; the rest is for the figures


class Log:
    """Lines on the terminal and in a file."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("w", buffering=1)

    def __call__(self, text: object = "") -> None:
        print(text, flush=True)
        print(text, file=self.file)


def run(out: Path, seconds: float, variants: Sequence[str], only: Sequence[str], limit: float) -> int:
    """Everything within `limit` seconds, or nearly, in a folder of the GPU's name.

    2 without a GPU, 1 where something failed or was left out.
    """
    if not torch.cuda.is_available():
        print("python -m bench gpu: torch sees no CUDA or ROCm device", file=sys.stderr)
        return 2
    deadline = Deadline(limit)
    out = out / machine.slug(machine.device_name("cuda"))
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "gpu.log")
    about(log)
    failed = tests(log, out / "tests.log", deadline.left() * TESTS)
    problems: list[str] = []
    profile(out, "cuda", log, problems, deadline.part(PROFILE))
    log(f"\nfigures: {deadline.left():.0f} s left")
    for problem in problems:
        log(f"NOT MEASURED: {problem}")
    problems += suite.run(out, "cuda", seconds, variants, "full", only, deadline, log)
    log(f"\n{'tests failed' if failed else 'tests passed'}; {len(problems)} figures missing; all of it is in {out}")
    return 1 if failed or problems else 0


def about(log: Callable[[object], None]) -> None:
    """Versions, devices, backends, and what is missing."""
    log(f"python {platform.python_version()}, commit {machine.commit()}")
    command = [sys.executable, "-m", "dqn_fused"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    log(found.stdout + found.stderr)
    for name in OPTIONAL:
        if find_spec(name) is None:
            log(f"{name} is not installed: what needs it is left out")


def tests(log: Callable[[object], None], path: Path, seconds: float) -> bool:
    """Run the tests that need a GPU in a process of their own; whether they failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]
    log(f"tests, at most {seconds:.0f} s: {' '.join(command[1:])} > {path.name}")
    with path.open("w") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=seconds, cwd=machine.ROOT).returncode
        except subprocess.TimeoutExpired:
            log(f"tests: stopped after {seconds:.0f} s; {path.name} has those that ran")
            return True
    lines = path.read_text().splitlines()
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]:
        log(line)
    return code != 0


def profile(
    out: Path, device: str, log: Callable[[object], None], problems: list[str], deadline: Deadline
) -> list[Row]:
    """What each step launches, and how long that takes on the device; operations where the device is the CPU."""
    table, dropped = Table(out, "launches"), list[tuple[str, str]]()
    steps = profiled(device)
    for (case, name), _ in deadline.over(list(steps), dropped):
        try:
            found = launches(steps[case, name](), device)
        except Exception as error:
            problems.append(f"launches of {name}, {case}: {type(error).__name__}: {error}")
            continue
        log(
            f"{case}, {name}: {sum(x.times for x in found):g} launches, {sum(x.us for x in found):.1f} us on the device"
        )
        described = machine.about("launches", device) | {"case": case, "provider": name}
        table.add(described | {"launch": x.name, "count": x.times, "us": round(x.us, 3)} for x in found)
    problems += [f"launches of {name}, {case}: no time left" for case, name in dropped]
    return table.rows


def profiled(device: str) -> dict[tuple[str, str], Callable[[], Callable[[], object]]]:
    """(case, provider) -> how to make the step: eager and this project's, and CartPole's whole update."""
    found: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {}
    plain = VARIANTS["dqn"]
    for n, A in PROFILED:
        batch = random_arguments(plain, n, A, torch.float32, device)
        case = f"{n} x {A}"
        found[case, "eager"] = lambda batch=batch: step(plain.eager, batch)  # type: ignore[misc]
        for name, make in ours(plain, batch, device).items():
            found[case, name] = lambda make=make: make().call  # type: ignore[misc]
    for kind in (EAGER, FUSED, BOTH):
        found[str(CARTPOLE), kind] = lambda kind=kind: _update(kind, device)  # type: ignore[misc]
    return found


def _update(kind: str, device: str) -> Callable[[], object]:
    learner = Learner(CARTPOLE, device)
    return lambda: learner.update(kind)
