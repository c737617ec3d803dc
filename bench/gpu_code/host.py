"""What a call of the Triton backend costs the host, with a driver that launches nothing: bench/results/host.csv.

Directly, as a call is launched once Triton has compiled its kernels, and by Triton, which looks at every argument.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime import driver

from bench.gpu_code import aot
from bench.gpu_code.kernels import Case
from bench.measure import machine
from bench.measure.timing import figures, interleaved, timer
from bench.measure.variants import VARIANTS, dtype_name, random_arguments
from bench.reporting import report, tables
from bench.reporting.results import Row, Table
from dqn_fused._backends import (
    triton_backend,
    triton_categorical,
    triton_launch,
    triton_program,
    triton_quantile,
    triton_rows,
    triton_sweep,
    triton_sweep_backward,
    triton_td_loss,
)
from dqn_fused.arguments import Batch, check_batch, check_loss
from dqn_fused.autograd import Saved

F32 = torch.float32
CASES = [
    Case("small", "dqn", (128, 2), F32),
    Case("Atari", "dqn", (32, 18), F32),
    Case("Atari", "dqn", (512, 18), F32),
    Case("masked double", "masked double", (32, 18), F32),
    Case("munchausen", "munchausen", (32, 18), F32),
    Case("cql", "cql", (32, 18), F32),
    Case("hundreds", "dqn", (1024, 512), F32),
]
DIRECT, BY_TRITON = "direct", "by Triton"
TARGET = "sm_90"
ROUNDS = 300  # short ones: they differ only by interruptions, and the least is of one without

Launched = Callable[..., object]


class Driver(aot.StubDriver):
    """A driver that hands what is launched to a function."""

    def __init__(self, target: Any, launched: Launched) -> None:
        super().__init__(3000, target)
        self.utils, self.launched, self.loaded = self, launched, list[str]()

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name: str, *args: Any) -> tuple[int, int, int, int, int]:
        """Module, function (both their number), registers, spills and most threads."""
        self.loaded.append(name)
        return len(self.loaded), len(self.loaded), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, src: Any, metadata: Any) -> Launched:
        return self.launched


@contextmanager
def launching(target: str, launched: Launched) -> Iterator[Driver]:
    """Launch kernels on CPU tensors for a target, where nothing runs."""
    stub = Driver(next(x.target for x in aot.TARGETS if x.name == target), launched)
    driver.set_active(stub)
    try:
        with patch.object(triton_launch, "sms", lambda device: aot.SMS), patch.object(triton_program, "KEPT", {}):
            yield stub
    finally:
        for kernel in kernels():
            kernel.device_caches.pop(stub.index, None)  # what this driver has loaded
        if torch.cuda.is_available():  # without a device there is no driver to go back to
            driver.reset_active()


def kernels() -> list[Any]:
    """Every kernel of the backend."""
    modules = (
        triton_launch, triton_td_loss, triton_rows, triton_quantile, triton_categorical, triton_sweep,
        triton_sweep_backward,
    )  # fmt: skip
    return [x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")]


@contextmanager
def by_triton() -> Iterator[None]:
    """Leave every launch to Triton."""
    with patch.object(triton_program, "KNOWN", False):
        yield


def run() -> None:
    machine.commit()  # before a file of it changes
    table = Table(report.RESULTS, "host")
    table.add(rows())
    print(f"\n{tables.host(table.rows)}\n\nmicroseconds of the host; more in {table.path.relative_to(machine.ROOT)}")


def rows(cases: list[Case] = CASES, seconds: float = 0.5) -> Iterator[Row]:
    """Two rows for each case and call."""
    about = machine.about("host", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with launching(TARGET, lambda *args: None):
            for case in cases:
                for call, make in calls_of(case).items():
                    yield from (about | {"call": call} | row for row in measured(case, make, seconds))
    finally:
        torch.set_num_threads(threads)


def measured(case: Case, make: Callable[[], object], seconds: float) -> Iterator[Row]:
    known = triton_program.KNOWN

    def slow() -> None:
        triton_program.KNOWN = False
        make()
        triton_program.KNOWN = known

    times = interleaved({DIRECT: timer(make), BY_TRITON: timer(slow)}, seconds, ROUNDS)
    least = {provider: min(values) for provider, values in times.items()}
    for provider, values in times.items():
        yield {
            "case": case.name,
            "shape": " x ".join(map(str, case.shape)),
            "dtype": dtype_name(case.dtype),
            "provider": provider,
            **figures(values, times[BY_TRITON])._asdict(),
            "us_least": round(1e6 * least[provider], 2),
            "of_least": round(least[BY_TRITON] / least[provider], 3),
        }


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    variant = VARIANTS[case.variant]
    n, A = case.shape
    options = {name: x for name, x in variant.options.items() if name != "return_td_error"}
    return calls(random_arguments(variant, n, A, case.dtype, "cpu"), **options)


def calls(arguments: dict[str, Any], **options: Any) -> dict[str, Callable[[], object]]:
    """The backend's functions, on arguments that are checked already."""
    spec = check_loss(**options)
    batch = check_batch(Batch(**{"gamma": 0.99, **arguments}), spec)
    _, td_error, normaliser = triton_backend.forward(batch, spec)
    saved = Saved.of(batch, spec, td_error, normaliser)
    grad_loss = torch.ones(td_error.shape if spec.reduction == "none" else (), dtype=td_error.dtype)
    return {
        "forward": lambda: triton_backend.forward(batch, spec),
        "backward": lambda: triton_backend.backward(grad_loss, saved, spec),
        "loss_and_grad": lambda: triton_backend.loss_and_grad(batch, spec),
    }
