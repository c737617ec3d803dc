"""Tensors without values: shapes, dtypes and errors as with values, forward and backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import test_linear
import torch
from test_family import variant
from test_loss import compact, make
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dqn_fused import (
    BackendUnavailableError,
    fused_dqn_loss,
    fused_dqn_loss_and_grad,
    fused_linear_dqn_loss,
    fused_td_loss,
)

Arguments = dict[str, Any]


class Empty(NamedTuple):
    """How the values are taken from tensors, and where the calls are then made."""

    convert: Callable[[Tensor], Tensor]
    mode: AbstractContextManager[Any]

    def __call__(self, arguments: Arguments) -> Arguments:
        return {k: self.convert(x) if isinstance(x, Tensor) else x for k, x in arguments.items()}


@pytest.fixture(params=["meta", "meta-checked", "fake"])
def empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Empty:
    if request.param == "fake":
        mode = FakeTensorMode()
        return Empty(mode.from_tensor, mode)
    if request.param == "meta-checked":
        monkeypatch.setenv("DQN_FUSED_CHECK", "1")
    return Empty(lambda x: x.to("meta"), nullcontext())


def about(x: Any) -> object:
    if isinstance(x, tuple):
        return [about(y) for y in x]
    return None if x is None else (x.shape, x.dtype, x.layout)


def results(function: Callable[..., Any], arguments: Arguments, learned: list[str]) -> object:
    """Shapes and dtypes of outputs and gradients, up to the second order."""
    inputs = [arguments[name].requires_grad_() for name in learned]
    outputs = function(**arguments)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs
    grads = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
    again = torch.autograd.grad(sum(x.float().square().sum() for x in grads), inputs)
    return about((outputs, grads, again))


def check(empty: Empty, function: Callable[..., Any], arguments: Arguments, learned: list[str]) -> None:
    expected = results(function, arguments, learned)
    arguments = {k: x.detach() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    with empty.mode:
        assert results(function, empty(arguments), learned) == expected


@pytest.mark.parametrize("reduction", ["none", "weighted_mean"])
@pytest.mark.parametrize("name", ["double", "weights", "munchausen-cql-masks-weights-huber"])
def test_loss(empty: Empty, name: str, reduction: str) -> None:
    arguments = {**variant(name, (2, 3, 5), torch.bfloat16), "reduction": reduction, "return_td_error": True}
    check(empty, fused_dqn_loss, arguments, ["q"])
    with empty.mode:
        loss, grad_q, td_error = fused_dqn_loss_and_grad(**empty(arguments))
    assert loss.shape == ((2, 3) if reduction == "none" else ())
    assert grad_q.shape == (2, 3, 5)
    assert grad_q.dtype is torch.bfloat16
    assert td_error.shape == (2, 3)


@pytest.mark.parametrize("name", ["double", "soft", "cql"])
def test_two_dimensions(empty: Empty, name: str) -> None:
    check(empty, fused_dqn_loss, variant(name, (7, 3)), ["q"])


def test_non_final_mask(empty: Empty) -> None:
    check(empty, fused_dqn_loss, compact(make((7, 3))), ["q"])


def test_ready_target(empty: Empty) -> None:
    batch = make((7, 3))
    check(empty, fused_td_loss, {"q": batch["q"], "actions": batch["actions"], "target": batch["rewards"]}, ["q"])


@pytest.mark.parametrize("name", ["plain", "double-mask-weights-huber", "soft", "munchausen-mask", "cql"])
def test_linear_head(empty: Empty, name: str) -> None:
    arguments = test_linear.make((2, 3, 5))
    arguments |= test_linear.OPTIONS[name](arguments)
    check(empty, fused_linear_dqn_loss, arguments, ["hidden", "weight", "bias"])


def test_errors(empty: Empty) -> None:
    arguments = make((7, 3))
    with empty.mode:
        given = empty(arguments)
        with pytest.raises(ValueError, match=r"rewards: expected shape \(7,\) or \(7, 1\), got \(3,\)"):
            fused_dqn_loss(**{**given, "rewards": given["rewards"][:3]})
        with pytest.raises(TypeError, match="actions: expected an integer dtype"):
            fused_dqn_loss(**{**given, "actions": given["rewards"]})


def test_a_kernel_needs_values() -> None:
    arguments = {k: x.to("meta") for k, x in make((7, 3)).items()}
    with pytest.raises(BackendUnavailableError, match="got meta"):
        fused_dqn_loss(**arguments, backend="compiled")
