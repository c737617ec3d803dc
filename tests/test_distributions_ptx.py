"""The distributional losses on executed PTX: what they move, what breaks them, far rows, illegal actions, any order."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from categorical_data import ready
from conftest import EXECUTED
from data import source
from torch import Tensor

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from distributions import CATEGORICAL, QUANTILE, Arguments, Family, every_family
from dqn_fused.kernels import distributions_launch
from mutations import TARGET, execute, kernels, loosen_each_guard, noticed, remove_each_barrier
from test_ptx_backends import far_rows

from bench.gpu_code.ptx.triton import executing
from dqn_fused._backends import triton_launch


def everything(family: Family, K: int) -> Arguments:
    g = source(80)
    n, A = 5, 3
    arguments = family.make((n, A, K), seed=80, targets=21) | {"weights": torch.rand(n, generator=g)}
    arguments["gamma"] = torch.rand(n, generator=g)
    arguments["next_action_mask"] = torch.rand((n, A), generator=g) < 0.7
    arguments[f"next_{family.input}_online"] = torch.randn((n, A, K), generator=g)
    if family is QUANTILE:
        arguments["taus"] = torch.rand((n, K), generator=g)
    return family.compact(arguments)


CASES = {
    "quantile": lambda: QUANTILE.run(QUANTILE.make((9, 3, 40), seed=81, targets=21)),
    "quantile-everything": lambda: QUANTILE.run(everything(QUANTILE, 40)),
    "categorical": lambda: CATEGORICAL.run(CATEGORICAL.make((9, 3, 21), seed=91)),
    "categorical-everything": lambda: CATEGORICAL.run(everything(CATEGORICAL, 21)),
    "hl_gauss": lambda: CATEGORICAL.run(ready((9, 3, 40), seed=92), projection="hl_gauss"),
}


@pytest.mark.parametrize(
    ("family", "K", "dtype", "values", "again"),
    [
        # All next values once to choose; each warp of a sample reads both rows, from the cache.
        (QUANTILE, 200, torch.float32, 1, 16),
        (QUANTILE, 64, torch.bfloat16, 1, 16),
        # 8 warps, and one of the rows twice.
        (CATEGORICAL, 51, torch.float32, 2, 32),
        (CATEGORICAL, 64, torch.bfloat16, 2, 32),
    ],
    ids=["quantile-200-float32", "quantile-64-bfloat16", "categorical-51-float32", "categorical-64-bfloat16"],
)
def test_nothing_of_the_pairs_is_written(family: Family, K: int, dtype: torch.dtype, values: int, again: int) -> None:
    """The forward writes the slopes, (n, K), and values of samples and programs; the backward the gradient, once."""
    n, A = 16, 18
    arguments = family.make((n, A, K), dtype, seed=82) | {"terminated": torch.zeros(n)}
    with executing("sm_90") as executor:
        calls = family.calls(arguments)
        calls["forward"]()
        calls["backward"]()
    forward, total, backward = executor.launches
    choice, row = n * A * K * dtype.itemsize, n * K * dtype.itemsize
    assert forward.counts["store_bytes"] == n * K * 4 + values * n * 4 + forward.programs * 4
    assert total.counts["store_bytes"] == 4
    assert backward.counts["store_bytes"] == choice
    assert choice <= forward.counts["load_bytes"] <= choice + again * row
    for launch in executor.launches:
        assert launch.counts["atomic"] == 0
        assert launch.counts["conflicts"] == 0 or family is CATEGORICAL


@every_family
def test_terminated_rows_and_illegal_actions_are_not_read(family: Family) -> None:
    arguments = family.make((8, 16, 64), seed=94) | {"terminated": torch.zeros(8)}
    arguments["next_action_mask"] = torch.ones(8, 16, dtype=torch.bool)
    moved = []
    for part in (1.0, 0.5, 0.25):
        arguments["terminated"][int(8 * max(part, 0.5)) :] = 1
        arguments["next_action_mask"][:, int(32 * part) :] = False
        with executing("sm_90") as executor:
            family.calls(arguments)["forward"]()
        moved.append(executor.launches[0].counts["load_bytes"])
    chosen = 8 * 16 * 64 * 4
    assert moved[1] <= moved[0] - 0.45 * chosen
    assert moved[2] <= moved[1] - 0.20 * chosen


@pytest.mark.parametrize("name", CASES)
def test_a_barrier_removed(name: str) -> None:
    # What another warp has not written yet may be taken for an index.
    remove_each_barrier(CASES[name], *["outside of every"] * (not name.startswith("quantile")))


@every_family
def test_a_maximum_that_drops_nan(family: Family) -> None:
    """max.NaN.f32 to max.f32: an action whose mean, or expectation, is NaN would not be chosen."""
    arguments = family.make((3, 3, 4), seed=83) | {"terminated": torch.zeros(3)}
    arguments[f"next_{family.input}"][1, 2, 1] = torch.nan

    def case() -> list[Tensor]:
        return family.run(arguments, reduction="none")

    expected, launches, _ = execute(case)
    assert expected[0].isnan().tolist() == [False, True, False]
    (text,) = (text for text, name in kernels(launches).items() if name == family.kernel)
    assert noticed(case, text, text.replace("max.NaN.f32", "max.f32"), expected) == "value"


@every_family
def test_a_mask_off_by_one(family: Family) -> None:
    loosen_each_guard(lambda: family.run(family.make((3, 3, 5), seed=84, targets=7)))


@pytest.mark.parametrize(
    ("family", "name"),
    [(QUANTILE, name) for name in ("quantiles", "next_quantiles", "next_quantiles_online", "taus")]
    + [(CATEGORICAL, name) for name in ("logits", "next_logits", "next_logits_online")],
    ids=lambda x: None if isinstance(x, Family) else x,
)
def test_rows_that_lie_far_apart(family: Family, name: str) -> None:
    """Offsets are int64 before the multiplication."""
    n, A, K = 3, 2, 5
    arguments = family.make((n, A, K), seed=85) | {f"next_{family.input}_online": torch.randn(n, A, K)}
    if family is QUANTILE:
        arguments["taus"] = torch.rand(n, K)
    shape = arguments[name].shape
    far = far_rows(n, 2 * K, 2**30)[:, : shape[1:].numel()].unflatten(1, shape[1:])
    if name == "taus":
        far.sigmoid_()
    with executing(TARGET):
        near = family.run(arguments | {name: far.clone()})
        assert all(map(torch.equal, family.run(arguments | {name: far}), near))


@every_family
def test_an_illegal_action_is_nan_and_nothing_else(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA nobody looks at the values: such a row is NaN, its gradient zero, and no memory outside is touched."""
    monkeypatch.setattr("dqn_fused.arguments.looks_at_values", lambda device: False)
    arguments = family.make((7, 3, 11), seed=97)
    illegal = torch.arange(7) % 3 == 1
    with executing(TARGET):
        expected = family.run(arguments, reduction="none")
        arguments["actions"][1], arguments["actions"][4] = 3, -1
        loss, td_error, gradient = family.run(arguments, reduction="none")
    assert torch.equal(loss.isnan(), illegal)
    assert torch.equal(td_error.isnan(), illegal)
    assert not gradient[illegal].any()
    for got, value in zip((loss, td_error, gradient), expected, strict=True):
        assert torch.equal(got[~illegal], value[~illegal])


