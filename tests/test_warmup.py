"""warmup: what happens once happens in it, and nothing else does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import categorical_data
import pytest
import quantile_data
import torch
from conftest import INTERPRETED, Setting, distributional_settings
from data import source
from test_family import compacted, on, variant

from dqn_fused import (
    FusedCategoricalLoss,
    FusedCategoricalTDLoss,
    FusedDQNLoss,
    FusedLinearDQNLoss,
    FusedQuantileLoss,
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
    fused_dqn_loss,
    fused_dqn_loss_and_grad,
    fused_linear_dqn_loss,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
    fused_td_loss,
    warmup,
)

NAMES = ["double-mask-weights-huber", "munchausen-cql-masks-weights-huber"]


def compiled_kernels(setting: Setting) -> int:
    """How many binaries Triton holds."""
    if setting.backend != "triton" or INTERPRETED:
        return 0
    from bench.gpu_code.host import kernels

    assert len(set(kernels())) == 13
    return sum(len(caches[0]) for kernel in set(kernels()) for caches in kernel.device_caches.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 130)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_compile(setting: Setting, name: str, shape: tuple[int, int], reduction: str) -> None:
    """An odd offset in memory, another binary than for an aligned tensor, is kept."""
    given = on(setting, variant(name, shape))
    given["next_q"] = torch.cat([given["next_q"].flatten(), given["next_q"].flatten()])[1:].as_strided(
        shape, (shape[1], 1)
    )
    options = {"reduction": reduction, "backend": setting.backend}
    warmup(**given, **options)
    before = compiled_kernels(setting)
    q = given["q"].detach().requires_grad_()
    loss = fused_dqn_loss(**{**given, "q": q}, **options)
    torch.autograd.grad(loss, q, torch.ones_like(loss))
    fused_dqn_loss_and_grad(**given, **options)
    assert before == compiled_kernels(setting)


def linear(**more: Any) -> dict[str, Any]:
    g = source(7)
    n, A, D = 7, 41, 16
    matrices = {name: torch.randn(n, D, generator=g) for name in ("hidden", "next_hidden")}
    matrices |= {name: torch.randn(A, D, generator=g) for name in ("weight", "next_weight")}
    actions, rewards = torch.randint(A, (n,), generator=g), torch.randn(n, generator=g)
    return {**matrices, "actions": actions, "rewards": rewards, "bias": torch.randn(A, generator=g), **more}


class Loss(NamedTuple):
    function: Callable[..., Any]
    and_grad: Callable[..., Any] | None
    learned: tuple[str, ...]
    make: Callable[[], dict[str, Any]]
    kernels: int  # of Triton, at least


LOSSES = {
    "td": Loss(
        fused_td_loss, None, ("q",),
        lambda: {"q": torch.randn(7, 5), "actions": torch.arange(7) % 5, "target": torch.randn(7)}, 2,
    ),
    "quantile": Loss(
        fused_quantile_loss, fused_quantile_loss_and_grad, ("quantiles",),
        lambda: quantile_data.make((7, 3, 12), 5) | {"kappa": 0.3, "taus": torch.rand(7, 12)}, 2,
    ),
    "quantile-mask": Loss(
        fused_quantile_loss, fused_quantile_loss_and_grad, ("quantiles",),
        lambda: quantile_data.compact(quantile_data.make((7, 3, 12), 5)), 2,
    ),
    "categorical": Loss(
        fused_categorical_loss, fused_categorical_loss_and_grad, ("logits",),
        lambda: categorical_data.make((7, 3, 11)), 2,
    ),
    "categorical-mask-atoms": Loss(
        fused_categorical_loss, fused_categorical_loss_and_grad, ("logits",),
        lambda: categorical_data.compact(categorical_data.make((7, 3, 11))) | {"support": torch.linspace(-1, 1, 11)}, 2,
    ),
    "categorical-td": Loss(
        fused_categorical_td_loss, fused_categorical_td_loss_and_grad, ("logits",),
        lambda: categorical_data.ready((7, 3, 11)) | {"projection": "hl_gauss"}, 2,
    ),
    "linear": Loss(fused_linear_dqn_loss, None, ("hidden", "weight", "bias"), linear, 2),
    "linear-cql": Loss(
        fused_linear_dqn_loss, None, ("hidden", "weight", "bias"), lambda: linear(cql_alpha=0.5), 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", distributional_settings("quantile"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_another_loss_is_left_to_compile(backend: Setting, name: str, reduction: str) -> None:
    """Whatever the tensors hold, and as functions that have no counterpart with the gradient."""
    function, and_grad, learned, make, _ = LOSSES[name]
    given, options = on(backend, make()), {"reduction": reduction, "backend": backend.backend}
    unfilled = given | {"actions": torch.full_like(given["actions"], 2**62)}
    if "non_final_mask" in given:
        unfilled["non_final_mask"] = torch.ones_like(given["non_final_mask"])
    warmup(function, **unfilled, **options)
    before = compiled_kernels(backend)
    inputs = [given[name].detach().requires_grad_() for name in learned]
    loss = function(**{**given, **dict(zip(learned, inputs, strict=True))}, **options)
    torch.autograd.grad(loss, inputs, torch.ones_like(loss))
    if and_grad is not None:
        and_grad(**given, **options)
    assert before == compiled_kernels(backend)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("name", LOSSES)
def test_it_compiles(name: str) -> None:
    """On a driver that launches nothing, from nothing: else the test above would hold of a warmup that does nothing."""
    pytest.importorskip("triton")
    from bench.gpu_code import aot, host

    function, _, _, make, kernels = LOSSES[name]
    launched = []
    with host.launching("sm_90", lambda *given: launched.append(given[4])), aot.serving_cpu():
        warmup(function, **make(), backend="triton")
    assert len(set(launched)) >= kernels


@pytest.mark.parametrize(
    "module",
    [
        FusedDQNLoss(loss="huber"),
        FusedQuantileLoss(),
        FusedCategoricalLoss(support=(-1.0, 1.0)),
        FusedCategoricalTDLoss(support=(-1.0, 1.0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules(module: torch.nn.Module) -> None:
    shape = (7, 3) if isinstance(module, FusedDQNLoss) else (7, 3, 11)
    x, actions, values = torch.randn(shape), torch.arange(7) % 3, torch.randn(7)
    assert warmup(module, x, actions, values, *([] if isinstance(module, FusedCategoricalTDLoss) else [x])) is None


def test_the_module_of_the_linear_head() -> None:
    head, hidden = torch.nn.Linear(4, 9), torch.randn(7, 4)
    warmup(FusedLinearDQNLoss(cql_alpha=0.5), head, hidden, torch.arange(7), torch.randn(7), head, hidden)
    assert head.weight.grad is None


def test_an_unknown_argument_is_named() -> None:
    """It was called "unknown", which is what holds it in the signature."""
    given = variant(NAMES[0], (7, 5))
    with pytest.raises(TypeError, match="'dones'"):
        warmup(**given, dones=given["terminated"])


def test_it_leaves_no_trace(setting: Setting) -> None:
    given = on(setting, variant(NAMES[1], (7, 5)))
    given["q"].requires_grad_()
    q = given["q"] * 1
    given_before = {k: x.clone() for k, x in given.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad():
        assert warmup(**{**given, "q": q}, backend=setting.backend) is None
    assert given["q"].grad is None
    assert all(torch.equal(given[k], x) for k, x in given_before.items())


def test_values_mean_nothing(setting: Setting) -> None:
    for arguments in (variant(NAMES[0], (7, 5)), compacted(variant(NAMES[0], (7, 5)))):
        given: dict[str, Any] = on(setting, arguments)
        given["actions"] = torch.full_like(given["actions"], 2**62)
        if "non_final_mask" in given:
            given["non_final_mask"] = torch.ones_like(given["non_final_mask"])
        warmup(**given, backend=setting.backend)


def test_what_does_not_fit_is_refused(setting: Setting) -> None:
    given = on(setting, variant(NAMES[0], (7, 5)))
    with pytest.raises(ValueError, match="rewards"):
        warmup(**{**given, "rewards": given["rewards"][:3]}, backend=setting.backend)
    with pytest.raises(TypeError, match="actions"):
        warmup(**{**given, "actions": given["actions"].float()}, backend=setting.backend)
    with pytest.raises(TypeError):
        warmup(given["q"])


def test_not_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        warmup(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 3))
