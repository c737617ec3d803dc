"""What a training loop wraps around a loss: torch.compile, autocast, GradScaler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import Values, assert_agree, assert_close
from conftest import Setting
from data import SEED
from oracle import oracle
from test_linear import compare
from test_loss import compact, make
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dqn_fused import Munchausen, Soft, _ops, fused_dqn_loss, fused_dqn_loss_and_grad, fused_linear_dqn_loss
from dqn_fused._backends import boxed
from dqn_fused.arguments import Batch, check_batch, check_loss, normalise_weights
from dqn_fused.autograd import Saved

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

D, A = 4, 5
EPS = torch.finfo(torch.float32).eps
SIZES = (8, 11, 16, 33)


def network(setting: Setting, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, A)).to(setting.device, dtype)


def wide(*size: int, device: str) -> Tensor:
    """Float64, as in all tests here that compare a graph with eager code: the networks in front of the loss round."""
    return torch.randn(*size, dtype=torch.float64, device=device)


def double(n: int, device: str) -> dict[str, Tensor]:
    legal = torch.rand(n, A, device=device) < 0.6
    legal[:, 0] = True
    return {
        "next_q_online": wide(n, A, device=device),
        "next_action_mask": legal,
        "weights": torch.rand(n, device=device),
    }


def munchausen(n: int, device: str) -> dict[str, Tensor]:
    legal = torch.rand(n, A, device=device) < 0.6
    legal[:, 0] = True
    gamma = torch.rand(n, device=device)
    return {"target_q": wide(n, A, device=device), "action_mask": legal, "gamma": gamma}


def nothing(n: int, device: str) -> dict[str, Tensor]:
    return {}


LOSSES: dict[str, tuple[Callable[[int, str], dict[str, Tensor]], dict[str, Any]]] = {
    "plain": (nothing, {}),
    "none": (nothing, {"reduction": "none"}),
    "mask": (nothing, {}),
    "prioritised": (double, {"loss": "huber", "delta": 0.5, "reduction": "weighted_mean", "return_td_error": True}),
    "munchausen-cql": (
        munchausen,
        {"target": Munchausen(), "loss": "huber", "delta": 0.3, "cql_alpha": 0.5, "return_cql": True},
    ),
}


def total(result: Any) -> Tensor:
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss.sum()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.graph
@pytest.mark.parametrize("name", [*LOSSES, "loss_and_grad"])
def test_torch_compile_of_network_and_loss(setting: Setting, name: str) -> None:
    """One graph without a break; a second one when the batch size has changed for the first time, and no third."""
    model = network(setting, torch.float64)
    more, options = LOSSES.get(name, LOSSES["plain"])

    def loss(obs: Tensor, rest: dict[str, Tensor]) -> Tensor:
        q = model(obs)
        if name == "loss_and_grad":
            value, grad_q = fused_dqn_loss_and_grad(q, **rest, backend=setting.backend)
            return value + (q * grad_q).sum() - (q * grad_q).sum().detach()
        return total(fused_dqn_loss(q, **rest, **options, backend=setting.backend))

    compiled = torch.compile(loss, fullgraph=True)
    for n in SIZES:
        arguments = {**make((n, A), torch.float64, setting.device, seed=n), **more(n, setting.device)}
        if name == "mask":
            # A different number of next states at each size.
            arguments["terminated"] = torch.arange(n, device=setting.device) % 4 == 0
            arguments = compact(arguments)
        arguments.pop("q")
        obs = wide(n, D, device=setting.device)
        assert_agree(*(gradients(function(obs, arguments), model) for function in (compiled, loss)))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.graph
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_of_leading_dimensions(setting: Setting, reduction: str) -> None:
    """Slices of a sequence, whose two leading dimensions do not merge: Dynamo catches no error of a view."""
    T, n = 6, 3
    arguments = make((n, T, A), device=setting.device)
    sequence = wide(n, T + 1, A, device=setting.device).requires_grad_()
    del arguments["q"], arguments["next_q"]

    def loss(sequence: Tensor) -> Any:
        q, next_q = sequence[:, :-1], sequence[:, 1:]
        return fused_dqn_loss(
            q, next_q=next_q, **arguments, cql_alpha=0.5, reduction=reduction, return_cql=True, backend=setting.backend
        )

    results = [function(sequence) for function in (torch.compile(loss, fullgraph=True), loss)]
    assert_agree(*results)
    assert_agree(*(torch.autograd.grad(result[0].sum(), sequence) for result in results))


@pytest.mark.graph
def test_priorities_in_place_inside_a_graph(setting: Setting) -> None:
    """Eager code raises where what the backward needs is changed in place; a graph gave the gradient of |td|."""
    arguments = make((8, A), torch.float64, setting.device)
    q = arguments.pop("q").requires_grad_()

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        loss, td_error = fused_dqn_loss(q, **arguments, return_td_error=True, backend=setting.backend)
        return loss, td_error.abs_().add_(1e-3)

    loss, priorities = torch.compile(step, fullgraph=True)(q)
    expected, td_error = fused_dqn_loss(q, **arguments, return_td_error=True, backend=setting.backend)
    assert_agree(priorities, td_error.abs() + 1e-3)
    assert_agree(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q))


@pytest.mark.graph
def test_a_discount_in_a_tensor_is_no_constant_of_the_graph(setting: Setting) -> None:
    arguments = make((8, A), torch.float64, setting.device)

    def loss(gamma: Tensor) -> Any:
        return fused_dqn_loss(**arguments, gamma=gamma, backend=setting.backend)

    compiled = torch.compile(loss, fullgraph=True)
    for gamma in torch.linspace(0.9, 0.99, 4, device=setting.device):
        assert_agree(compiled(gamma), loss(gamma))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.graph
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="Dynamo traces no backward")
def test_torch_compile_of_network_loss_and_backward(setting: Setting) -> None:
    """The backward in the same graph, where Dynamo is told to trace it."""
    model = network(setting, torch.float64)

    def step(obs: Tensor, rest: dict[str, Tensor]) -> list[Tensor]:
        return gradients(total(fused_dqn_loss(model(obs), **rest, backend=setting.backend)), model)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        for n in SIZES:
            arguments = make((n, A), torch.float64, setting.device, seed=n)
            arguments.pop("q")
            obs = wide(n, D, device=setting.device)
            assert_agree(compiled(obs, arguments), step(obs, arguments))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.graph
@pytest.mark.parametrize("name", ["max", "soft", "cql", "munchausen"])
def test_torch_compile_of_a_linear_head(setting: Setting, name: str) -> None:
    body, head, target_head = (
        nn.Linear(*size).to(setting.device, torch.float64) for size in ((D, 16), (16, 300), (16, 300))
    )
    double = name in ("max", "cql")
    target = {"soft": Soft(0.5), "munchausen": Munchausen(0.5)}.get(name, "max")
    options = {"target": target, "cql_alpha": 0.5 if name == "cql" else 0.0}

    def loss(obs: Tensor, next_hidden: Tensor, rest: dict[str, Tensor]) -> Tensor:
        online = next_hidden.flip(0) if double else None
        given = {"bias": head.bias, "next_bias": target_head.bias, "next_hidden_online": online, **rest}
        layers = (next_hidden, target_head.weight)
        actions, rewards = given.pop("actions"), given.pop("rewards")
        hidden = body(obs)
        if name == "munchausen":
            given["target_hidden"] = next_hidden.flip(1)
        return total(
            fused_linear_dqn_loss(
                hidden, head.weight, actions, rewards, *layers, **options, backend=setting.backend, **given
            )
        )

    compiled = torch.compile(loss, fullgraph=True)
    both = nn.ModuleList([body, head])
    for n in SIZES[:3]:
        rest = make((n, 300), device=setting.device, seed=n)
        obs, next_hidden = wide(n, D, device=setting.device), wide(n, 16, device=setting.device)
        del rest["q"], rest["next_q"]
        assert_agree(*(gradients(function(obs, next_hidden, rest), both) for function in (compiled, loss)))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def eager_loss(q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor) -> Tensor:
    with torch.no_grad():
        target = rewards + 0.99 * next_q.max(1).values * ~terminated
    return F.mse_loss(q.gather(1, actions.unsqueeze(1)).squeeze(1), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(setting: Setting, dtype: torch.dtype) -> None:
    """Half-precision networks, float32 rewards: dtypes as eager has them, values as close to float64.

    The gradient is compared where it leaves the loss; from there on it is PyTorch's.
    """
    model, target = network(setting), network(setting)
    rest = make((64, A), device=setting.device)
    del rest["q"], rest["next_q"]
    obs, next_obs = torch.randn(64, D, device=setting.device), torch.randn(64, D, device=setting.device)
    with torch.autocast(setting.device, dtype):
        with torch.no_grad():
            next_q = target(next_obs)
        q = model(obs)
        assert q.dtype is next_q.dtype is dtype
        loss = fused_dqn_loss(q, **rest, next_q=next_q, backend=setting.backend)
        eager = eager_loss(q, **rest, next_q=next_q)
    assert loss.dtype is eager.dtype is torch.float32  # type: ignore[union-attr]
    inputs = [q, *model.parameters()]
    grads, eager_grads = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (loss, eager))
    assert [x.dtype for x in grads] == [x.dtype for x in eager_grads] == [dtype, *[torch.float32] * 4]
    expected = oracle(q, **rest, next_q=next_q)
    assert_close("loss", loss, expected.loss, eager)  # type: ignore[arg-type]
    assert_close("grad_q", grads[0], expected.grad_q, eager_grads[0])


@pytest.mark.parametrize("name", list(LOSSES))
def test_autocast_changes_nothing_inside(setting: Setting, name: str) -> None:
    """The same bits with the call inside the region and after it."""
    more, options = LOSSES[name]
    arguments = {**make((16, A), torch.bfloat16, setting.device), **more(16, setting.device)}
    arguments = {k: x.float() if x.dtype is torch.float64 else x for k, x in arguments.items()}
    if name == "mask":
        arguments = compact(arguments)
    q = arguments.pop("q").requires_grad_()

    def run() -> list[Tensor]:
        loss = total(fused_dqn_loss(q, **arguments, **options, backend=setting.backend))
        return [loss.detach(), *torch.autograd.grad(loss, q)]

    expected = run()
    with torch.autocast(setting.device, torch.bfloat16):
        got = run()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("cql_alpha", [0.0, 0.5])
def test_autocast_of_a_linear_head(setting: Setting, cql_alpha: float) -> None:
    """As nn.Linear does, it casts hidden states that a LayerNorm left in float32: the bits of those that are cast."""
    rest = make((32, 300), device=setting.device)
    del rest["q"], rest["next_q"]
    actions, rewards = rest.pop("actions"), rest.pop("rewards")
    hidden, next_hidden, online = (torch.randn(32, 16, device=setting.device) for _ in range(3))
    head, target_head = nn.Linear(16, 300).to(setting.device), nn.Linear(16, 300).to(setting.device)
    inputs = [hidden.requires_grad_(), *head.parameters()]
    biases = {"bias": head.bias, "next_bias": target_head.bias}

    def loss_of(hidden: Tensor, next_hidden: Tensor, online: Tensor) -> Any:
        return fused_linear_dqn_loss(
            hidden, head.weight, actions, rewards, next_hidden, target_head.weight,
            next_hidden_online=online, **biases, **rest, cql_alpha=cql_alpha, backend=setting.backend,
        )  # fmt: skip

    with torch.autocast(setting.device, torch.bfloat16):
        loss = loss_of(hidden, next_hidden, online)
    assert loss.dtype is torch.float32
    cast = loss_of(*(x.to(torch.bfloat16) for x in (hidden, next_hidden, online)))
    assert torch.equal(loss, cast)
    assert not torch.equal(loss, loss_of(hidden, next_hidden, online))
    gradients = [torch.autograd.grad(x, inputs) for x in (loss, cast)]
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype is torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cql_alpha", [0.0, 0.5])
def test_autocast_of_a_linear_head_of_integers(setting: Setting, cql_alpha: float) -> None:
    """Near the loss of the Q matrix: that of small integers is exact in bfloat16, too, and so is the double choice."""
    rest: dict[str, Any] = make((32, 300), device=setting.device)
    del rest["q"], rest["next_q"]
    sizes = dict.fromkeys(("hidden", "next_hidden", "next_hidden_online"), (32, 16))
    sizes |= dict.fromkeys(("weight", "next_weight"), (300, 16)) | dict.fromkeys(("bias", "next_bias"), (300,))
    head = {k: torch.randint(-2, 3, size, device=setting.device).float() for k, size in sizes.items()}
    inputs = {k: head[k].requires_grad_() for k in ("hidden", "weight", "bias")}
    if cql_alpha:
        rest["cql_alpha"] = cql_alpha
    with torch.autocast(setting.device, torch.bfloat16):
        loss, td_error, *cql = fused_linear_dqn_loss(
            **head, **rest, return_td_error=True, return_cql=bool(cql_alpha), backend=setting.backend
        )
    grads = torch.autograd.grad(loss, [*inputs.values()])
    assert all(x.dtype is torch.float32 for x in grads)
    halves = {k: x.detach().bfloat16() for k, x in head.items()}
    found = {k: x.bfloat16() for k, x in zip(inputs, grads, strict=True)}
    compare(setting, halves | rest, loss, td_error, cql, found)


def test_grad_scaler(setting: Setting) -> None:
    """A scaled loss of a float16 layer: the step by its gradient, skipped where the scaled gradient overflows."""
    rest = make((16, A), device=setting.device)
    del rest["q"]
    obs = torch.randn(16, D, device=setting.device).half().float()

    for scale, moves in ((1024.0, True), (2.0**20, False)):
        model = nn.Linear(D, A).to(setting.device)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(setting.device, init_scale=scale)
        with torch.autocast(setting.device, torch.float16):
            q = model(obs)
            loss = fused_dqn_loss(q, **rest, backend=setting.backend)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale if moves else scale / 2)
        # Each gradient of q is rounded to float16, and so is each of the parameters, a sum of 16 products in float32.
        grad_q = oracle(q, **rest).grad_q.value
        for p, before, inputs in zip(model.parameters(), start, (obs, torch.ones_like(obs[:, :1])), strict=True):
            x = inputs.cpu().double().numpy()
            step, size = ((f(grad_q).T @ f(x)).reshape(p.shape) for f in (np.array, np.abs))
            expected = before.cpu().double().numpy() - (step if moves else 0)
            half = 2 * torch.finfo(torch.float16).eps * size if moves else np.zeros_like(size)
            assert_close("parameter", p, Values(expected, half + EPS * np.abs(expected)))
            assert moves or torch.equal(p, before)


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_ops_that_a_graph_holds(setting: Setting, name: str) -> None:
    """Schema, fake and strides of the ops behind which torch.compile does not look."""
    if setting.backend != "triton":
        pytest.skip("its graph holds PyTorch's operations or the compiled ops")
    more, options = LOSSES[name]
    arguments = {"gamma": 0.9, **make((7, A), device=setting.device), **more(7, setting.device)}
    if name == "mask":
        arguments = compact(arguments)
    spec = check_loss(**{key: value for key, value in options.items() if key != "return_td_error"})
    batch = check_batch(Batch(**arguments), spec)
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec)
    given = boxed.arguments(batch, spec)
    assert boxed.unpack(*given)[1] == spec
    torch.library.opcheck(_ops.triton_td_loss, given)
    torch.library.opcheck(_ops.triton_td_loss_and_grad, given)
    loss, td_error, normaliser = _ops.triton_td_loss(*given)
    saved = Saved.of(batch, spec, td_error, normaliser)
    torch.library.opcheck(_ops.triton_td_loss_backward, boxed.backward_arguments(torch.ones_like(loss), saved, spec))


@pytest.mark.parametrize("kind", ["max", "argmax", "soft"])
def test_the_sweeps_that_a_graph_holds(setting: Setting, kind: str) -> None:
    hidden, weight = torch.randn(6, 16, device=setting.device), torch.randn(40, 16, device=setting.device)
    mask = torch.rand(6, 40, device=setting.device) < 0.9
    given = (hidden, weight, None, mask, kind, 0.5)
    for actions in (None, torch.randint(40, (6,), device=setting.device)):
        torch.library.opcheck(_ops.sweep, (*given, actions))
        if setting.backend == "triton":
            for auto in (True, False):
                torch.library.opcheck(_ops.triton_sweep, (*given, actions, auto))


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [True, False, False]])
def test_the_backward_of_a_sweep_that_a_graph_holds(setting: Setting, needs: list[bool]) -> None:
    hidden, weight, bias = (torch.randn(size, device=setting.device) for size in ((6, 16), (40, 16), (40,)))
    mask, actions = torch.rand(6, 40, device=setting.device) < 0.9, torch.randint(40, (6,), device=setting.device)
    coefficients = torch.rand(3, 6, device=setting.device)
    given = (hidden, weight, bias, mask, coefficients[0], coefficients[1], actions, coefficients[2], needs)
    torch.library.opcheck(_ops.sweep_backward, given)
    if setting.backend == "triton":
        for auto in (True, False):
            torch.library.opcheck(_ops.triton_sweep_backward, (*given, auto))
