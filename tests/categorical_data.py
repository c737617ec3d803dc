"""Batches of logits, the settings that serve them, and the one comparison with the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import assert_close
from categorical_oracle import Expected, categorical_oracle
from conftest import Setting, distributional_settings
from data import compact as compact
from data import source
from torch import Tensor

from dqn_fused import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
)

SUPPORT = (-5.0, 10.0)


every_setting = pytest.mark.parametrize("backend", distributional_settings("categorical"))


def clear_winner(logits: Tensor, legal: Tensor | None = None) -> Tensor:
    """Logits (*N, A, K) of which one (legal) action's expectation is the largest beyond any rounding."""
    *_, A, K = logits.shape
    if A == 1 or logits.numel() == 0:
        return logits
    flat = logits.reshape(-1, A, K).clone()
    ramp = torch.linspace(0, 1, K, dtype=torch.float64)
    means = (torch.softmax(flat.double(), 2) * ramp).sum(2)
    two = (means if legal is None else means.masked_fill(~legal.reshape(means.shape), -torch.inf)).topk(2)
    close = two.values[:, 0] - two.values[:, 1] < 0.01
    flat[close, two.indices[close, 0]] = (8 * ramp).to(flat.dtype)
    return flat.reshape(logits.shape)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments of the loss of C51 for logits of a shape (*N, A, K), a third of the samples terminated."""
    g = source(seed)
    *N, A, _ = shape
    return {
        "logits": (2 * torch.randn(shape, generator=g)).to(dtype),
        "actions": torch.randint(A, N, generator=g),
        "rewards": 3 * torch.randn(N, generator=g),
        "next_logits": clear_winner((2 * torch.randn(shape, generator=g)).to(dtype)),
        "terminated": torch.rand(N, generator=g) < 0.3,
        "support": SUPPORT,
    }


def ready(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments of the loss for a ready target."""
    arguments = make(shape, dtype, seed)
    return {k: arguments[k] for k in ("logits", "actions", "support")} | {"target": 2 + 2 * arguments["rewards"]}


def check(
    setting: Setting,
    arguments: dict[str, Any],
    grad_loss: Tensor | None = None,
    form: Callable[..., Any] = lambda function: function,
) -> Expected:
    """Run a setting, with and without autograd, and compare everything with the oracle.

    form is what is made of the function with autograd, such as a graph.
    """
    arguments = {k: x.to(setting.device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    known = dict(arguments)
    if "target" in known:
        known["rewards"] = known.pop("target")
    expected = categorical_oracle(**known, grad_loss=grad_loss)
    logits = arguments["logits"].detach().requires_grad_()
    arguments |= {"logits": logits, "return_td_error": True, "backend": setting.backend}
    functions = [fused_categorical_loss, fused_categorical_loss_and_grad]
    if "target" in arguments:
        arguments["return_expectation"] = True
        functions = [fused_categorical_td_loss, fused_categorical_td_loss_and_grad]
    loss, td_error, *expectation = form(functions[0])(**arguments)
    upstream = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    accumulation = torch.float64 if logits.dtype is torch.float64 else torch.float32
    assert loss.dtype == td_error.dtype == accumulation
    assert gradient.dtype == logits.dtype
    assert gradient.is_contiguous()
    assert not td_error.requires_grad
    assert_close("td_error", td_error, expected.td_error)
    assert_close("loss", loss, expected.loss)
    assert_close("gradient", gradient, expected.gradient)
    if expectation:
        assert_close("expectation", expectation[0], expected.expectation)
        assert not expectation[0].requires_grad
    again, its_gradient, *values = functions[1](**arguments)
    assert not again.requires_grad
    assert_close("loss of loss_and_grad", again, expected.loss)
    for name, x in zip(("td_error", "expectation"), values, strict=False):  # an expectation of a ready target only
        assert_close(f"{name} of loss_and_grad", x, getattr(expected, name))
    assert len(values) == 1 + len(expectation)
    assert its_gradient.is_contiguous()
    if grad_loss is None:
        assert_close("gradient of loss_and_grad", its_gradient, expected.gradient)
    return expected
