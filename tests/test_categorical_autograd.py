"""What autograd, torch.compile and torch.func see of the categorical losses."""

import contextlib
from typing import Any

import pytest
import torch
from bounds import assert_agree, assert_close
from categorical_data import check, compact, every_setting, make, ready
from categorical_oracle import categorical_oracle
from conftest import Setting
from test_categorical import DTYPES, name_of, options
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from dqn_fused import (
    FusedCategoricalLoss,
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
)
from dqn_fused._backends import serving
from dqn_fused.categorical_reference import categorical_loss, categorical_td_loss

built = pytest.mark.skipif("compiled" not in serving(torch.device("cpu"), "categorical"), reason="not built")


@every_setting
@pytest.mark.parametrize("reduction", ["mean", "none", "weighted_mean"])
def test_gradcheck(backend: Setting, reduction: str) -> None:
    arguments = make((3, 2, 4), torch.float64, seed=40)
    x = arguments.pop("logits").requires_grad_()
    weights = torch.rand(3)

    def loss(x: Tensor) -> Any:
        return fused_categorical_loss(x, **arguments, weights=weights, reduction=reduction, backend=backend.backend)

    assert torch.autograd.gradcheck(loss, x)


@every_setting
@pytest.mark.parametrize("projection", ["two_hot", "hl_gauss"])
def test_gradcheck_of_a_ready_target(backend: Setting, projection: str) -> None:
    arguments = ready((3, 2, 4), torch.float64, seed=41) | {"projection": projection}
    x = arguments.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused_categorical_td_loss(x, **arguments, backend=backend.backend), x)
    assert torch.autograd.gradgradcheck(lambda x: categorical_td_loss(x, **arguments), x)


def test_gradcheck_of_the_reference() -> None:
    arguments = make((3, 2, 4), torch.float64, seed=42)
    x = arguments.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: categorical_loss(x, **arguments), x)
    assert torch.autograd.gradgradcheck(lambda x: categorical_loss(x, **arguments), x)


