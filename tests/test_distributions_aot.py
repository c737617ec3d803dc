"""The distributional losses compiled for GPUs that are not here: registers, 16-byte loads and stores, the launches."""

from typing import Any, NamedTuple

import pytest
import torch
from categorical_data import ready
from conftest import INTERPRETED
from test_loss import dtype_id

triton = pytest.importorskip("triton")

from ahead import (  # noqa: E402
    Compiled,
    check_instructions,
    check_no_fusion,
    check_resources,
    compiled,  # noqa: F401
    target,  # noqa: F401
)
from distributions import CATEGORICAL, QUANTILE, Arguments, Family, every_family  # noqa: E402

from bench.gpu_code.aot import Target, loads_128_bits, machine_code, stores_128_bits  # noqa: E402
from bench.gpu_code.machine_code import instructions, main_loop  # noqa: E402

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


NEVER = 16


class Case(NamedTuple):
    family: Family
    shape: tuple[int, ...]  # samples, actions, quantiles or atoms
    targets: int | None = None  # quantiles of the next states, where they are not as many
    chosen_before: bool = False  # the next action, in a launch of its own
    summed: bool = True  # in a launch of its own
    # From which size of an element on rows are read 16 bytes at a time. A program has as many threads as elements, or,
    # with the 256 and more threads of CDNA, less than 8 elements for each.
    wide_from: int = 2
    wide_from_on_cdna: int = 2

    def kernels(self) -> list[str]:
        return ["values_kernel"] * self.chosen_before + [self.family.kernel] + ["sum_kernel"] * self.summed

    def wide(self, target: Target, dtype: torch.dtype) -> bool:
        """Whether next values are read 16 bytes at a time: 200 float32 too, though 200 is no multiple of 16."""
        least = max(self.wide_from, self.wide_from_on_cdna if target.name.startswith("gfx9") else 0)
        sizes = self.shape[2], self.targets or self.shape[2]
        return dtype.itemsize >= least and all(size * dtype.itemsize % 16 == 0 for size in sizes)


CASES = {
    "quantile-atari": Case(QUANTILE, (32, 18, 200)),
    "quantile-atari_512": Case(QUANTILE, (512, 18, 200)),
    "quantile-small": Case(QUANTILE, (128, 2, 50), wide_from=NEVER),
    "quantile-iqn": Case(QUANTILE, (32, 18, 64)),
    "quantile-odd": Case(QUANTILE, (100, 5, 51), 37),
    "quantile-many_rows": Case(QUANTILE, (16384, 6, 8), wide_from=4),
    "quantile-one": Case(QUANTILE, (1, 1, 1), summed=False),
    "quantile-long_rows": Case(QUANTILE, (4, 300, 128), chosen_before=True),
    "categorical-atari": Case(CATEGORICAL, (32, 18, 51), wide_from=NEVER),
    "categorical-atari_512": Case(CATEGORICAL, (512, 18, 51), wide_from=NEVER),
    "categorical-cartpole": Case(CATEGORICAL, (128, 2, 101), wide_from=NEVER),
    "categorical-quads": Case(CATEGORICAL, (64, 18, 100)),
    "categorical-many_rows": Case(CATEGORICAL, (16384, 2, 21), wide_from=NEVER),
    "categorical-many_atoms": Case(CATEGORICAL, (64, 18, 601), chosen_before=True, wide_from=NEVER),
    "categorical-thousand_atoms": Case(CATEGORICAL, (4, 2, 1030), wide_from=NEVER),
    "categorical-many_actions": Case(CATEGORICAL, (4, 300, 64), chosen_before=True, wide_from_on_cdna=4),
    "categorical-one": Case(CATEGORICAL, (1, 1, 2), summed=False, wide_from=NEVER),
}


