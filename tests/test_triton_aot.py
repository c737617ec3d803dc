"""The Triton kernels compiled for GPUs that are not here: the backend's own launches, caught by a stub driver.

What the interpreter cannot show is asserted on the machine code: registers and spills, 128-bit loads and stores, no
float atomics, no float64 arithmetic where none was asked for.
"""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from test_linear import Operations
from test_loss import compact, dtype_id, make

triton = pytest.importorskip("triton")

from ahead import (  # noqa: E402
    Compiled,
    check_instructions,
    check_no_fusion,
    check_resources,
    compiled,  # noqa: F401
    target,  # noqa: F401
)

from bench.gpu_code import aot  # noqa: E402
from bench.gpu_code.aot import (  # noqa: E402
    ALWAYS,
    Target,
    launch,
    loads_128_bits,
    machine_code,
    stores_128_bits,
)
from bench.gpu_code.machine_code import instructions  # noqa: E402
from dqn_fused import arguments  # noqa: E402
from dqn_fused._backends import triton_backend, triton_launch  # noqa: E402
from dqn_fused.targets import Munchausen, Soft  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

NARROW = {"td_loss_fwd_kernel", "td_loss_bwd_kernel"}
WIDE = {"row_fwd_kernel", *NARROW}
CASES = {
    "small": ((128, 2), NARROW),
    "atari": ((64, 18), NARROW),
    "two_tiles": ((256, 18), NARROW),
    "several_programs": ((512, 18), NARROW),
    "many_rows": ((16384, 18), NARROW),
    "hundreds": ((1024, 512), WIDE),
    "large": ((2048, 4099), WIDE),
    "split": ((3, 50257), WIDE),
}
MISALIGNED = {
    "every_row": lambda: torch.randn(1025 * 512)[1:].narrow(0, 0, 1024 * 512).view(1024, 512),
    "columns": lambda: torch.randn(1024, 513)[:, 1:],
    "time_slice": lambda: torch.randn(64, 17, 511)[:, 1:],
    "split": lambda: torch.randn(3, 50258)[:, 1:],
}


def family(variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and options of a loss; the last two ask for everything that goes together."""
    arguments, options = make(shape, dtype), {}

    def matrix() -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    legal = torch.rand(shape) < 0.5
    if variant != "cql":
        arguments["next_action_mask"] = legal
    if variant.startswith("double"):
        arguments["next_q_online"] = matrix()
    if variant == "soft":
        options["target"] = Soft()
    if variant.startswith("munchausen"):
        options["target"], arguments["target_q"], arguments["action_mask"] = Munchausen(), matrix(), legal
    if "cql" in variant:
        options["cql_alpha"], arguments["action_mask"] = 0.5, legal
    if "weights" in variant:
        options["loss"], arguments["weights"] = "huber", torch.rand(shape[:-1])
    if "transform" in variant:
        options["value_transform"] = "signed_hyperbolic"
    return arguments, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(target: Target, compiled: Compiled, case: str, dtype: torch.dtype) -> None:
    """Both regimes in every dtype. 4,099 and 50,257 are odd: rows start at any alignment and are read 16 bytes wide."""
    shape, kernels = CASES[case]
    launch(make(shape, dtype))
    assert {name for name, *_ in compiled} - {"sum_kernel"} == kernels  # which few rows need in float64 alone
    check(compiled, target, dtype)


FAMILY = [
    ("double", "atari", torch.bfloat16),
    ("double", "split", torch.bfloat16),
    ("soft", "hundreds", torch.float32),
    ("cql", "large", torch.float32),
    ("double_cql_weights", "atari", torch.float32),
    ("double_cql_weights", "many_rows", torch.bfloat16),
    ("munchausen_cql_weights", "atari", torch.float64),
    ("munchausen_cql_weights", "hundreds", torch.bfloat16),
    ("double_transform", "atari", torch.float32),
    ("transform", "many_rows", torch.bfloat16),
    ("munchausen_cql_weights_transform", "atari", torch.float64),
    ("double_transform", "split", torch.float32),
]


@pytest.mark.parametrize(
    ("variant", "case", "dtype"), FAMILY, ids=lambda x: dtype_id(x) if x in arguments.FLOATS else x
)
def test_machine_code_of_the_family(
    target: Target, compiled: Compiled, variant: str, case: str, dtype: torch.dtype
) -> None:
    shape, kernels = CASES[case]
    given, options = family(variant, shape, dtype)
    launch(given, **options)
    assert {name for name, *_ in compiled} - {"sum_kernel"} == kernels
    check(compiled, target, dtype)


@pytest.mark.parametrize("case", MISALIGNED)
def test_wide_loads_from_a_misaligned_tensor(target: Target, compiled: Compiled, case: str) -> None:
    """A pointer that is no multiple of 16 would be read by the element: the launch starts at the boundary before."""
    next_q = MISALIGNED[case]()
    assert next_q.data_ptr() % 16
    launch({**make(next_q.shape), "next_q": next_q})
    assert all(loads_128_bits(kernel) for name, kernel, *_ in compiled if name == "row_fwd_kernel")


def test_numbers_reach_a_float64_kernel_in_memory(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an argument it would be float32. The interpreter cannot show it: there a float stays a Python float."""
    seen: list[Any] = []
    monkeypatch.setattr(triton_launch, "run", lambda kernel, programs, *args, **meta: seen.extend(args))
    arguments, options = family("munchausen_cql_weights", (9, 4), torch.float64)
    launch(arguments, **options)
    assert not any(isinstance(x, float) for x in seen)
    numbers = {x.item() for x in seen if isinstance(x, torch.Tensor) and x.dim() == 0}
    assert numbers >= {0.99, 0.03, 1 / 0.03, 0.9, -1.0, 0.5, 1.0}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    "variant", ["mask", "gamma_scalar", "gamma_per_sample", "mixed_dtypes", "three_dimensions", "strided"]
)
def test_variants_compile(target: Target, compiled: Compiled, variant: str, reduction: str) -> None:
    arguments, options = make((6, 4, 70) if variant == "three_dimensions" else (24, 70)), {}
    if variant == "mask":
        arguments = compact(arguments)
    elif variant == "gamma_scalar":
        arguments["gamma"] = torch.tensor(0.9)
    elif variant == "gamma_per_sample":
        arguments["gamma"] = torch.rand(24)
    elif variant == "mixed_dtypes":
        arguments["actions"] = arguments["actions"].to(torch.int32)
        arguments["rewards"] = arguments["rewards"].to(torch.int64)
        arguments["terminated"] = arguments["terminated"].float()
        arguments["next_q"] = arguments["next_q"].to(torch.bfloat16)
    elif variant == "three_dimensions":
        arguments["q"] = torch.randn(6, 5, 70)[:, 1:]
    else:
        arguments["next_q"] = torch.randn(70, 24).t()
        arguments["q"] = torch.randn(24, 140)[:, ::2]
        arguments["next_action_mask"] = arguments["action_mask"] = torch.ones(70, dtype=torch.bool).expand(24, 70)
        options = {"target": Soft(), "cql_alpha": 0.5}
    launch(arguments, reduction=reduction, **options)
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=False)


