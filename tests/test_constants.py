"""Everything but q is a constant, in the second derivative, too."""

from typing import Any

import pytest
import torch
from conftest import Setting
from test_loss import make

from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad, fused_quantile_loss, fused_td_loss


def on(setting: Setting, **more: Any) -> dict[str, Any]:
    found = {k: x.to(setting.device) for k, x in (make((7, 5)) | more).items()}
    found["q"].requires_grad_()
    return found


@pytest.mark.parametrize("options", [{}, {"cql_alpha": 0.5}, {"reduction": "weighted_mean"}], ids=str)
def test_weights_have_no_part_in_the_second_derivative(setting: Setting, options: dict[str, Any]) -> None:
    """The gradient of q, recorded, depended on weights that require a gradient, and handed them one."""
    given = on(setting, weights=torch.rand(7) + 0.1)
    weights = given["weights"].requires_grad_()
    loss = fused_dqn_loss(**given, **options, backend=setting.backend)
    (first,) = torch.autograd.grad(loss, given["q"], create_graph=True)
    second, of_weights = torch.autograd.grad(first.square().sum(), [given["q"], weights], allow_unused=True)
    assert of_weights is None
    constant = given | {"weights": weights.detach()}
    loss = fused_dqn_loss(**constant, **options, backend=setting.backend)
    (first,) = torch.autograd.grad(loss, given["q"], create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), given["q"])[0], second)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_weights_have_no_part_in_the_second_derivative_of_quantiles(backend: str) -> None:
    given = {k: x for k, x in make((7, 5)).items() if k not in ("q", "next_q")}
    quantiles, weights = torch.randn(7, 5, 3, requires_grad=True), torch.rand(7, requires_grad=True)
    loss = fused_quantile_loss(
        quantiles, next_quantiles=torch.randn(7, 5, 3), weights=weights, **given, backend=backend
    )
    (first,) = torch.autograd.grad(loss, quantiles, create_graph=True)
    with pytest.raises(RuntimeError):  # there is no second derivative at all
        torch.autograd.grad(first.sum(), weights)


def test_a_target_that_requires_a_gradient_records_nothing(setting: Setting) -> None:
    """With backend "torch" the loss was differentiable by a ready target where q needed no gradient."""
    given = on(setting)
    target = given["rewards"].requires_grad_()
    for q in (given["q"], given["q"].detach()):
        loss = fused_td_loss(q, given["actions"], target, backend=setting.backend)
        assert loss.requires_grad == q.requires_grad
        if loss.requires_grad:
            loss.backward()
            assert target.grad is None


def test_a_gradient_in_one_pass_records_nothing(setting: Setting) -> None:
    """The conservative term of an empty batch was recorded by the Triton backend."""
    for n in (0, 7):
        given = {k: x[:n] for k, x in on(setting).items()}
        assert given["q"].requires_grad
        found = fused_dqn_loss_and_grad(**given, cql_alpha=0.5, return_cql=True, backend=setting.backend)
        assert not any(x.requires_grad for x in found)