def check(compiled: Compiled, target: Target, dtype: torch.dtype, wide: bool = False) -> None:
    names = [name for name, *_ in compiled]
    for name, kernel, *_ in compiled:
        check_resources(name, kernel, target)
        check_instructions(name, kernel, target, float64=dtype is torch.float64)
        check_no_fusion(name, kernel)
        if not wide:
            continue
        if name == "rows_bwd_kernel" and (dtype.itemsize >= 4 or target.name.startswith("sm_")):
            assert stores_128_bits(kernel), "the gradient is not written 16 bytes at a time"
        chooses = name in (QUANTILE.kernel, CATEGORICAL.kernel) and "values_kernel" not in names
        if name == "values_kernel" or chooses:
            assert loads_128_bits(kernel), "the next values are not read 16 bytes at a time"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(target: Target, compiled: Compiled, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    calls = case.family.calls(case.family.make(case.shape, dtype, targets=case.targets))
    calls["forward"]()
    assert [name for name, *_ in compiled] == case.kernels()
    calls["backward"]()
    assert compiled[-1].name == "rows_bwd_kernel"
    calls["loss_and_grad"]()
    check(compiled, target, dtype, case.wide(target, dtype))


VARIANTS = ["everything", "mask", "values", "values64", "strided", "gamma_scalar", "none"]
OF_QUANTILES = ["kappa_0", "taus"]
OF_LOGITS = ["atoms"]


def variant(family: Family, name: str, dtype: torch.dtype) -> tuple[Arguments, dict[str, Any]]:
    """Arguments and options of a loss."""
    n, A, K = 24, 6, 51
    arguments, options = family.make((n, A, K), dtype, targets=37), {}
    if name in ("everything", "mask"):
        arguments |= {"weights": torch.rand(n), "gamma": torch.rand(n)}
        arguments["next_action_mask"] = torch.rand(n, A) < 0.5
        if family is QUANTILE:
            arguments |= {"next_quantiles_online": torch.randn(n, A, 32).to(dtype), "taus": torch.rand(n, K)}
            options["quantile_reduction"] = "mean"
        else:
            arguments["next_logits_online"] = torch.randn(n, A, K)
    if name == "mask":
        arguments = family.compact(arguments)
    elif name.startswith("values"):
        values = torch.randn(n, A)
        arguments[f"next_{family.input}_online"] = values.double() if name == "values64" else values
    elif name == "strided":
        following = arguments[f"next_{family.input}"]
        arguments[family.input] = torch.randn(K, n, A).to(dtype).permute(1, 2, 0)
        arguments[f"next_{family.input}"] = torch.cat([following, following], 2)[:, :, ::2]
    elif name == "gamma_scalar":
        arguments["gamma"] = torch.tensor(0.9)
    elif name == "none":
        options["reduction"] = "none"
    elif name == "kappa_0":
        options["kappa"] = 0.0
    elif name == "taus":
        arguments["taus"] = torch.rand(K)
    elif name == "atoms":
        arguments["support"] = torch.linspace(-1, 1, K, dtype=dtype)
    return arguments, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(
    ("family", "name"),
    [(QUANTILE, name) for name in VARIANTS + OF_QUANTILES] + [(CATEGORICAL, name) for name in VARIANTS + OF_LOGITS],
    ids=lambda x: x.input if isinstance(x, Family) else x,
)
def test_variants(target: Target, compiled: Compiled, family: Family, name: str, dtype: torch.dtype) -> None:
    if triton.__version__.startswith("3.7.") and (family, name, dtype) == (CATEGORICAL, "strided", torch.float64):
        pytest.xfail("only Triton 3.7 takes up to 168 registers for strided float64 logits, 3.6, 3.8 and 3.9 up to 86")
    arguments, options = variant(family, name, dtype)
    for call in family.calls(arguments, **options).values():
        call()
    check(compiled, target, torch.float64 if name == "values64" else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("K", [51, 255])
@pytest.mark.parametrize("projection", ["two_hot", "hl_gauss"])
def test_a_ready_target(target: Target, compiled: Compiled, projection: str, K: int, dtype: torch.dtype) -> None:
    for call in CATEGORICAL.calls(ready((96, 6, K), dtype), projection=projection).values():
        call()
    check(compiled, target, dtype)


def test_few_samples_of_many_quantiles_are_split(target: Target, compiled: Compiled) -> None:
    """32 samples would fill a quarter of a device: four programs a sample, each of which chooses by itself."""
    QUANTILE.calls(QUANTILE.make((32, 18, 200)))["forward"]()
    assert compiled[0].programs == 4 * 32
    compiled.clear()
    QUANTILE.calls(QUANTILE.make((512, 18, 200)))["forward"]()
    assert compiled[0].programs == 512
    compiled.clear()
    QUANTILE.calls(QUANTILE.make((32, 18, 200)), reduction="none")["forward"]()
    assert [name for name, *_ in compiled] == ["quantile_fwd_kernel", "sum_rows_kernel"]


def test_the_pairs_take_few_instructions(target: Target, compiled: Compiled) -> None:
    """Two predicted quantiles a thread against 8 targets, that is 16 pairs in a pass of the main loop."""
    if target.name not in ("sm_80", "sm_90"):
        pytest.skip("counted on sm_80 and sm_90")
    QUANTILE.calls(QUANTILE.make((512, 18, 200)))["forward"]()
    loop = main_loop(machine_code(compiled[0].kernel), "FMNMX")
    assert len(instructions(loop)) <= 16 * 16


def test_an_atari_batch_is_a_few_instructions(target: Target, compiled: Compiled) -> None:
    """8 warps, each of which reads 2 or 3 of the 18 rows of 51 logits at once and makes 16 pairs a thread in a pass."""
    if target.name not in ("sm_80", "sm_90"):
        pytest.skip("counted on sm_80 and sm_90")
    CATEGORICAL.calls(CATEGORICAL.make((32, 18, 51)))["forward"]()
    assert compiled[0].programs == 32
    assert len(instructions(machine_code(compiled[0].kernel))) <= 2000


@every_family
def test_numbers_reach_a_float64_kernel_in_memory(
    target: Target, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an argument it would be float32."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "dqn_fused._backends.triton_launch.run", lambda kernel, programs, *args, **meta: seen.extend(args)
    )
    arguments = family.make((9, 3, 4), torch.float64, targets=7)
    if family is QUANTILE:
        family.calls(arguments, kappa=0.3)["loss_and_grad"]()
        expected = {0.99, 1 / 0.3, 0.15, 1 / 7}
    else:
        family.calls(arguments)["loss_and_grad"]()
        family.calls(ready((9, 3, 4), torch.float64), projection="hl_gauss", sigma=0.3)["loss_and_grad"]()
        expected = {0.99, -5.0, 10.0, 5.0, 1 / (0.3 * 2**0.5)}
    assert not any(isinstance(x, float) for x in seen)
    assert {x.item() for x in seen if isinstance(x, torch.Tensor) and x.dim() == 0} >= expected
