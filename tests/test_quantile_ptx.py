"""The quantile loss on executed PTX: what it moves, what breaks it, offsets beyond int32, any order of programs."""

import re
from typing import Any

import pytest
import torch
from conftest import EXECUTED
from data import source
from quantile_data import compact, make
from torch import Tensor

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from dqn_fused.kernels import distributions_launch
from test_ptx_backends import far_rows
from test_ptx_mutations import TARGET, execute, kernels, needed, noticed, without

from bench.gpu_code.aot import quantile_calls
from bench.gpu_code.ptx.triton import executing
from dqn_fused import fused_quantile_loss, fused_quantile_loss_and_grad
from dqn_fused._backends import triton_launch


def run(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Loss, TD errors and the gradient, by a forward and a backward."""
    x = arguments["quantiles"].detach().requires_grad_()
    given = {**arguments, "quantiles": x, "return_td_error": True, "backend": "triton"}
    loss, td_error = fused_quantile_loss(**given, **options)
    return [loss.detach(), td_error, torch.autograd.grad(loss.sum(), x)[0]]


def everything() -> dict[str, Any]:
    g = source(80)
    arguments = make((5, 3, 40), 21, seed=80) | {"weights": torch.rand(5, generator=g)}
    arguments["next_action_mask"] = torch.rand((5, 3), generator=g) < 0.7
    arguments["taus"] = torch.rand((5, 40), generator=g)
    return compact(arguments)


CASES = {"plain": lambda: run(make((9, 3, 40), 21, seed=81)), "everything": lambda: run(everything())}


@pytest.mark.parametrize(("K", "dtype"), [(200, torch.float32), (64, torch.bfloat16)])
def test_nothing_of_the_pairs_is_written(K: int, dtype: torch.dtype) -> None:
    """The forward writes the slopes, (n, K), and values of samples and programs; the backward the gradient, once."""
    n, A = 16, 18
    arguments = make((n, A, K), K, dtype, seed=82) | {"terminated": torch.zeros(n)}
    with executing("sm_90") as executor:
        calls = quantile_calls(arguments)
        calls["forward"]()
        calls["backward"]()
    forward, total, backward = executor.launches
    choice, row = n * A * K * dtype.itemsize, n * K * dtype.itemsize
    assert forward.counts["store_bytes"] == n * K * 4 + n * 4 + forward.programs * 4
    assert total.counts["store_bytes"] == 4
    assert backward.counts["store_bytes"] == choice
    # All next quantiles once to choose; of a sample, each of its warps reads both rows, from the cache.
    assert choice <= forward.counts["load_bytes"] <= choice + 16 * row
    for launch in executor.launches:
        assert launch.counts["atomic"] == launch.counts["conflicts"] == 0


@pytest.mark.parametrize("name", CASES)
def test_a_barrier_removed(name: str) -> None:
    """Each that orders anything in this launch."""
    expected, launches, traces = execute(CASES[name], trace=True)
    removed = 0
    for launch, trace in zip(launches, traces, strict=True):
        text, ordering = launch.kernel.asm["ptx"], needed(launch, trace)
        for match in re.finditer(r"^\s*bar\.sync\s+0;", text, re.MULTILINE):
            if text[: match.end()].count("\n") + 1 in ordering:
                message = noticed(CASES[name], text, without(text, match), expected)
                assert message is not None
                assert "race" in message or "never written" in message or message == "value"
                removed += 1
    assert removed


def test_a_maximum_that_drops_nan() -> None:
    """max.NaN.f32 to max.f32: an action whose mean is NaN would not be chosen."""
    arguments = make((3, 3, 4), seed=83) | {"terminated": torch.zeros(3)}
    arguments["next_quantiles"][1, 2, 1] = torch.nan

    def case() -> list[Tensor]:
        return run(arguments, reduction="none")

    expected, launches, _ = execute(case)
    assert expected[0].isnan().tolist() == [False, True, False]
    (text,) = (text for text, name in kernels(launches).items() if name == "quantile_fwd_kernel")
    assert noticed(case, text, text.replace("max.NaN.f32", "max.f32"), expected) == "value"


def test_a_mask_off_by_one() -> None:
    """< to <= where an access is guarded."""

    def case() -> list[Tensor]:
        return run(make((3, 3, 5), 7, seed=84))

    expected, launches, _ = execute(case)
    for text, name in kernels(launches).items():
        messages = []
        for match in re.finditer(r"setp\.lt\.s(?:32|64)\s+%p\d+, ", text):
            mutated = text[: match.start()] + match[0].replace("lt", "le") + text[match.end() :]
            messages.append(noticed(case, text, mutated, expected))
        assert any("outside of every tensor" in (message or "") for message in messages), name


@pytest.mark.parametrize("name", ["quantiles", "next_quantiles", "next_quantiles_online", "taus"])
def test_rows_that_lie_far_apart(name: str) -> None:
    """Offsets are int64 before the multiplication."""
    n, A, K = 3, 2, 5
    arguments = make((n, A, K), K, seed=85) | {"next_quantiles_online": torch.randn(n, A, K), "taus": torch.rand(n, K)}
    shape = arguments[name].shape
    far = far_rows(n, 2 * K, 2**30)[:, : shape[1:].numel()].unflatten(1, shape[1:])
    if name == "taus":
        far.sigmoid_()
    with executing(TARGET):
        near = run(arguments | {name: far.clone()})
        assert all(map(torch.equal, run(arguments | {name: far}), near))


@pytest.mark.parametrize("shape", [(12, 5, 40), (1, 2, 600)], ids=str)
def test_the_same_bits_in_any_order(shape: tuple[int, ...]) -> None:
    arguments = make(shape, seed=86)
    results = []
    for seed in range(3):
        with executing(TARGET, seed=1000 * seed):
            results.append(run(arguments))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("K", [1, 3, 40])
def test_the_backward_of_more_than_2_31_elements(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offsets are int64: the same gradient, here of a small one."""
    arguments = make((7, 3, K), seed=87)
    with executing(TARGET) as executor:
        expected = run(arguments)

        def far(*args: Any, **meta: Any) -> None:
            executor.run(*args, **meta | {"FAR": True} if "FAR" in meta else meta)

        monkeypatch.setattr(triton_launch, "run", far)
        assert all(map(torch.equal, run(arguments), expected))
    assert [x.arguments["FAR"] for x in executor.launches if "FAR" in x.arguments] == [False, True]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
def test_a_choice_in_a_launch_of_its_own(form: Any, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What long rows take, and samples that are split: the same action, the same bits."""
    arguments = form(make((6, 19, 300), 70, seed=88))
    with executing(TARGET) as executor:
        expected = fused_quantile_loss_and_grad(**arguments, reduction=reduction, backend="triton")
        names = [launch.name for launch in executor.launches]
        monkeypatch.setattr(distributions_launch, "CHOICE_BYTES", 0)
        found = fused_quantile_loss_and_grad(**arguments, reduction=reduction, backend="triton")
        assert [launch.name for launch in executor.launches[len(names) :]] == ["values_kernel", *names]
    assert names == [
        "quantile_fwd_kernel",
        "sum_kernel" if reduction == "mean" else "sum_rows_kernel",
        "rows_bwd_kernel",
    ]
    assert all(map(torch.equal, found, expected))
