"""The distributional losses as cases of one test: what differs is what they are called and what they are given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import categorical_data
import pytest
import quantile_data
import torch
from conftest import distributional_settings
from torch import Tensor

from dqn_fused import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
)
from dqn_fused.categorical_reference import categorical_loss, categorical_td_loss
from dqn_fused.quantile_reference import quantile_loss


class Loss(NamedTuple):
    """A loss, the same with its gradient, its reference, the argument that has a gradient, and how to make them all."""

    function: Callable[..., Any]
    and_grad: Callable[..., Any]
    reference: Callable[..., Any]
    input: str
    make: Callable[..., dict[str, Any]]  # (shape, dtype, seed)

    def arguments(
        self, shape: tuple[int, ...] = (7, 3, 5), seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any
    ) -> dict[str, Any]:
        """A batch whose input requires a gradient."""
        found = self.make(shape, seed=seed, dtype=dtype) | more
        found[self.input].requires_grad_()
        return found

    def reward(self) -> str:
        """The name of the rewards, or of the ready target."""
        return "target" if self.function is fused_categorical_td_loss else "rewards"

    def gradient(self, arguments: dict[str, Any], **options: Any) -> Tensor:
        """The gradient of the sum of the losses."""
        loss = self.function(**arguments)
        return torch.autograd.grad(loss.sum(), arguments[self.input], **options)[0]


def hl_gauss(shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    return categorical_data.ready(shape, **options) | {"projection": "hl_gauss"}


LOSSES = {
    "quantile": Loss(fused_quantile_loss, fused_quantile_loss_and_grad, quantile_loss, "quantiles", quantile_data.make),
    "categorical": Loss(
        fused_categorical_loss, fused_categorical_loss_and_grad, categorical_loss, "logits", categorical_data.make
    ),
    "hl-gauss": Loss(
        fused_categorical_td_loss, fused_categorical_td_loss_and_grad, categorical_td_loss, "logits", hl_gauss
    ),
}
every_loss = pytest.mark.parametrize("family", LOSSES.values(), ids=LOSSES)
every_setting = pytest.mark.parametrize("backend", distributional_settings("quantile"))  # which serve all of them
