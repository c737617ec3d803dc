"""The categorical losses compiled for GPUs that are not here: registers, 16-byte loads and stores, what they launch."""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED

triton = pytest.importorskip("triton")

from categorical_data import compact, make, ready  # noqa: E402
from test_loss import dtype_id  # noqa: E402
from test_triton_aot import (  # noqa: E402, F401
    Compiled,
    check_instructions,
    check_no_fusion,
    check_resources,
    compiled,
    target,
)

from bench.gpu_code.aot import (  # noqa: E402
    Target,
    categorical_calls,
    loads_128_bits,
    machine_code,
    stores_128_bits,
)
from bench.gpu_code.machine_code import instructions  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

FORWARD = ["categorical_fwd_kernel", "sum_kernel"]
CHOSEN_BEFORE = ["values_kernel", *FORWARD]
CASES: dict[str, tuple[tuple[int, ...], list[str]]] = {
    "atari": ((32, 18, 51), FORWARD),
    "atari_512": ((512, 18, 51), FORWARD),
    "cartpole": ((128, 2, 101), FORWARD),
    "quads": ((64, 18, 100), FORWARD),
    "many_rows": ((16384, 2, 21), FORWARD),
    "many_atoms": ((64, 18, 601), CHOSEN_BEFORE),
    "thousand_atoms": ((4, 2, 1030), FORWARD),
    "many_actions": ((4, 300, 64), CHOSEN_BEFORE),
    "one": ((1, 1, 2), ["categorical_fwd_kernel"]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(compiled: Compiled, target: Target, dtype: torch.dtype, wide: bool = False) -> None:  # noqa: F811
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=dtype is torch.float64)
        check_no_fusion(name, kernel)
        if name == "rows_bwd_kernel" and (dtype.itemsize >= 4 or target.name.startswith("sm_")):
            assert stores_128_bits(kernel) or not wide, "the gradient is not written 16 bytes at a time"
        if name == "values_kernel" or (
            name == "categorical_fwd_kernel" and "values_kernel" not in [x[0] for x in compiled]
        ):
            assert loads_128_bits(kernel) or not wide, "the next logits are not read 16 bytes at a time"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(target: Target, compiled: Compiled, case: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Rows of 100 float32 are read 16 bytes at a time although 100 is no multiple of 16, as Triton would ask."""
    shape, kernels = CASES[case]
    calls = categorical_calls(make(shape, dtype))
    calls["forward"]()
    assert [name for name, *_ in compiled] == kernels
    calls["backward"]()
    assert compiled[-1].name == "rows_bwd_kernel"
    calls["loss_and_grad"]()
    # With the 512 threads of CDNA for many actions, less than 8 elements are left for each.
    enough = case == "quads" or (case == "many_actions" and not (target.name == "gfx942" and dtype.itemsize == 2))
    check(compiled, target, dtype, wide=enough and shape[2] * dtype.itemsize % 16 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("K", [51, 255])
@pytest.mark.parametrize("projection", ["two_hot", "hl_gauss"])
def test_a_ready_target(
    target: Target,  # noqa: F811
    compiled: Compiled,  # noqa: F811
    projection: str,
    K: int,
    dtype: torch.dtype,
) -> None:
    for call in categorical_calls(ready((96, 6, K), dtype), projection=projection).values():
        call()
    check(compiled, target, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(
    "variant", ["everything", "mask", "values", "values64", "atoms", "strided", "gamma_scalar", "none"]
)
def test_variants(target: Target, compiled: Compiled, variant: str, dtype: torch.dtype) -> None:  # noqa: F811
    n, A, K = 24, 6, 51
    arguments, options = make((n, A, K), dtype), {}
    if variant in ("everything", "mask"):
        arguments |= {"weights": torch.rand(n), "gamma": torch.rand(n), "next_logits_online": torch.randn(n, A, K)}
        arguments["next_action_mask"] = torch.rand(n, A) < 0.5
    if variant == "mask":
        arguments = compact(arguments)
    elif variant == "values":
        arguments["next_logits_online"] = torch.randn(n, A)
    elif variant == "values64":
        arguments["next_logits_online"] = torch.randn(n, A).double()
    elif variant == "atoms":
        arguments["support"] = torch.linspace(-1, 1, K, dtype=dtype)
    elif variant == "strided":
        arguments["logits"] = torch.randn(K, n, A).to(dtype).permute(1, 2, 0)
        arguments["next_logits"] = torch.randn(n, A, 2 * K).to(dtype)[:, :, ::2]
    elif variant == "gamma_scalar":
        arguments["gamma"] = torch.tensor(0.9)
    elif variant == "none":
        options["reduction"] = "none"
    for call in categorical_calls(arguments, **options).values():
        call()
    check(compiled, target, torch.float64 if variant == "values64" else dtype)


def test_an_atari_batch_is_a_few_instructions(target: Target, compiled: Compiled) -> None:  # noqa: F811
    """8 warps, each of which reads 2 or 3 of the 18 rows of 51 logits at once and makes 16 pairs a thread in a pass."""
    if target.name not in ("sm_80", "sm_90"):
        pytest.skip("counted on sm_80 and sm_90")
    categorical_calls(make((32, 18, 51)))["forward"]()
    assert compiled[0].programs == 32
    assert len(instructions(machine_code(compiled[0].kernel))) <= 2000


def test_numbers_reach_a_float64_kernel_in_memory(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As an argument it would be float32."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "dqn_fused._backends.triton_launch.run", lambda kernel, programs, *args, **meta: seen.extend(args)
    )
    categorical_calls(make((9, 3, 4), torch.float64))["loss_and_grad"]()
    categorical_calls(ready((9, 3, 4), torch.float64), projection="hl_gauss", sigma=0.3)["loss_and_grad"]()
    assert not any(isinstance(x, float) for x in seen)
    numbers = {x.item() for x in seen if isinstance(x, torch.Tensor) and x.dim() == 0}
    assert numbers >= {0.99, -5.0, 10.0, 5.0, 1 / (0.3 * 2**0.5)}
