"""torch.func: gradients and ensembles, against a loop over the members."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import assert_agree
from conftest import Setting
from test_loss import compact, make
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jacrev, stack_module_state, vmap

from dqn_fused import (
    BackendUnavailableError,
    Munchausen,
    fused_dqn_loss,
    fused_dqn_loss_and_grad,
    fused_linear_dqn_loss,
    fused_td_loss,
)
from dqn_fused._backends import choose

K, B, A, D = 3, 7, 5, 4  # members, batch, actions, features


def matrix(*size: int, device: str) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, device=device)


def options(name: str, device: str) -> dict[str, Any]:
    """Options of the loss, shared by all members."""
    legal = torch.rand(B, A, device=device) < 0.6
    legal[:, 0] = True
    weights = torch.rand(B, device=device)
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "n_step": {"gamma": 0.9 ** torch.randint(1, 4, (B,), device=device)},
        "scalar_gamma": {"gamma": torch.tensor(0.5, device=device)},
        "prioritised": {
            "next_q_online": matrix(B, A, device=device),
            "next_action_mask": legal,
            "weights": weights,
            "loss": "huber",
            "reduction": "weighted_mean",
        },
        "munchausen": {"target": Munchausen(0.5), "target_q": matrix(B, A, device=device), "action_mask": legal},
        "cql": {"cql_alpha": 0.5, "weights": weights, "action_mask": legal},
    }[name]


NAMES = ("plain", "sum", "none", "n_step", "scalar_gamma", "prioritised", "munchausen", "cql")


def loop(function: Callable[..., Any], *members: Any) -> Any:
    """What vmap does, without vmap."""
    results = [function(*(member[k] for member in members)) for k in range(K)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


@pytest.mark.parametrize("name", NAMES)
def test_ensemble(setting: Setting, name: str) -> None:
    """A stack of networks on one batch: values and TD errors, gradients, and both in either nesting."""
    arguments = make((B, A), torch.float64, setting.device)
    more = options(name, setting.device)
    q, next_q = matrix(K, B, A, device=setting.device), matrix(K, B, A, device=setting.device)

    def loss(q: Tensor, next_q: Tensor) -> Any:
        given = {**arguments, "q": q, "next_q": next_q, **more}
        return fused_dqn_loss(**given, return_td_error=True, backend=setting.backend)

    def total(q: Tensor, next_q: Tensor) -> Tensor:
        return loss(q, next_q)[0].sum()

    def of_all(q: Tensor) -> Tensor:
        return vmap(total)(q, next_q).sum()

    def gradient(q: Tensor, next_q: Tensor) -> Tensor:
        q = q.clone().requires_grad_()
        return torch.autograd.grad(total(q, next_q), q)[0]

    expected = loop(gradient, q, next_q)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule")  # vmap falls back to a loop
        assert_agree(vmap(loss)(q, next_q), loop(loss, q, next_q))
        assert_agree(vmap(grad(total))(q, next_q), expected)
        assert_agree(grad(of_all)(q), expected)
        leaf = q.clone().requires_grad_()
        assert_agree(torch.autograd.grad(of_all(leaf), leaf)[0], expected)
        assert_agree(grad(total)(q[0], next_q[0]), expected[0])


def test_stacked_modules(setting: Setting) -> None:
    """The recipe of the torch.func tutorial: functional_call over stacked parameters."""
    networks = [nn.Linear(D, A).to(setting.device, torch.float64) for _ in range(K)]
    targets = [nn.Linear(D, A).to(setting.device, torch.float64) for _ in range(K)]
    arguments = make((B, A), torch.float64, setting.device)
    obs, next_obs = matrix(B, D, device=setting.device), matrix(B, D, device=setting.device)
    base = nn.Linear(D, A, device="meta")

    def loss(parameters: dict[str, Tensor], target_parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, next_q = functional_call(base, parameters, obs), functional_call(base, target_parameters, next_obs)
        given = {**arguments, "q": q, "next_q": next_q}
        result = fused_dqn_loss(**given, return_td_error=True, backend=setting.backend)
        assert isinstance(result, tuple)
        return result[0], result[1]

    parameters, target_parameters = stack_module_state(networks)[0], stack_module_state(targets)[0]
    gradients, (losses, td_error) = vmap(grad_and_value(loss, has_aux=True))(parameters, target_parameters)
    for k, (network, target) in enumerate(zip(networks, targets, strict=True)):
        with torch.no_grad():
            next_q = target(next_obs)
        given = {**arguments, "q": network(obs), "next_q": next_q}
        expected, expected_td = fused_dqn_loss(**given, return_td_error=True, backend=setting.backend)
        expected.backward()
        assert_agree(losses[k], expected.detach())
        assert_agree(td_error[k], expected_td)
        for key, parameter in network.named_parameters():
            assert_agree(gradients[key][k], parameter.grad)


def test_every_input_may_belong_to_a_member(setting: Setting) -> None:
    """And the members may be any of its dimensions."""
    members = [make((B, A), torch.float64, setting.device, seed=seed) for seed in range(K)]
    stacked = {name: torch.stack([member[name] for member in members], -1) for name in members[0]}
    stacked["gamma"] = torch.tensor([0.9, 0.5, 0.0], device=setting.device)

    def loss(given: dict[str, Tensor]) -> Any:
        return fused_dqn_loss(**given, backend=setting.backend)

    expected = torch.stack(
        [loss({**member, "gamma": gamma}) for member, gamma in zip(members, stacked["gamma"], strict=True)]
    )
    assert_agree(vmap(loss, in_dims=-1)(stacked), expected)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_members_in_a_view(setting: Setting, members: int, batch: int) -> None:
    """A transposed tensor of members by samples is contiguous to vmap, and its last dimension that of the members."""
    q, next_q = matrix(members, batch, A, device=setting.device), matrix(members, batch, A, device=setting.device)
    actions = torch.randint(A, (members, batch), device=setting.device)
    rewards, gamma = matrix(members, batch, device=setting.device), torch.rand(members, device=setting.device)

    def loss(*given: Tensor) -> Any:
        return fused_dqn_loss(*given, reduction="sum", backend=setting.backend)

    function = lambda q, a, r, next_q, gamma: loss(q, a, r, next_q, None, gamma)  # noqa: E731
    got = vmap(function, in_dims=(0, 1, 1, 0, 0))(q, actions.T, rewards.T, next_q, gamma)
    expected = [function(q[k], actions[k], rewards[k], next_q[k], gamma[k]) for k in range(members)]
    assert_agree(got, torch.stack(expected))
    got = vmap(function, in_dims=(0, None, None, None, 0))(q, actions[0], rewards[0], next_q[0], gamma)
    expected = [function(q[k], actions[0], rewards[0], next_q[0], gamma[k]) for k in range(members)]
    assert_agree(got, torch.stack(expected))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "weighted_mean"])
def test_gradients_of_single_samples(setting: Setting, reduction: str) -> None:
    """vmap over the samples themselves: q is (A,) inside."""
    arguments = make((B, A), torch.float64, setting.device)
    weights = torch.rand(B, device=setting.device) + 0.5

    def loss(given: dict[str, Tensor], weight: Tensor) -> Any:
        return fused_dqn_loss(**given, weights=weight, reduction=reduction, backend=setting.backend)

    def gradient(given: dict[str, Tensor], weight: Tensor) -> Tensor:
        q = given["q"].clone().requires_grad_()
        return torch.autograd.grad(loss({**given, "q": q}, weight), q)[0]

    q = arguments.pop("q")
    got = vmap(grad(lambda q, given, weight: loss({**given, "q": q}, weight)))(q, arguments, weights)
    for i in range(B):
        given = {name: x[i] for name, x in arguments.items()}
        assert_agree(got[i], gradient({**given, "q": q[i]}, weights[i]))


def test_leading_dimensions_and_nested_ensembles(setting: Setting) -> None:
    shape = (2, B, A)
    arguments = make(shape, torch.float64, setting.device)
    q = matrix(K, 4, *shape, device=setting.device)

    def loss(q: Tensor) -> Any:
        return fused_dqn_loss(**{**arguments, "q": q}, return_td_error=True, backend=setting.backend)

    value, td_error = vmap(vmap(loss))(q)
    assert td_error.shape == (K, 4, 2, B)
    for k in range(K):
        for j in range(4):
            expected = loss(q[k, j])
            assert_agree((value[k, j], td_error[k, j]), expected)


def test_non_final_mask(setting: Setting) -> None:
    """One mask for all: the members' compacted next states follow each other."""
    ends = torch.arange(B, device=setting.device) % 3 == 1
    arguments = compact({**make((B, A), torch.float64, setting.device), "terminated": ends})
    m = arguments["next_q"].shape[0]
    q, next_q = matrix(K, B, A, device=setting.device), matrix(K, m, A, device=setting.device)

    def loss(q: Tensor, next_q: Tensor) -> Any:
        return fused_dqn_loss(**{**arguments, "q": q, "next_q": next_q}, backend=setting.backend)

    assert_agree(vmap(loss)(q, next_q), loop(loss, q, next_q))
    assert_agree(vmap(loss, in_dims=(0, None))(q, next_q[0]), loop(loss, q, next_q[:1].expand(K, m, A)))
    masks = arguments["non_final_mask"].expand(K, B)
    with pytest.raises(ValueError, match="non_final_mask: expected the same one for every member"):
        vmap(lambda q, mask: fused_dqn_loss(**{**arguments, "q": q, "non_final_mask": mask}, backend=setting.backend))(
            q, masks
        )


