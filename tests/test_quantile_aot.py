"""The quantile loss compiled for GPUs that are not here: registers, 16-byte loads and stores, what it launches."""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED

triton = pytest.importorskip("triton")

from quantile_data import compact, make  # noqa: E402
from test_loss import dtype_id  # noqa: E402
from test_triton_aot import (  # noqa: E402, F401
    Compiled,
    check_instructions,
    check_no_fusion,
    check_resources,
    compiled,
    target,
)

from bench.gpu_code import aot  # noqa: E402
from bench.gpu_code.aot import Target, loads_128_bits, quantile_calls, stores_128_bits  # noqa: E402
from bench.gpu_code.machine_code import instructions, main_loop  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

FORWARD = ["quantile_fwd_kernel", "sum_kernel"]
CHOSEN_BEFORE = ["values_kernel", *FORWARD]
CASES: dict[str, tuple[tuple[int, ...], int, list[str]]] = {
    "atari": ((32, 18, 200), 200, FORWARD),
    "atari_512": ((512, 18, 200), 200, FORWARD),
    "small": ((128, 2, 50), 50, FORWARD),
    "iqn": ((32, 18, 64), 64, FORWARD),
    "odd": ((100, 5, 51), 37, FORWARD),
    "many_rows": ((16384, 6, 8), 8, FORWARD),
    "one": ((1, 1, 1), 1, ["quantile_fwd_kernel"]),
    "long_rows": ((4, 300, 128), 128, CHOSEN_BEFORE),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(compiled: Compiled, target: Target, dtype: torch.dtype, wide: bool) -> None:  # noqa: F811
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=dtype is torch.float64)
        check_no_fusion(name, kernel)
        if name == "rows_bwd_kernel" and (dtype.itemsize >= 4 or target.name.startswith("sm_")):
            assert stores_128_bits(kernel) or not wide, "the gradient is not written 16 bytes at a time"
        if name == "values_kernel" or (
            name == "quantile_fwd_kernel" and "values_kernel" not in [x[0] for x in compiled]
        ):
            assert loads_128_bits(kernel) or not wide, "the next quantiles are not read 16 bytes at a time"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(target: Target, compiled: Compiled, case: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Rows of 200 float32 are read 16 bytes at a time although 200 is no multiple of 16, as Triton would ask."""
    shape, K2, kernels = CASES[case]
    calls = quantile_calls(make(shape, K2, dtype))
    calls["forward"]()
    assert [name for name, *_ in compiled] == kernels
    calls["backward"]()
    assert compiled[-1].name == "rows_bwd_kernel"
    calls["loss_and_grad"]()
    enough = case != "small"  # its rows have fewer elements than a program threads
    check(compiled, target, dtype, wide=enough and shape[2] * dtype.itemsize % 16 == 0 == K2 * dtype.itemsize % 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(
    "variant", ["everything", "mask", "q-values", "strided", "gamma_scalar", "none", "kappa_0", "taus"]
)
def test_variants(target: Target, compiled: Compiled, variant: str, dtype: torch.dtype) -> None:  # noqa: F811
    n, A, K = 24, 6, 51
    arguments, options = make((n, A, K), 37, dtype), {}
    if variant in ("everything", "mask"):
        arguments |= {"weights": torch.rand(n), "taus": torch.rand(n, K), "gamma": torch.rand(n)}
        arguments["next_action_mask"] = torch.rand(n, A) < 0.5
        arguments["next_quantiles_online"] = torch.randn(n, A, 32).to(dtype)
        options["quantile_reduction"] = "mean"
    if variant == "mask":
        arguments = compact(arguments)
    elif variant == "q-values":
        arguments["next_quantiles_online"] = torch.randn(n, A)
    elif variant == "strided":
        arguments["quantiles"] = torch.randn(K, n, A).to(dtype).permute(1, 2, 0)
        arguments["next_quantiles"] = torch.randn(n, A, 74).to(dtype)[:, :, ::2]
    elif variant == "gamma_scalar":
        arguments["gamma"] = torch.tensor(0.9)
    elif variant == "none":
        options["reduction"] = "none"
    elif variant == "kappa_0":
        options["kappa"] = 0.0
    elif variant == "taus":
        arguments["taus"] = torch.rand(K)
    for call in quantile_calls(arguments, **options).values():
        call()
    check(compiled, target, dtype, wide=False)


def test_few_samples_of_many_quantiles_are_split(target: Target, compiled: Compiled) -> None:  # noqa: F811
    """32 samples would fill a quarter of a device: four programs a sample, each of which chooses by itself."""
    quantile_calls(make((32, 18, 200)))["forward"]()
    assert compiled[0].programs == 4 * 32
    compiled.clear()
    quantile_calls(make((512, 18, 200)))["forward"]()
    assert compiled[0].programs == 512
    compiled.clear()
    quantile_calls(make((32, 18, 200)), reduction="none")["forward"]()
    assert [name for name, *_ in compiled] == ["quantile_fwd_kernel", "sum_rows_kernel"]


def test_the_pairs_take_few_instructions(target: Target, compiled: Compiled) -> None:  # noqa: F811
    """Two predicted quantiles a thread against 8 targets, that is 16 pairs in a pass of the main loop."""
    if target.name not in ("sm_80", "sm_90"):
        pytest.skip("counted on sm_80 and sm_90")
    quantile_calls(make((512, 18, 200)))["forward"]()
    loop = main_loop(aot.machine_code(compiled[0].kernel), "FMNMX")
    assert len(instructions(loop)) <= 16 * 16


def test_numbers_reach_a_float64_kernel_in_memory(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As an argument it would be float32."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "dqn_fused._backends.triton_launch.run", lambda kernel, programs, *args, **meta: seen.extend(args)
    )
    quantile_calls(make((9, 3, 4), 7, torch.float64), kappa=0.3)["loss_and_grad"]()
    assert not any(isinstance(x, float) for x in seen)
    numbers = {x.item() for x in seen if isinstance(x, torch.Tensor) and x.dim() == 0}
    assert numbers >= {0.99, 1 / 0.3, 0.15, 1 / 7}
