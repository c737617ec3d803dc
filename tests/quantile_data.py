"""Batches of quantiles, the settings that serve them, and the one comparison with the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import assert_close
from conftest import Setting, distributional_settings
from data import compact as compact
from data import source
from quantile_oracle import Expected, eager, quantile_oracle
from torch import Tensor

from dqn_fused import fused_quantile_loss, fused_quantile_loss_and_grad

every_setting = pytest.mark.parametrize("backend", distributional_settings("quantile"))


def clear_winner(values: Tensor, g: torch.Generator) -> Tensor:
    """Quantiles (m, A, K) of which one action's mean is the largest beyond any rounding."""
    m, A, _ = values.shape
    if m == 0 or A == 1:
        return values
    winner = torch.randint(A, (m,), generator=g)
    means = values.double().mean(2)
    lift = means.max(1).values - means[torch.arange(m), winner] + 0.25
    values = values.clone()
    values[torch.arange(m), winner] += lift[:, None].to(values.dtype)
    return values


def make(
    shape: tuple[int, ...],
    K2: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the loss for quantiles of a shape (*N, A, K), a third of the samples terminated."""
    g = source(seed)
    *N, A, K = shape
    following = torch.randn((*N, A, K2 or K), generator=g).to(dtype)
    arguments = {
        "quantiles": torch.randn(shape, generator=g).to(dtype),
        "actions": torch.randint(A, N, generator=g),
        "rewards": torch.randn(N, generator=g),
        "next_quantiles": clear_winner(following.reshape(-1, A, K2 or K), g).reshape(following.shape),
        "terminated": torch.rand(N, generator=g) < 0.3,
    }
    return {name: x.to(device) for name, x in arguments.items()}


def check(
    setting: Setting,
    arguments: dict[str, Any],
    grad_loss: Tensor | None = None,
    call: Callable[..., Any] = fused_quantile_loss,
) -> Expected:
    """Run a setting, with and without autograd, and compare everything with the oracle."""
    arguments = {k: x.to(setting.device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    quantiles = arguments["quantiles"].detach().requires_grad_()
    arguments["quantiles"] = quantiles
    expected = quantile_oracle(**arguments, grad_loss=grad_loss)
    loss, td_error = call(**arguments, return_td_error=True, backend=setting.backend)
    upstream = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss)
    (gradient,) = torch.autograd.grad(loss, quantiles, upstream)
    accumulation = torch.float64 if quantiles.dtype is torch.float64 else torch.float32
    assert loss.dtype == td_error.dtype == accumulation
    assert gradient.dtype == quantiles.dtype
    assert gradient.is_contiguous()
    assert not td_error.requires_grad
    assert_close("td_error", td_error, expected.td_error)
    assert_close("loss", loss, expected.loss)
    assert_close("gradient", gradient, expected.gradient)
    loss, gradient, td_error = fused_quantile_loss_and_grad(**arguments, return_td_error=True, backend=setting.backend)
    assert not loss.requires_grad
    assert gradient.is_contiguous()
    assert_close("td_error of loss_and_grad", td_error, expected.td_error)
    assert_close("loss of loss_and_grad", loss, expected.loss)
    if grad_loss is None:
        assert_close("gradient of loss_and_grad", gradient, expected.gradient)
    return expected


def check_against_eager(setting: Setting, arguments: dict[str, Any]) -> None:
    """Errors within twice those of the lines that users write."""
    expected = quantile_oracle(**arguments)
    x = arguments["quantiles"].detach().requires_grad_()
    loss = eager(**{**arguments, "quantiles": x, "terminated": arguments["terminated"].to(x.dtype)})
    (gradient,) = torch.autograd.grad(loss, x)
    got, got_gradient = fused_quantile_loss_and_grad(**arguments, backend=setting.backend)
    assert_close("loss", got, expected.loss, loss)
    assert_close("gradient", got_gradient, expected.gradient, gradient)
