"""R2D2's value function h: near zero, where its usual forms cancel, far from it, and against its inverse."""

from typing import Any

import pytest
import torch
from bounds import Arithmetic, Number, Values, assert_agree, assert_close
from conftest import Setting
from data import source
from oracle import oracle
from oracle import signed_hyperbolic as exact_h
from oracle import signed_parabolic as exact_inverse
from test_family import variant
from test_loss import check, dtype_id, make, to_device
from torch import nn

from dqn_fused import FusedLinearDQNLoss, fused_dqn_loss, fused_linear_dqn_loss
from dqn_fused.value_transform import signed_hyperbolic, signed_parabolic

H = {"value_transform": "signed_hyperbolic"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)


def scaled(scale: float, dtype: torch.dtype, A: int = 5) -> dict[str, Any]:
    """Rewards and next values of a size, and q of zero, so that td is the target and nothing else."""
    arguments = {**make((16, A), dtype), **H, "gamma": 0.9}
    arguments["q"] = torch.zeros_like(arguments["q"])
    arguments["next_q"] = scale * arguments["next_q"]
    arguments["rewards"] = scale * arguments["rewards"].to(dtype)
    return arguments


@DTYPES
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e-3, 1.0, 1e4, 1e15])
def test_values_of_any_size(setting: Setting, scale: float, dtype: torch.dtype) -> None:
    """sqrt(1 + 1e-12) - 1 is 0 in float32, and in float64 has four digits left."""
    for A in (5, 130):
        check(setting, {**scaled(scale, dtype, A), "loss": "huber"})


@DTYPES
def test_h_and_its_inverse(dtype: torch.dtype) -> None:
    g = source()
    sizes = torch.logspace(-35, 30, 2001, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, torch.randn(500, generator=g).double(), torch.tensor([0.0, torch.inf, -torch.inf])])
    x = x.to(dtype)
    arithmetic = Arithmetic(dtype)
    for function, exact in ((signed_hyperbolic, exact_h), (signed_parabolic, exact_inverse)):
        expected = Values.of([exact(arithmetic, Number(value)) for value in x.tolist()], x.shape)
        assert_close(function.__name__, function(x), expected)
    for name, (there, back) in {
        "h": (signed_parabolic, exact_h),
        "inverse": (signed_hyperbolic, exact_inverse),
    }.items():
        y = there(x)
        whole = y.abs() < torch.finfo(dtype).max  # of the inverse, which overflows first
        known = Values.of([back(arithmetic, Number(value)) for value in y[whole].tolist()], (int(whole.sum()),))
        round_trip = {"h": signed_hyperbolic, "inverse": signed_parabolic}[name](y[whole])
        assert_close(name, round_trip, known)
        # By the bounds above 19 units of the inverse, twice as many as those of h, which neither magnifies above twice.
        torch.testing.assert_close(round_trip, x[whole], rtol=64 * torch.finfo(dtype).eps, atol=0)
    assert signed_hyperbolic(torch.tensor(torch.nan)).isnan()
    assert signed_parabolic(torch.tensor(torch.nan)).isnan()


def test_identities(setting: Setting) -> None:
    given = variant("double-mask", (33, 19), torch.float64)
    arguments = {k: to_device(x.double() if k == "rewards" else x, setting.device) for k, x in given.items()}

    def td(**changed: Any) -> torch.Tensor:
        return fused_dqn_loss(**{**arguments, **changed}, return_td_error=True, backend=setting.backend)[1]

    ends = torch.ones_like(arguments["terminated"])
    taken = arguments["q"].gather(1, arguments["actions"][:, None]).squeeze(1)
    expected = taken - signed_hyperbolic(arguments["rewards"])
    assert_agree(td(**H, terminated=ends), expected)  # y = h(r) where the episode ended
    zero = torch.zeros_like(arguments["rewards"])
    same = td(**H, rewards=zero, gamma=1.0, terminated=None)
    assert_agree(same, td(rewards=zero, gamma=1.0, terminated=None))  # h of its inverse
    assert torch.equal(td(value_transform="identity"), td()), "the default"


def test_the_gradient(setting: Setting) -> None:
    arguments = {k: to_device(x, setting.device) for k, x in scaled(10.0, torch.float64).items()}
    q = arguments.pop("q").requires_grad_()

    def loss(q: torch.Tensor) -> Any:
        return fused_dqn_loss(q, **arguments, backend=setting.backend)

    assert torch.autograd.gradcheck(loss, q)
    assert torch.autograd.gradgradcheck(loss, q)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_of_a_linear_head(backend: str) -> None:
    """Of small integers the Q matrices are exact."""
    g = source()
    hidden, next_hidden = (torch.randint(-3, 4, (9, 4), generator=g).float() for _ in range(2))
    weight, next_weight = (torch.randint(-3, 4, (7, 4), generator=g).float() for _ in range(2))
    actions, rewards = torch.randint(7, (9,), generator=g), 10 * torch.randn(9, generator=g)
    terminated = torch.arange(9) % 3 == 0
    loss, td_error = fused_linear_dqn_loss(
        hidden, weight, actions, rewards, next_hidden, next_weight, terminated, 0.9,
        **H, return_td_error=True, backend=backend,
    )  # fmt: skip
    module = FusedLinearDQNLoss(0.9, **H, backend=backend)
    heads = [nn.Linear(4, 7, bias=False) for _ in range(2)]
    for layer, values in zip(heads, (weight, next_weight), strict=True):
        layer.weight.data = values
    of_module = module(heads[0], hidden, actions, rewards, heads[1], next_hidden, terminated)
    assert torch.equal(of_module, loss), "the module calls the function"
    expected = oracle(hidden @ weight.T, actions, rewards, next_hidden @ next_weight.T, terminated, 0.9, **H)
    assert_close("loss", loss, expected.loss)
    assert_close("td_error", td_error, expected.td_error)
