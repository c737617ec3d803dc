"""Q-values far from zero, as unscaled rewards make them: what depends on their differences keeps its digits.

With logsumexp(q) as one number the policy exp(q - logsumexp(q)) is wrong by |q| eps, 5e-4 at 10,000 in float32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Setting
from data import source
from test_loss import shape_id
from torch import Tensor

from dqn_fused import Munchausen, fused_dqn_loss, fused_dqn_loss_and_grad
from dqn_fused.reference import dqn_loss

EPS = torch.finfo(torch.float32).eps
SHAPES = [(9, 18), (5, 700), (2, 5003)]


def batch(shape: tuple[int, int], offset: float) -> dict[str, Any]:
    g = source()
    q = 2 * torch.randn(shape, generator=g) + offset
    actions = torch.randint(shape[1], shape[:1], generator=g)
    ends = torch.ones(shape[:1], dtype=torch.bool)
    taken = q.gather(1, actions[:, None]).squeeze(1)  # as the reward it makes the TD error zero
    return {"q": q, "actions": actions, "rewards": taken, "next_q": torch.zeros(shape), "terminated": ends}


def by_autograd(loss: Callable[..., Any]) -> Callable[..., Tensor]:
    def gradient(q: Tensor, **arguments: Any) -> Tensor:
        q = q.clone().requires_grad_()
        return torch.autograd.grad(loss(q, **arguments), q)[0]

    return gradient


def eager(q: Tensor, actions: Tensor, **_: Any) -> Tensor:
    return (torch.logsumexp(q, 1) - q.gather(1, actions[:, None]).squeeze(1)).sum()


@pytest.mark.parametrize("offset", [0.0, 1e2, -1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_conservative_gradient(setting: Setting, shape: tuple[int, int], offset: float) -> None:
    """The bound is that of exp((q - largest) - log(total)): each difference is rounded once, whatever |q| is."""
    arguments = batch(shape, offset)
    log_policy = torch.log_softmax(arguments["q"].double(), 1)
    others = torch.ones(shape, dtype=torch.bool).scatter_(1, arguments["actions"][:, None], False)

    def error(gradient: Callable[..., Tensor], device: str, **options: Any) -> float:
        given = {name: x.to(device) for name, x in arguments.items()}
        got = gradient(**given, **options).cpu().double()
        return float((got / log_policy.exp() - 1)[others].abs().max())

    options = {"cql_alpha": 1.0, "reduction": "sum"}
    bound = EPS * (8 + 2 * float(log_policy.abs().max()))
    functions = [
        by_autograd(lambda *a, **k: fused_dqn_loss(*a, **k, backend=setting.backend)),
        lambda **k: fused_dqn_loss_and_grad(**k, backend=setting.backend)[1],
    ]
    if setting.backend == "torch":
        functions.append(by_autograd(dqn_loss))
    errors = [error(function, setting.device, **options) for function in functions]
    assert max(errors) <= bound
    if abs(offset) >= 1e4:  # nearer, the one rounding of eager's sum may be lucky in the few rows there are
        assert max(errors) < error(by_autograd(eager), "cpu")


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_conservative_term_and_the_bonus_of_munchausen(
    setting: Setting, shape: tuple[int, int], offset: float
) -> None:
    arguments = batch(shape, offset)
    policy = -torch.log_softmax(arguments["q"].double(), 1).gather(1, arguments["actions"][:, None]).squeeze(1)
    on_device = {name: x.to(setting.device) for name, x in arguments.items()}
    _, term = fused_dqn_loss(**on_device, return_cql=True, backend=setting.backend)
    on_device |= {"target_q": on_device["q"], "q": torch.zeros_like(on_device["q"])}
    on_device["rewards"] = torch.zeros_like(on_device["rewards"])
    unclipped = Munchausen(1.0, alpha=1.0, clip=-1e30)
    _, bonus = fused_dqn_loss(**on_device, target=unclipped, return_td_error=True, backend=setting.backend)
    for got in (term, bonus):
        assert ((got.cpu().double() - policy).abs() <= 8 * EPS * (1 + policy)).all()
