"""The two families of distributional losses on Triton, for the tests that hold for both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import categorical_data
import pytest
import quantile_data
import torch
from torch import Tensor

from bench.gpu_code import aot
from dqn_fused import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
)

Arguments = dict[str, Any]


class Family(NamedTuple):
    """A family: what the user calls its input, its kernel, its public functions, and how a batch of it is made."""

    input: str  # the other matrices are next_<input> and next_<input>_online
    kernel: str
    loss: Callable[..., Any]
    loss_and_grad: Callable[..., Any]
    calls: Callable[..., dict[str, Callable[[], object]]]
    compact: Callable[[Arguments], Arguments]

    def make(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, targets: int | None = None
    ) -> Arguments:
        """Arguments of the loss; with another number of target quantiles than K where one is given."""
        if self.input == "logits":
            return categorical_data.make(shape, dtype, seed=seed)
        return quantile_data.make(shape, targets, dtype, seed=seed)

    def run(self, arguments: Arguments, **options: Any) -> list[Tensor]:
        """Loss, TD errors and the gradient, by a forward and a backward on Triton."""
        x = arguments[self.input].detach().requires_grad_()
        function = fused_categorical_td_loss if "target" in arguments else self.loss
        given = {**arguments, self.input: x, "return_td_error": True, "backend": "triton"}
        loss, td_error = function(**given, **options)
        return [loss.detach(), td_error, torch.autograd.grad(loss.sum(), x)[0]]


QUANTILE = Family(
    "quantiles",
    "quantile_fwd_kernel",
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
    aot.quantile_calls,
    quantile_data.compact,
)
CATEGORICAL = Family(
    "logits",
    "categorical_fwd_kernel",
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    aot.categorical_calls,
    categorical_data.compact,
)
every_family = pytest.mark.parametrize("family", [QUANTILE, CATEGORICAL], ids=["quantile", "categorical"])