@pytest.mark.parametrize("name", ["plain", "cql"])
def test_second_order(setting: Setting, name: str) -> None:
    arguments = make((3, 2), torch.float64, setting.device)
    more = {"cql_alpha": 0.5} if name == "cql" else {}

    def loss(q: Tensor) -> Any:
        return fused_dqn_loss(**{**arguments, "q": q}, **more, backend=setting.backend)

    q = arguments.pop("q")
    expected = torch.autograd.functional.hessian(loss, q)
    assert expected.abs().sum() > 0
    assert_agree(jacrev(jacrev(loss))(q), expected)


def test_a_ready_target(setting: Setting) -> None:
    q, target = matrix(K, B, A, device=setting.device), matrix(K, B, device=setting.device)
    actions = torch.randint(A, (B,), device=setting.device)

    def loss(q: Tensor, target: Tensor) -> Any:
        return fused_td_loss(q, actions, target, backend=setting.backend)

    assert_agree(vmap(loss)(q, target), loop(loss, q, target))


def test_an_ensemble_is_one_call_of_the_backend(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = choose(setting.backend, torch.device(setting.device))
    forward, seen = backend.forward, []

    def counted(batch: Any, spec: Any) -> Any:
        seen.append(batch.actions.numel())
        return forward(batch, spec)

    monkeypatch.setattr(backend, "forward", counted)
    arguments = make((B, A), device=setting.device)
    q = torch.randn(K, B, A, device=setting.device)
    vmap(grad(lambda q: fused_dqn_loss(**{**arguments, "q": q}, backend=setting.backend)))(q)
    assert seen == [K * B]


def test_an_illegal_action_is_found(setting: Setting) -> None:
    """On a GPU it is NaN, as outside."""
    arguments = make((B, A), device=setting.device)
    arguments["actions"][4] = A
    q = torch.randn(K, B, A, device=setting.device)

    def loss(q: Tensor) -> Any:
        return fused_dqn_loss(**{**arguments, "q": q}, backend=setting.backend)

    for function, x in ((vmap(loss), q), (grad(loss), q[0]), (vmap(grad(loss)), q)):
        if setting.device == "cpu":
            with pytest.raises(IndexError, match=r"actions: expected values in \[0, 5\), got 5 in row"):
                function(x)
        else:
            assert function(x).isnan().any() or not function(x)[..., 4, :].any()


def test_what_has_no_rule_says_so(setting: Setting) -> None:
    arguments = make((B, A), device=setting.device)
    q = arguments.pop("q")
    with pytest.raises(RuntimeError, match=r"fused_dqn_loss_and_grad: .* torch\.func.grad_and_value of fused_dqn_loss"):
        vmap(lambda q: fused_dqn_loss_and_grad(q, **arguments, backend=setting.backend))(q.expand(K, B, A))
    hidden, weight = torch.randn(B, D, device=setting.device), torch.randn(A, D, device=setting.device)
    given = (arguments["actions"], arguments["rewards"], hidden, weight)
    with pytest.raises(RuntimeError, match=r"fused_linear_dqn_loss: .* call fused_dqn_loss with"):
        grad(lambda h: fused_linear_dqn_loss(h, weight, *given, backend=setting.backend))(hidden)


def test_a_named_backend_still_does_not_fall_back(setting: Setting) -> None:
    if setting.backend == "triton":
        pytest.skip("it serves")
    arguments = make((B, A))
    q = arguments.pop("q")
    with pytest.raises(BackendUnavailableError):
        grad(lambda q: fused_dqn_loss(q, **arguments, backend="triton"))(q)


@pytest.mark.graph
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_inside_torch_compile(backend: str) -> None:
    """The Function, traced inside a transform, gave wrong gradients silently."""
    arguments, more = make((B, A), torch.float64), options("prioritised", "cpu")
    q, next_q = matrix(K, B, A, device="cpu"), matrix(K, B, A, device="cpu")

    def loss(q: Tensor, next_q: Tensor) -> Any:
        return fused_dqn_loss(**{**arguments, "q": q, "next_q": next_q}, **more, backend=backend)

    for function in (vmap(loss), vmap(grad(loss)), grad(lambda q, next_q: vmap(loss)(q, next_q).sum())):
        torch._dynamo.reset()
        assert_agree(torch.compile(function, fullgraph=True)(q, next_q), function(q, next_q))


@pytest.mark.graph
def test_inside_torch_compile_all_but_q_is_a_constant() -> None:
    """One network for q and next_q, and weights that ask for a gradient."""
    arguments = make((B, A))
    arguments["weights"] = torch.rand(B)
    del arguments["q"], arguments["next_q"]
    features, next_features = matrix(2, B, D, device="cpu")

    def loss(layer: Tensor, weights: Tensor) -> Any:
        given = {**arguments, "weights": weights}
        return fused_dqn_loss(features @ layer, next_q=next_features @ layer, **given)

    layer = matrix(D, A, device="cpu")
    function = grad(loss, argnums=(0, 1))
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True)(layer, arguments["weights"])
    assert not got[1].any()
    assert_agree(got[0], function(layer, arguments["weights"])[0])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="jvp"):
        torch.compile(
            lambda layer: torch.func.jvp(lambda x: loss(x, arguments["weights"]), (layer,), (layer,))[1], fullgraph=True
        )(layer)


@pytest.mark.graph
def test_inside_torch_compile_a_named_backend_refuses() -> None:
    arguments = make((B, A))
    q = arguments.pop("q")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="BackendUnavailableError"):
        torch.compile(grad(lambda q: fused_dqn_loss(q, **arguments, backend="compiled")), fullgraph=True)(q)


def test_vmap_over_a_recorded_backward(setting: Setting) -> None:
    arguments = make((4, 3), torch.float64, setting.device)
    q = arguments.pop("q").requires_grad_()
    loss = fused_dqn_loss(q, **arguments, reduction="none", backend=setting.backend)
    assert isinstance(loss, Tensor)
    identity = torch.eye(4, dtype=torch.float64, device=setting.device)
    warnings.filterwarnings("error", message=".*batching rule")
    rows = vmap(lambda v: torch.autograd.grad(loss, q, v, retain_graph=True)[0])(identity)
    assert_agree(rows, torch.stack([torch.autograd.grad(loss, q, v, retain_graph=True)[0] for v in identity]))
