"""The categorical losses on executed PTX: what they move, what breaks them, far rows, illegal actions, any order."""

import re
from typing import Any

import pytest
import torch
from categorical_data import compact, make, ready
from conftest import EXECUTED
from data import source
from torch import Tensor

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from dqn_fused.kernels import distributions_launch
from test_ptx_backends import far_rows
from test_ptx_mutations import TARGET, execute, kernels, needed, noticed, without

from bench.gpu_code.aot import categorical_calls
from bench.gpu_code.ptx.triton import executing
from dqn_fused import fused_categorical_loss, fused_categorical_loss_and_grad, fused_categorical_td_loss


def run(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Loss, TD errors and the gradient, by a forward and a backward."""
    x = arguments["logits"].detach().requires_grad_()
    function = fused_categorical_td_loss if "target" in arguments else fused_categorical_loss
    given = {**arguments, "logits": x, "return_td_error": True, "backend": "triton"}
    loss, td_error = function(**given, **options)
    return [loss.detach(), td_error, torch.autograd.grad(loss.sum(), x)[0]]


def everything() -> dict[str, Any]:
    g = source(90)
    arguments = make((5, 3, 21), seed=90) | {"weights": torch.rand(5, generator=g), "gamma": torch.rand(5, generator=g)}
    arguments["next_action_mask"] = torch.rand((5, 3), generator=g) < 0.7
    arguments["next_logits_online"] = torch.randn((5, 3, 21), generator=g)
    return compact(arguments)


CASES = {
    "plain": lambda: run(make((9, 3, 21), seed=91)),
    "everything": lambda: run(everything()),
    "hl_gauss": lambda: run(ready((9, 3, 40), seed=92), projection="hl_gauss"),
}


@pytest.mark.parametrize(("K", "dtype"), [(51, torch.float32), (64, torch.bfloat16)])
def test_nothing_of_the_pairs_is_written(K: int, dtype: torch.dtype) -> None:
    """The forward writes the slopes, (n, K), and values of samples and programs; the backward the gradient, once."""
    n, A = 16, 18
    arguments = make((n, A, K), dtype, seed=93) | {"terminated": torch.zeros(n)}
    with executing("sm_90") as executor:
        calls = categorical_calls(arguments)
        calls["forward"]()
        calls["backward"]()
    forward, total, backward = executor.launches
    choice, row = n * A * K * dtype.itemsize, n * K * dtype.itemsize
    assert forward.counts["store_bytes"] == n * K * 4 + 2 * n * 4 + forward.programs * 4
    assert total.counts["store_bytes"] == 4
    assert backward.counts["store_bytes"] == choice
    # All next logits once to choose; of a sample, each of its 8 warps may read both rows, one of them twice.
    assert choice <= forward.counts["load_bytes"] <= choice + 32 * row
    for launch in executor.launches:
        assert launch.counts["atomic"] == 0


def test_terminated_rows_and_illegal_actions_are_not_read() -> None:
    arguments = make((8, 16, 64), seed=94) | {"terminated": torch.zeros(8)}
    arguments["next_action_mask"] = torch.ones(8, 16, dtype=torch.bool)
    moved = []
    for part in (1.0, 0.5, 0.25):
        arguments["terminated"][int(8 * max(part, 0.5)) :] = 1
        arguments["next_action_mask"][:, int(32 * part) :] = False
        with executing("sm_90") as executor:
            categorical_calls(arguments)["forward"]()
        moved.append(executor.launches[0].counts["load_bytes"])
    chosen = 8 * 16 * 64 * 4
    assert moved[1] <= moved[0] - 0.45 * chosen
    assert moved[2] <= moved[1] - 0.20 * chosen


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
                # What another warp has not written yet may be taken for an index.
                assert message == "value" or any(x in message for x in ("race", "never written", "outside of every"))
                removed += 1
    assert removed


def test_a_maximum_that_drops_nan() -> None:
    """max.NaN.f32 to max.f32: an action whose expectation is NaN would not be chosen."""
    arguments = make((3, 3, 4), seed=95) | {"terminated": torch.zeros(3)}
    arguments["next_logits"][1, 2, 1] = torch.nan

    def case() -> list[Tensor]:
        return run(arguments, reduction="none")

    expected, launches, _ = execute(case)
    assert expected[0].isnan().tolist() == [False, True, False]
    (text,) = (text for text, name in kernels(launches).items() if name == "categorical_fwd_kernel")
    assert noticed(case, text, text.replace("max.NaN.f32", "max.f32"), expected) == "value"


@pytest.mark.parametrize("name", ["logits", "next_logits", "next_logits_online"])
def test_rows_that_lie_far_apart(name: str) -> None:
    """Offsets are int64 before the multiplication."""
    n, A, K = 3, 2, 5
    arguments = make((n, A, K), seed=96) | {"next_logits_online": torch.randn(n, A, K)}
    far = far_rows(n, 2 * K, 2**30)[:, : A * K].unflatten(1, (A, K))
    with executing(TARGET):
        near = run(arguments | {name: far.clone()})
        assert all(map(torch.equal, run(arguments | {name: far}), near))


def test_an_illegal_action_is_nan_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA nobody looks at the values: such a row is NaN, its gradient zero, and no memory outside is touched."""
    monkeypatch.setattr("dqn_fused.arguments.looks_at_values", lambda device: False)
    arguments = make((7, 3, 11), seed=97)
    illegal = torch.arange(7) % 3 == 1
    with executing(TARGET):
        expected = run(arguments, reduction="none")
        arguments["actions"][1], arguments["actions"][4] = 3, -1
        loss, td_error, gradient = run(arguments, reduction="none")
    assert torch.equal(loss.isnan(), illegal)
    assert torch.equal(td_error.isnan(), illegal)
    assert not gradient[illegal].any()
    for got, value in zip((loss, td_error, gradient), expected, strict=True):
        assert torch.equal(got[~illegal], value[~illegal])


def test_a_mask_that_does_not_fit_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many true entries as there are next states, or every sample is NaN; again nothing outside is touched."""
    monkeypatch.setattr("dqn_fused.arguments.looks_at_values", lambda device: False)
    arguments = compact(make((7, 3, 11), seed=98))
    with executing(TARGET):
        assert all(x.isfinite().all() for x in run(arguments, reduction="none"))
        arguments["next_logits"] = arguments["next_logits"][1:]
        loss, td_error, gradient = run(arguments, reduction="none")
    assert loss.isnan().all()
    assert td_error.isnan().all()
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(12, 5, 21), (2, 2, 300)], ids=str)
def test_the_same_bits_in_any_order(shape: tuple[int, ...]) -> None:
    arguments = make(shape, seed=99)
    results = []
    for seed in range(3):
        with executing(TARGET, seed=1000 * seed):
            results.append(run(arguments))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize(("form", "reduction"), [(dict, "mean"), (compact, "none")], ids=["terminated", "mask"])
def test_a_choice_in_a_launch_of_its_own(form: Any, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many actions take: the same action, the same bits."""
    arguments = form(make((6, 19, 40), seed=100))
    if reduction == "none":
        arguments["support"] = torch.linspace(-5, 10, 40)
    with executing(TARGET) as executor:
        expected = fused_categorical_loss_and_grad(**arguments, reduction=reduction, backend="triton")
        names = [launch.name for launch in executor.launches]
        monkeypatch.setattr(distributions_launch, "CHOICE_TILES", 0)
        found = fused_categorical_loss_and_grad(**arguments, reduction=reduction, backend="triton")
        assert [launch.name for launch in executor.launches[len(names) :]] == ["values_kernel", *names]
    assert names == ["categorical_fwd_kernel", *["sum_kernel"] * (reduction == "mean"), "rows_bwd_kernel"]
    assert all(map(torch.equal, found, expected))