@every_family
def test_a_mask_that_does_not_fit_is_nan(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many true entries as there are next states, or every sample is NaN; again nothing outside is touched."""
    monkeypatch.setattr("dqn_fused.arguments.looks_at_values", lambda device: False)
    arguments = family.compact(family.make((7, 3, 11), seed=98))
    name = f"next_{family.input}"
    with executing(TARGET):
        assert all(x.isfinite().all() for x in family.run(arguments, reduction="none"))
        arguments[name] = arguments[name][1:]
        loss, td_error, gradient = family.run(arguments, reduction="none")
    assert loss.isnan().all()
    assert td_error.isnan().all()
    assert not gradient.any()


@pytest.mark.parametrize(
    ("family", "shape"),
    [(QUANTILE, (12, 5, 40)), (QUANTILE, (1, 2, 600)), (CATEGORICAL, (12, 5, 21)), (CATEGORICAL, (2, 2, 300))],
    ids=lambda x: x.input if isinstance(x, Family) else str(x),
)
def test_the_same_bits_in_any_order(family: Family, shape: tuple[int, ...]) -> None:
    arguments = family.make(shape, seed=86)
    results = []
    for seed in range(3):
        with executing(TARGET, seed=1000 * seed):
            results.append(family.run(arguments))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("K", [1, 3, 40])
def test_the_backward_of_more_than_2_31_elements(K: int) -> None:
    """Its offsets are int64: the same gradient, here of a small one."""
    arguments = QUANTILE.make((7, 3, K), seed=87)
    with executing(TARGET) as executor:
        expected = QUANTILE.run(arguments)

        def far(*args: Any, **meta: Any) -> None:
            executor.run(*args, **meta | {"FAR": True} if "FAR" in meta else meta)

        with patch.object(triton_launch, "run", far):  # within, and so undone before the executor's own
            assert all(map(torch.equal, QUANTILE.run(arguments), expected))
    assert [x.arguments["FAR"] for x in executor.launches if "FAR" in x.arguments] == [False, True]


@pytest.mark.parametrize(
    ("family", "shape", "targets", "always"),
    [(QUANTILE, (6, 19, 300), 70, "CHOICE_BYTES"), (CATEGORICAL, (6, 19, 40), None, "CHOICE_TILES")],
    ids=["quantile", "categorical"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compacted", [False, True], ids=["terminated", "mask"])
def test_a_choice_in_a_launch_of_its_own(
    family: Family, shape: tuple[int, ...], targets: int | None, always: str, compacted: bool, reduction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What long rows and many actions take, and samples that are split: the same action, the same bits."""
    arguments = family.make(shape, seed=88, targets=targets)
    if compacted:
        arguments = family.compact(arguments)
    if family is CATEGORICAL and reduction == "none":
        arguments["support"] = torch.linspace(-5, 10, 40)
    with executing(TARGET) as executor:
        expected = family.loss_and_grad(**arguments, reduction=reduction, backend="triton")
        names = [launch.name for launch in executor.launches]
        monkeypatch.setattr(distributions_launch, always, 0)
        found = family.loss_and_grad(**arguments, reduction=reduction, backend="triton")
        assert [launch.name for launch in executor.launches[len(names) :]] == ["values_kernel", *names]
    sums = ["sum_kernel"] if reduction == "mean" else ["sum_rows_kernel"] * (family is QUANTILE)  # of split samples
    assert names == [family.kernel, *sums, "rows_bwd_kernel"]
    assert all(map(torch.equal, found, expected))
