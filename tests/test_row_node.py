"""The node of the distributional losses in C++: what row_loss.RowLoss does, for the compiled ops, only where it may."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import quantile_data
import torch
from bounds import assert_agree
from distributional_data import LOSSES, Loss, every_loss
from test_node import Seen, Sub, in_graphs, in_threads
from test_node import recorded as recorded_as
from torch import Tensor
from torch._dynamo import compiled_autograd

import dqn_fused
from dqn_fused import fused_categorical_loss, fused_quantile_loss, node
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.quantile_arguments import QuantileSpec

pytestmark = pytest.mark.skipif(node.MODULE is None, reason=f"no node in C++: {node.MISSING}")


@pytest.fixture(autouse=True)
def loaded() -> None:
    """The node serves once the compiled backend has been asked for."""
    dqn_fused.backends()
    assert {"auto", "compiled"} <= node.serves


def recorded(loss: Tensor) -> bool:
    return recorded_as(loss, "RowLossBackward")


def quantile_options(x: dict[str, Any], shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    *N, A, K = shape
    return {
        "plain": {},
        "taus, kappa": {"taus": torch.rand(K), "kappa": 0.0, "quantile_reduction": "mean"},
        "taus of all": {"taus": torch.rand(*N, K), "weights": torch.rand(N)},
        "double": {"next_quantiles_online": torch.randn(*N, A, 4), "gamma": torch.rand(N)},
        "values, mask": {
            "next_quantiles_online": torch.randn(*N, A),
            "next_action_mask": torch.ones(*N, A, dtype=torch.bool),
        },
        "a number": {"gamma": 1},
    }


def categorical_options(x: dict[str, Any], shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    *N, A, K = shape
    if "target" in x:
        return {"plain": {}, "weights": {"weights": torch.rand(N)}, "two-hot": {"projection": "two_hot"}}
    return {
        "plain": {},
        "weights": {"weights": torch.rand(N), "gamma": torch.rand(N)},
        "double": {"next_logits_online": torch.randn(*N, A, K)},
        "values, mask": {
            "next_logits_online": torch.randn(*N, A),
            "next_action_mask": torch.ones(*N, A, dtype=torch.bool),
        },
    }


def results(family: Loss, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """(loss, TD errors, gradient) and the loss with its graph."""
    x = arguments[family.input].detach().clone().requires_grad_()
    loss, td_error = family.function(**arguments | {family.input: x}, return_td_error=True)
    assert not td_error.requires_grad
    return [loss.detach(), td_error, *torch.autograd.grad(loss.sum(), x, retain_graph=True)], loss


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "weighted_mean"])
@pytest.mark.parametrize("shape", [(7, 3, 5), (2, 3, 2, 6)], ids=["3d", "4d"])
def test_the_same_bits_as_the_function(family: Loss, shape: tuple[int, ...], reduction: str) -> None:
    """Both call the same ops: there is nothing to round."""
    given = family.make(shape) | {"reduction": reduction}
    several = quantile_options if family.input == "quantiles" else categorical_options
    for name, options in several(given, shape).items():
        found, loss = results(family, given | options)
        assert recorded(loss), name
        expected, loss = node.without(lambda options=options: results(family, given | options))()
        assert not recorded(loss)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
        together = family.and_grad(**given | options, return_td_error=True)
        expected = node.without(lambda options=options: family.and_grad(**given | options, return_td_error=True))()
        assert all(map(torch.equal, together, expected))


def test_what_else_is_recorded() -> None:
    family = LOSSES["quantile"]
    given = family.arguments()
    assert recorded(fused_quantile_loss(**given, backend="compiled"))
    assert recorded(fused_quantile_loss(**quantile_data.compact(given)))
    assert recorded(fused_quantile_loss(**given | {"actions": given["actions"].unsqueeze(1)}))
    assert recorded(fused_quantile_loss(**given | {"quantiles": torch.nn.Parameter(given["quantiles"].detach())}))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert recorded(fused_quantile_loss(**given | {"quantiles": given["quantiles"].to(dtype)}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recorded(fused_quantile_loss(**given))
    assert not recorded(fused_quantile_loss(**given, backend="torch"))


def test_atoms_that_are_a_tensor_are_looked_at_before_they_are_taken() -> None:
    """The op takes any: that they are even is checked here, once for as long as they are unchanged."""
    family = LOSSES["categorical"]
    atoms = torch.linspace(-5, 10, 5)
    given = family.arguments(support=atoms)
    expected = family.gradient(given)
    assert recorded(fused_categorical_loss(**given))
    assert torch.equal(family.gradient(given), expected)
    atoms[1] += 1
    with pytest.raises(ValueError, match="support: expected atoms that increase by the same step"):
        fused_categorical_loss(**given)
    assert not recorded(fused_categorical_loss(**given | {"support": torch.linspace(-5, 10, 5).as_subclass(Sub)}))


@every_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded(family: Loss, mode: Callable[[], Any]) -> None:
    given = family.arguments()
    with mode():
        loss = family.function(**given)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert family.function(**given | {family.input: given[family.input].detach()}).grad_fn is None
    assert all(x.grad_fn is None for x in family.and_grad(**given))


@every_loss
def test_modes_and_subclasses_see_the_ops(family: Loss) -> None:
    given = family.arguments()
    with Seen() as seen:
        family.function(**given).backward()
    forward = "quantile_loss" if family.input == "quantiles" else "categorical_loss"
    assert {f"dqn_fused::{forward}", "dqn_fused::rows_backward"} <= set(seen.names)
    loss = family.function(**given | {family.reward(): given[family.reward()].as_subclass(Sub)})
    assert not recorded(loss)
    assert torch.equal(loss.as_subclass(Tensor), family.function(**given))


@every_loss
def test_hooks(family: Loss) -> None:
    """Of the node, of the input and of what is saved."""
    given = family.arguments(weights=torch.rand(7))
    expected = family.gradient(given)
    counts = {"pack": 0, "unpack": 0}

    def counted(what: str) -> Callable[[Tensor], Tensor]:
        def hook(x: Tensor) -> Tensor:
            counts[what] += 1
            return x.clone()

        return hook

    with torch.autograd.graph.saved_tensors_hooks(counted("pack"), counted("unpack")):
        loss = family.function(**given)
    seen: list[Tensor] = []
    loss.grad_fn.register_hook(lambda grads, outputs: seen.append(grads[0]))
    loss.grad_fn.register_prehook(lambda outputs: (2 * outputs[0], *outputs[1:]))
    given[family.input].register_hook(lambda grad: grad * 2)
    loss.backward()
    assert counts == {"pack": 3, "unpack": 3}
    assert torch.equal(seen[0], 2 * expected)
    assert torch.equal(given[family.input].grad, 4 * expected)


@every_loss
def test_a_hook_that_raises_is_not_swallowed(family: Loss) -> None:
    def hook(x: Tensor) -> Tensor:
        raise LookupError("hook")

    with pytest.raises(LookupError, match="hook"), torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x):
        family.function(**family.arguments())


@every_loss
def test_anomaly_mode_names_the_forward(family: Loss) -> None:
    with torch.autograd.set_detect_anomaly(True):
        loss = family.function(**family.arguments(**{family.reward(): torch.full((7,), torch.nan)}))
        raised = pytest.raises(RuntimeError, match=r"RowLossBackward.* returned nan values")
        with raised, pytest.warns(UserWarning, match=r"Error detected in RowLoss(.|\n)*test_row_node"):
            loss.backward()


@every_loss
@pytest.mark.parametrize("name", ["actions", "weights"])
def test_a_change_of_what_is_saved_is_noticed(family: Loss, name: str) -> None:
    given = family.arguments(weights=torch.rand(7))
    loss = family.function(**given)
    given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_loss
def test_a_released_graph_says_so(family: Loss) -> None:
    given = family.arguments()
    loss = family.function(**given)
    loss.backward(retain_graph=True)
    once = given[family.input].grad.clone()
    loss.backward()
    assert torch.equal(given[family.input].grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_loss
def test_a_second_derivative_is_refused_as_by_the_function(family: Loss) -> None:
    """It reaches the node through the slopes, also where nothing but the slopes is asked for."""
    said = []
    for run in (lambda f: f, node.without):
        gradient = run(lambda: family.gradient(family.arguments(), create_graph=True))()
        with pytest.raises(NotImplementedError) as raised:
            gradient.square().sum().backward()
        said.append(str(raised.value))
    assert said[0] == said[1]


@every_loss
def test_gradients_in_a_batch(family: Loss) -> None:
    """Of is_grads_batched: each is the gradient of one sample."""
    given = family.arguments(dtype=torch.float64, reduction="none")
    loss, x = family.function(**given), given[family.input]
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(
            loss,
            x,
            torch.eye(7, dtype=torch.float64),
            is_grads_batched=True,
            retain_graph=True,
            create_graph=create_graph,
        )
        for i in range(7):
            (expected,) = torch.autograd.grad(loss[i], x, retain_graph=True)
            assert_agree(found[i], expected)


@every_loss
def test_nothing_is_left_behind(family: Loss) -> None:
    """The node holds the slopes, whose grad_fn it is: a cycle, were the result saved as another tensor is."""
    given = family.arguments(weights=torch.rand(7))
    x = given[family.input]
    before, others = (sys.getrefcount(given["weights"]), sys.getrefcount(x)), in_graphs()
    for _ in range(20):
        family.function(**given)
        family.function(**given).backward()
        family.gradient(given, create_graph=True)
        family.gradient(given)
    assert (sys.getrefcount(given["weights"]), sys.getrefcount(x)) == before
    assert in_graphs() <= others  # fewer, if what an earlier test has left goes meanwhile


@every_loss
@pytest.mark.graph
def test_compiled_autograd(family: Loss) -> None:
    """A backward that torch.compile traces, of a graph that was recorded without it."""
    given = family.arguments(weights=torch.rand(7))
    x, expected = given[family.input], family.gradient(given)
    for _ in range(2):
        loss = family.function(**given)
        assert recorded(loss)
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            loss.backward()
        assert torch.equal(x.grad, expected)
        x.grad = None


@pytest.mark.graph
def test_a_traced_backward_knows_the_reduction() -> None:
    """It is a constant of the graph, and not that of the loss before."""
    family = LOSSES["quantile"]
    x = None
    for reduction in ("mean", "sum", "mean"):
        given = family.arguments(reduction=reduction)
        x = given[family.input]
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            family.function(**given).backward()
        assert torch.equal(x.grad, family.gradient(given))


@every_loss
def test_threads(family: Loss) -> None:
    """Calls from several threads at once, whose backwards need Python and the node's lock."""
    given = [family.arguments(dtype=torch.float64, weights=torch.rand(7)) for _ in range(4)]
    expected = [family.gradient(one) for one in given]
    wrong: list[int] = []
    right: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            assert_agree(family.gradient(given[i], create_graph=True).detach(), expected[i])
            if not torch.equal(family.gradient(given[i]), expected[i]):
                wrong.append(i)
        right.append(i)

    in_threads(work)
    assert wrong == []
    assert sorted(right) == [0, 1, 2, 3]