@every_setting
@pytest.mark.parametrize("names", ["", "online mask", "values weights gammas", "compacted mask"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_agrees(backend: Setting, names: str, reduction: str) -> None:
    arguments = options((12, 3, 8), set(names.split()), torch.float64, seed=43)
    results = []
    for function in (fused_categorical_loss, categorical_loss):
        x = arguments["logits"].clone().requires_grad_()
        name = {"backend": backend.backend} if function is fused_categorical_loss else {}
        loss, td_error = function(**{**arguments, "logits": x}, reduction=reduction, return_td_error=True, **name)
        loss.sum().backward()
        results.append((loss.detach(), td_error, x.grad))
    assert_agree(*results)


@every_setting
def test_logits_may_change_before_the_backward(backend: Setting) -> None:
    """They are not kept."""
    arguments = make((6, 3, 4), seed=45)
    x = arguments["logits"].clone().requires_grad_()
    y = x * 1
    loss = fused_categorical_loss(**{**arguments, "logits": y}, backend=backend.backend)
    y.detach().zero_()
    loss.backward()
    assert_close("gradient", x.grad, categorical_oracle(**arguments).gradient)


@every_setting
def test_everything_but_the_logits_is_a_constant(backend: Setting) -> None:
    arguments = options((6, 3, 9), {"online", "weights", "gammas"}, seed=46)
    arguments |= {"support": torch.linspace(-5, 10, 9)}
    for x in arguments.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    fused_categorical_loss(**arguments, backend=backend.backend).backward()
    assert [k for k, x in arguments.items() if isinstance(x, Tensor) and x.grad is not None] == ["logits"]
    with torch.no_grad():
        assert not fused_categorical_loss(**arguments, backend=backend.backend).requires_grad


@every_setting
def test_an_ensemble_is_a_leading_dimension(backend: Setting) -> None:
    arguments = make((3, 7, 4, 9), torch.float64, seed=50)
    whole = fused_categorical_loss(**arguments, reduction="none", backend=backend.backend)
    for k in range(3):
        member = {name: x[k] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        assert_agree(whole[k], fused_categorical_loss(**member, reduction="none", backend=backend.backend))


@every_setting
@pytest.mark.graph
@pytest.mark.parametrize("case", ["plain", "ready", "atoms", "compacted", "none"])
def test_torch_compile_takes_it_as_one_graph(backend: Setting, case: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    arguments = make((6, 3, 9), seed=51)
    if case == "ready":
        arguments = ready((6, 3, 9), seed=51) | {"projection": "hl_gauss"}
    if case == "atoms":
        arguments["support"] = torch.linspace(-5, 10, 9)
    if case == "compacted":
        arguments = compact(arguments)
    if case == "none":
        arguments["reduction"] = "none"

    def graph(function: Any) -> Any:
        compiled = torch.compile(lambda logits, given: function(logits * 1, **given), fullgraph=True)
        return lambda logits, **given: compiled(logits, given)

    check(backend, arguments, form=graph)


@every_setting
@pytest.mark.graph
def test_an_illegal_action_inside_torch_compile(backend: Setting) -> None:
    """Looking would break the graph: its loss is NaN, and its gradient zero."""
    arguments = make((6, 3, 9), seed=52)
    arguments["actions"][2] = 3
    x = arguments.pop("logits")

    @torch.compile(fullgraph=True)
    def run(x: Tensor) -> Any:
        return fused_categorical_loss(x, **arguments, reduction="none", return_td_error=True, backend=backend.backend)

    leaf = x.clone().requires_grad_()
    loss, td_error = run(leaf)
    loss.sum().backward()
    assert loss.isnan().tolist() == td_error.isnan().tolist() == [i == 2 for i in range(6)]
    assert leaf.grad is not None
    assert not leaf.grad[2].any()
    assert leaf.grad.isfinite().all()


@every_setting
@pytest.mark.graph
def test_a_network_and_the_module_are_one_graph(backend: Setting) -> None:
    network = nn.Sequential(nn.Linear(4, 3 * 9, dtype=torch.float64), nn.Unflatten(1, (3, 9)))
    criterion = FusedCategoricalLoss(torch.linspace(-5, 10, 9), backend=backend.backend)
    arguments = make((6, 3, 9), seed=53)
    states = torch.randn(6, 4, dtype=torch.float64)

    @torch.compile(fullgraph=True)
    def step() -> Tensor:
        return criterion(network(states), *(arguments[k] for k in ("actions", "rewards", "next_logits", "terminated")))

    step().backward()
    compiled = network[0].bias.grad.clone()
    network.zero_grad()
    given = {k: x for k, x in arguments.items() if k not in ("logits", "support")}
    criterion(network(states), **given).backward()
    assert_agree(compiled, network[0].bias.grad)


@every_setting
def test_shapes_without_values(backend: Setting) -> None:
    arguments = make((2, 3, 4, 9))
    mode = FakeTensorMode()
    without = mode.from_tensor if backend.backend != "torch" else lambda x: x.to("meta")
    arguments = {k: without(x) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    with mode if backend.backend != "torch" else contextlib.nullcontext():
        found = fused_categorical_loss_and_grad(**arguments, return_td_error=True, backend=backend.backend)
    assert [tuple(x.shape) for x in found] == [(), (2, 3, 4, 9), (2, 3)]


OP_CASES = ["", "mask online weights gammas", "values compacted"]


def op_arguments(arguments: dict[str, Any], reduction: int, check: bool) -> tuple[Any, ...]:
    a, gamma, support = arguments, arguments.get("gamma", 0.99), arguments["support"]
    gammas = gamma if isinstance(gamma, Tensor) else None
    ends = (0.0, 0.0) if isinstance(support, Tensor) else support
    return (
        a["logits"], a["actions"], a.get("rewards", a.get("target")), a.get("next_logits"), a.get("terminated"),
        a.get("non_final_mask"), gammas, 0.0 if gammas is not None else gamma, a.get("next_logits_online"),
        a.get("next_action_mask"), a.get("weights"), support if isinstance(support, Tensor) else None, *ends,
        a.get("sigma", 0.0), reduction, check,
    )  # fmt: skip


@every_setting
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("names", OP_CASES)
def test_the_ops_that_a_graph_holds(backend: Setting, names: str, reduction: int) -> None:
    if backend.backend != "triton":
        pytest.skip("its graph holds the compiled ops, or PyTorch's operations")
    from dqn_fused import _distributional_ops as ops

    arguments = {
        k: x.to(backend.device) if isinstance(x, Tensor) else x
        for k, x in options((7, 3, 9), set(names.split()), seed=53).items()
    }
    if not names:
        arguments["support"] = torch.linspace(-5, 10, 9, device=backend.device)
    given = op_arguments(arguments, reduction, False)
    torch.library.opcheck(ops.triton_categorical_loss, given)
    torch.library.opcheck(ops.triton_categorical_loss_and_grad, given)
    loss, _, slopes = ops.triton_categorical_loss(*given)
    saved = (slopes, arguments["actions"], arguments.get("weights"), 3, torch.float32, reduction)
    torch.library.opcheck(ops.triton_rows_backward, (torch.ones_like(loss), *saved))


@built
@pytest.mark.opcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("names", OP_CASES)
def test_opcheck(names: str, dtype: torch.dtype) -> None:
    from dqn_fused import _distributional_ops as ops

    arguments = options((7, 3, 9), set(names.split()), dtype, seed=54)
    if not names:
        arguments["support"] = torch.linspace(-5, 10, 9)
    for reduction in (0, 1):
        given = op_arguments(arguments, reduction, True)
        torch.library.opcheck(ops.categorical_loss, given)
        torch.library.opcheck(ops.categorical_loss_and_grad, given)
        loss, _, slopes = ops.categorical_loss(*given)
        backward = (loss, slopes, arguments["actions"], arguments.get("weights"), 3, dtype, reduction)
        torch.library.opcheck(ops.rows_backward, backward)


@built
@pytest.mark.parametrize(
    "changed",
    [
        {"logits": torch.zeros(7, 27)},
        {"logits": torch.zeros(7, 3, 0)},
        {"actions": torch.zeros(6, dtype=torch.int64)},
        {"actions": torch.zeros(7)},
        {"rewards": torch.zeros(7, 2)},
        {"next_logits": torch.zeros(6, 3, 9)},
        {"next_logits": torch.zeros(7, 3, 8)},
        {"next_logits": torch.zeros(7, 4, 9)},
        {"next_logits": None},
        {"next_logits_online": torch.zeros(7, 3, 8)},
        {"next_logits_online": torch.zeros(6, 3)},
        {"next_action_mask": torch.ones(7, 3)},
        {"next_action_mask": torch.ones(7, 9, dtype=torch.bool)},
        {"terminated": torch.zeros(6)},
        {"weights": torch.zeros(7, dtype=torch.int64)},
        {"support": torch.linspace(0, 1, 8)},
        {"support": (1.0, 0.0)},
        {"sigma": 0.75},
        {"gamma": torch.zeros(1, 7)},
    ],
    ids=lambda x: " ".join(f"{k} {tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in x.items()),
)
def test_an_op_refuses_what_does_not_fit(changed: dict[str, Any]) -> None:
    """It is asked with whatever a graph holds: nothing is read beyond a tensor's end."""
    from dqn_fused import _distributional_ops as ops

    with pytest.raises(RuntimeError, match="does not fit"):
        ops.categorical_loss(*op_arguments({**make((7, 3, 9)), **changed}, 1, True))


@built
@pytest.mark.parametrize("part", ["upstream", "slopes", "dtype", "actions", "weights"])
def test_the_backward_op_refuses_what_does_not_fit(part: str) -> None:
    from dqn_fused import _distributional_ops as ops

    given: dict[str, Any] = {
        "upstream": torch.ones(()), "slopes": torch.zeros(7, 9), "actions": torch.zeros(7, dtype=torch.int64),
        "weights": torch.ones(7), "A": 3, "dtype": torch.float32,
    }  # fmt: skip
    assert ops.rows_backward(*given.values(), 1).shape == (7, 3, 9)
    wrong = {
        "upstream": torch.ones(7), "slopes": torch.zeros(9, 7).t(), "dtype": torch.float64,
        "actions": torch.zeros(6, dtype=torch.int64), "weights": torch.ones(7, 9),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="does not fit"):
        ops.rows_backward(*{**given, part: wrong[part]}.values(), 1)
