"""What the compiled GPU kernels take, read off the machine code without a GPU: bench/results/kernels.csv.

Triton's for every target that it compiles for, and those of csrc/cuda where nvcc is. For NVIDIA's the losses are also
executed (bench/gpu_code/ptx), and what they load, store and issue is counted.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.gpu_code import aot, nvcc
from bench.gpu_code.machine_code import widest
from bench.gpu_code.occupancy import occupancy
from bench.gpu_code.ptx import build
from bench.gpu_code.ptx.executor import Counts
from bench.gpu_code.ptx.triton import Executor
from bench.measure import machine
from bench.measure.progress import track
from bench.measure.variants import VARIANTS, dtype_name, random_arguments
from bench.reporting import report, tables
from bench.reporting.results import Row, Table
from dqn_fused._backends import triton_launch
from dqn_fused.head.sweep import Sweep, column_blocks
from dqn_fused.head.sweep_backward import SweepBackward

F32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    """A loss, "quantile" or "categorical", whose sizes are samples, actions and quantiles or atoms, or "sweep" of the
    linear head, of rows, actions and features: forward of a kind, or the gradient of a tile of Q-values."""

    name: str
    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {' x '.join(map(str, self.shape))}"


CASES = [
    Case("small", "dqn", (128, 2), F32),
    Case("Atari", "dqn", (32, 18), F32),
    Case("Atari", "dqn", (512, 18), F32),
    Case("many rows", "dqn", (16384, 18), F32),
    Case("many rows", "dqn", (16384, 18), BF16),
    Case("hundreds", "dqn", (1024, 512), F32),
    Case("hundreds", "dqn", (1024, 512), BF16),
    Case("split", "dqn", (64, 128256), F32),
    Case("split", "dqn", (64, 128256), BF16),
    Case("masked double", "masked double", (1024, 512), F32),
    Case("munchausen", "munchausen", (1024, 512), F32),
    Case("cql", "cql", (1024, 512), F32),
    Case("QR-DQN", "quantile", (128, 2, 50), F32),
    Case("QR-DQN", "quantile", (32, 18, 200), F32),
    Case("QR-DQN", "quantile", (512, 18, 200), F32),
    Case("IQN", "quantile", (32, 18, 64), BF16),
    Case("C51", "categorical", (128, 2, 51), F32),
    Case("C51", "categorical", (32, 18, 51), F32),
    Case("C51", "categorical", (512, 18, 51), F32),
    Case("C51", "categorical", (512, 18, 51), BF16),
    Case("head max", "sweep", (256, 50257, 1024), BF16),
    Case("head argmax", "sweep", (256, 50257, 1024), BF16),
    Case("head max", "sweep", (256, 50257, 1024), F32),
    Case("head backward", "sweep", (256, 50257, 1024), BF16),
    Case("head backward", "sweep", (256, 50257, 1024), F32),
    Case("head soft", "sweep", (64, 4096, 64), F32),
    Case("head backward", "sweep", (64, 4096, 64), F32),
]
# The matrices among a kernel's arguments of which every element is read or written. The next action is chosen in
# next_q_online if that is given, and all of q is read only for the sum of exponentials.
MATRICES = {
    "td_loss_fwd_kernel": ("grad_q", "next_q", "next_q_online", "next_action_mask", "target_q", "action_mask", "q"),
    "row_fwd_kernel": ("x", "mask"),
    "td_loss_bwd_kernel": ("grad_q", "q", "action_mask"),
    "quantile_fwd_kernel": ("chooser",),
    "categorical_fwd_kernel": ("chooser",),
    "values_kernel": ("x",),
    "rows_bwd_kernel": ("grad",),
    "sweep_fwd_kernel": ("hidden", "weight", "mask"),
    "sweep_bwd_kernel": ("grad", "hidden", "weight", "mask"),
}
MOST_PRODUCTS = 1 << 25  # of a sweep that is executed: seconds; tensor cores of sm_90 are not executed at all


def run() -> None:
    machine.commit()  # before a file of it changes
    table = Table(report.RESULTS, "kernels")
    targets = [(i, target.name) for i, target in enumerate(aot.TARGETS)]
    for i, _ in track(targets, len(targets), "Triton", lambda item: item[1]):
        table.add(of_target(i))
    table.add(machine.about("kernels", "cpu") | row for row in nvcc.rows())
    print(tables.kernels(table.rows, lambda row: f"{row['kernel']} {row['case']} {row['shape']} {row['dtype']}"))
    print(f"\nregisters of a thread, bytes spilled, occupancy; more in {table.path.relative_to(machine.ROOT)}")


def of_target(index: int, cases: list[Case] = CASES) -> Iterator[Row]:
    """One row for each kernel that the backend would launch; none if this triton cannot compile for the target."""
    target, about = aot.TARGETS[index], machine.about("kernels", "cpu")
    with aot.targeting(index) as reason:
        if reason is not None:
            print(f"{target.name}: {reason}")
            return
        for case in cases:
            for call, make in launches(case).items():
                with aot.compiling() as found:
                    make()
                executed = counted(make) if target.name.startswith("sm_") and executable(case) else []
                for i, launch in enumerate(found):
                    about_case = {"call": call, "case": case.name, "shape": " x ".join(map(str, case.shape))}
                    about_case["dtype"] = dtype_name(case.dtype)
                    yield (
                        about
                        | about_case
                        | measured(launch, target, case)
                        | (counts_of(executed[i]) if executed else {})
                    )


def launches(case: Case) -> dict[str, Callable[[], object]]:
    if case.variant in ("quantile", "categorical"):
        n, A, _ = case.shape
        x = torch.zeros(case.shape, dtype=case.dtype)
        samples = {"actions": torch.arange(n) % A, "rewards": torch.zeros(n)}
        if case.variant == "quantile":
            return aot.quantile_calls({"quantiles": x, "next_quantiles": x, **samples})
        return aot.categorical_calls({"logits": x, "next_logits": x, "support": (-10.0, 10.0), **samples})
    if case.variant != "sweep":
        variant = VARIANTS[case.variant]
        n, A = case.shape
        arguments = random_arguments(variant, n, A, case.dtype, "cpu")
        arguments["terminated"].zero_()  # whose rows would not be read
        options = {name: x for name, x in variant.options.items() if name != "return_td_error"}
        return aot.calls(arguments, **options)
    return {"sweep": tile_gradient(case) if case.name == "head backward" else sweep(case)}


def sweep(case: Case) -> Callable[[], object]:
    from dqn_fused._backends.triton_sweep import sweep

    n, A, D = case.shape
    hidden, weight, bias = (torch.zeros(size, dtype=case.dtype) for size in ((n, D), (A, D), (A,)))
    return lambda: sweep(Sweep(hidden, weight, bias, None, case.name.removeprefix("head "), 1.0))


def tile_gradient(case: Case) -> Callable[[], object]:
    from dqn_fused._backends.triton_sweep_backward import tile_gradient

    n, A, D = case.shape
    hidden, weight, bias = (torch.zeros(size, dtype=case.dtype) for size in ((n, D), (A, D), (A,)))
    of_rows, actions = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    work = SweepBackward(hidden, weight, bias, None, of_rows, of_rows, actions, of_rows, (True, True, True))
    columns = next(column_blocks(hidden, A))
    return lambda: tile_gradient(work, hidden, weight[columns], slice(0, n), columns)


def executable(case: Case) -> bool:
    """Whether the executor has the instructions of a case, and is done with it in seconds."""
    return case.variant != "sweep" or (case.dtype is F32 and math.prod(case.shape) <= MOST_PRODUCTS)


def counted(make: Callable[[], object]) -> list[Counts]:
    """What each launch does when executed, for the target that is compiled for; nothing without a C++ compiler."""
    try:
        build.engine()
    except build.CannotBuildError:
        return []
    executor = Executor(races=False)
    with (
        patch.object(triton_launch, "run", executor.run),
        patch.object(triton_launch, "sms", lambda device: aot.SMS),
    ):
        make()
    return [launch.counts for launch in executor.launches]


def counts_of(counts: Counts) -> Row:
    """What a launch moves, and what one of its warps issues."""
    a_warp = {name: counts[name] for name in ("instructions", "integer", "float", "special", "shuffle", "barrier")}
    a_warp["shared_access"] = counts["shared_load"] + counts["shared_store"]
    return {
        "loaded_bytes": counts["load_bytes"],
        "stored_bytes": counts["store_bytes"],
        "sectors": counts["load_sectors"] + counts["store_sectors"],
        "bank_conflicts": counts["conflicts"],
        **{name: round(x / counts["warps"], 1) for name, x in a_warp.items()},
    }


def measured(launch: aot.Launch, target: aot.Target, case: Case) -> Row:
    kernel, name = launch.kernel, target.name
    code = aot.machine_code(kernel)
    threads = kernel.metadata.num_warps * target.target.warp_size
    if "cubin" in kernel.asm:
        usage = aot.resource_usage(kernel.asm["cubin"])
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    else:
        usage = aot.amd_usage(kernel.asm["amdgcn"])
        registers, spilled = usage["vgpr_count"], usage["private_segment_fixed_size"]
    share = occupancy(name, registers, threads, kernel.metadata.shared)
    return {
        "target": name,
        "language": "triton",
        "kernel": launch.name,
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "load_bits": widest(code, "load"),
        "store_bits": widest(code, "store"),
        "block_threads": threads,
        "programs": launch.programs,
        "occupancy": "" if share is None else share,
        "bytes": matrix_bytes(launch),
    }


def matrix_bytes(launch: aot.Launch) -> int:
    """Bytes of the matrices that the launch reads or writes completely, as in traffic.py; the rest is O(n)."""
    given = {name: x for name, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
    names = MATRICES.get(launch.name, ())
    if launch.name == "td_loss_fwd_kernel":
        reduced = any(name in given for name in ("next_best", "policy_best", "q_best"))  # by row_fwd_kernel before
        unread = {"next_q"} if "next_q_online" in given else set[Any]()
        unread |= set() if "normaliser" in given else {"q"}
        names = ("grad_q",) if reduced else tuple(name for name in names if name not in unread)
    return sum(given[name].numel() * given[name].element_size() for name in names if name in given)