def test_a_call_that_is_no_batch_is_an_error_and_no_crash() -> None:
    assert node.MODULE is not None
    batch = dqn_fused.arguments.Batch(None, 1, "x", None)  # type: ignore[arg-type]
    quantiles, logits = QuantileSpec(), CategoricalSpec((0.0, 1.0))
    for recording in (True, False):
        quantile, categorical = (node.row_calls[name][recording] for name in ("quantile", "categorical"))
        assert quantile(quantiles, batch) is None
        assert quantile(quantiles._replace(taus=1), batch) is None  # type: ignore[arg-type]
        assert categorical(logits, batch) is None
        assert categorical(CategoricalSpec("x"), batch) is None  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        node.MODULE.record_quantile(quantiles, batch, True)
    with pytest.raises(TypeError):
        node.MODULE.record_categorical(logits, batch, True)


@every_loss
def test_what_is_wrong_is_named_as_without_the_node(family: Loss) -> None:
    wrong: list[dict[str, Any]] = [
        {"actions": torch.full((7,), 3)},
        {"actions": torch.zeros(7)},
        {family.reward(): torch.zeros(6)},
        {family.input: torch.zeros(7, 15, requires_grad=True)},
        {"weights": torch.ones(7, dtype=torch.int64)},
    ]
    if family.reward() == "rewards":
        wrong += [{"gamma": 10**400}, {"gamma": "x"}, {"terminated": torch.zeros(7, 7)}, {f"next_{family.input}": None}]
    for changed in wrong:
        said = []
        for run in (lambda f: f, node.without):
            with pytest.raises((ValueError, TypeError, IndexError, OverflowError)) as raised:
                run(lambda changed=changed: family.function(**family.arguments() | changed))()
            said.append((type(raised.value), str(raised.value)))
        assert said[0] == said[1]