def test_non_final_mask_is_counted_in_the_launch(
    target: Target, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took a running sum, a sum, a comparison and a selection: six to eight small kernels before ours."""
    if target.name != "sm_90":
        pytest.skip("as on other targets")
    monkeypatch.setattr(arguments, "looks_at_values", lambda device: False)
    for shape, kernels in (((32, 18), ["td_loss_fwd"]), ((16384, 18), ["count", "td_loss_fwd", "sum"])):
        compiled.clear()
        spec = arguments.check_loss()
        batch = arguments.check_batch(arguments.Batch(**compact(make(shape)), gamma=0.99), spec)
        with Operations() as operations:
            batch = arguments.check_values(batch, 18, batch.next_count(), counts_mask=triton_backend.COUNTS_MASK)
            triton_backend.forward(batch, spec)
        assert {x for x in operations.names if not x.startswith("empty")} <= {"fill_"}  # of the tests' own
        assert [name.removesuffix("_kernel") for name, *_ in compiled] == kernels


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 330), (torch.bfloat16, 290)], ids=["float32", "bfloat16"])
def test_instructions_of_the_narrow_backward(target: Target, compiled: Compiled, dtype: torch.dtype, most: int) -> None:
    """A warp stores 256 elements of 18 actions: 296 and 248 on sm_80. It was 536 and 544, a division an element."""
    if target.name not in ALWAYS:
        pytest.skip("counted on sm_80 and sm_90")
    calls = aot.calls(make((16384, 18), dtype))
    calls["forward"]()
    compiled.clear()
    calls["backward"]()
    assert len(instructions(machine_code(compiled[0].kernel))) <= most


def check(compiled: Compiled, target: Target, dtype: torch.dtype) -> None:
    """Hold every kernel against what is promised of it."""
    for name, kernel, _, named in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=dtype is torch.float64)
        check_no_fusion(name, kernel)
        if name == "row_fwd_kernel":
            assert loads_128_bits(kernel), "rows are not read 16 bytes at a time"
        if name == "td_loss_bwd_kernel" and (dtype.itemsize >= 4 or target.name.startswith("sm_")):
            # A run of one or two rows of two actions is shorter.
            assert stores_128_bits(kernel) or named["grad_q"].shape[-1] < 4, "grad_q is not written 16 bytes at a time"
