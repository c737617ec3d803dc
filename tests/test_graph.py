"""The loss in a graph of torch.compile: which backend "auto" takes there, how many graphs, and what they compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import assert_agree, assert_close
from conftest import Setting
from data import source
from functorch.compile import make_boxed_func
from oracle import oracle
from quantile_data import make as make_quantiles
from test_family import VARIANTS, variant
from test_loss import check, make, shape_id
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from dqn_fused import (
    _backends,
    fused_categorical_loss,
    fused_categorical_td_loss,
    fused_dqn_loss,
    fused_dqn_loss_and_grad,
    fused_quantile_loss,
)
from dqn_fused._backends import serving

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

AUTO = Setting("auto", "cpu")
NARROW, WIDE = (8, 64), (8, 65)
HAS_OPS = "compiled" in serving(torch.device("cpu"))


def compiled_loss(function: Callable[..., Any] = fused_dqn_loss, **options: Any) -> Callable[..., Any]:
    """Compile a function of its own for each caller: Dynamo counts the graphs of a function."""

    def loss(arguments: dict[str, Any]) -> Any:
        return function(**arguments)

    graph = torch.compile(loss, fullgraph=True, **options)
    return lambda **arguments: graph(arguments)


def ops_of(
    arguments: dict[str, Any], function: Callable[..., Any] = fused_dqn_loss, x: str = "q", **options: Any
) -> set[str]:
    """Names of this project's ops in the graphs of the forward and the backward of a loss of x."""
    found: list[Any] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        return make_boxed_func(graph.forward)

    call = compiled_loss(function, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    call(**{**arguments, x: arguments[x].requires_grad_()}, **options).backward()
    assert found
    return {op.name() for op in found if op.namespace == "dqn_fused"}


@pytest.mark.graph
@pytest.mark.parametrize("name", ["huber", "munchausen-cql-masks-weights-huber"])
@pytest.mark.parametrize("n", [2, 16384])
def test_auto_takes_pytorch_operations_for_few_actions_at_any_batch(n: int, name: str) -> None:
    for A in (2, 64):
        assert ops_of(variant(name, (n, A))) == set()


@pytest.mark.skipif(not HAS_OPS, reason="no ops for the CPU")
@pytest.mark.parametrize("n", [2, 1024])
def test_auto_takes_the_ops_for_many_actions(n: int) -> None:
    for A in (65, 512):
        for arguments in (make((n, A)), variant("munchausen-cql-masks-weights-huber", (n, A))):
            assert ops_of(arguments) == {"dqn_fused::td_loss", "dqn_fused::td_loss_backward"}


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=shape_id)
def test_a_named_backend_is_taken_at_any_size(shape: tuple[int, int]) -> None:
    assert ops_of(make(shape), backend="torch") == set()
    if HAS_OPS:
        assert ops_of(make(shape), backend="compiled") == {"dqn_fused::td_loss", "dqn_fused::td_loss_backward"}


def quantiles(n: int, K: int) -> tuple[dict[str, Any], Callable[..., Any], str]:
    return {**make_quantiles((n, 3, K)), "weights": torch.rand(n)}, fused_quantile_loss, "quantiles"


def ready(n: int, K: int) -> tuple[dict[str, Any], Callable[..., Any], str]:
    arguments = {"logits": torch.randn(n, 3, K), "actions": torch.zeros(n, dtype=torch.int64), "target": torch.randn(n)}
    return {**arguments, "support": (-1.0, 1.0)}, fused_categorical_td_loss, "logits"


def atoms(n: int, K: int) -> tuple[dict[str, Any], Callable[..., Any], str]:
    arguments = make_quantiles((n, 3, K))
    arguments |= {"logits": arguments.pop("quantiles"), "next_logits": arguments.pop("next_quantiles")}
    return {**arguments, "support": (-1.0, 1.0)}, fused_categorical_loss, "logits"


@pytest.mark.graph
@pytest.mark.parametrize("n", [2, 512])
def test_auto_takes_pytorch_operations_for_few_quantiles_and_atoms(n: int) -> None:
    for K in (8, 32):
        assert ops_of(*quantiles(n, K)) == set()
        assert ops_of(*atoms(n, K)) == ops_of(*ready(n, K)) == set()


@pytest.mark.graph
@pytest.mark.skipif(not HAS_OPS, reason="no ops for the CPU")
def test_auto_takes_the_op_for_many_quantiles_or_atoms_and_a_named_backend_its_own() -> None:
    rows_backward = "dqn_fused::rows_backward"
    assert ops_of(*quantiles(4, 33)) == {"dqn_fused::quantile_loss", rows_backward}
    assert ops_of(*atoms(4, 33)) == {"dqn_fused::categorical_loss", rows_backward}
    assert ops_of(*quantiles(4, 33), backend="torch") == ops_of(*atoms(4, 33), backend="torch") == set()
    assert ops_of(*quantiles(4, 8), backend="compiled") == {"dqn_fused::quantile_loss", rows_backward}
    assert ops_of(*atoms(4, 8), backend="compiled") == {"dqn_fused::categorical_loss", rows_backward}


@pytest.mark.graph
@pytest.mark.parametrize(("family", "K"), [(quantiles, 32), (quantiles, 33), (atoms, 32), (atoms, 51), (ready, 51)])
def test_a_distributional_loss_makes_no_graph_for_each_batch(family: Callable[..., Any], K: int) -> None:
    """And it computes the same as outside of a graph."""
    _, function, x = family(2, K)
    call = compiled_loss(function, backend="aot_eager")
    for n in (8, 11, 32, 7):
        arguments = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in family(n, K)[0].items()
        }
        arguments[x].requires_grad_()
        results = []
        for run in (call, function):
            loss = run(**arguments)
            results.append((loss, *torch.autograd.grad(loss, arguments[x])))
        assert_agree(*results)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.graph
@pytest.mark.parametrize("name", ["huber", "double-mask-weights-huber", "munchausen-cql-masks-weights-huber"])
@pytest.mark.parametrize("A", [5, 64, 65])
@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "marked dynamic"])
def test_the_choice_makes_no_graph_for_each_batch(name: str, A: int, marked: bool) -> None:
    """A graph for the first size and one for the others, as PyTorch makes them; only one if it is marked dynamic."""
    call = compiled_loss(backend="aot_eager")
    for n in (8, 11, 32, 1000, 5000, 7):
        arguments = variant(name, (n, A))
        if marked:
            for x in arguments.values():
                if isinstance(x, Tensor):
                    torch._dynamo.mark_dynamic(x, 0)  # refuses a guard that makes it a constant
        arguments["q"].requires_grad_()
        call(**arguments).backward()
    assert counters["stats"]["unique_graphs"] == (1 if marked else 2)
    assert not counters["graph_break"]


def test_the_number_of_actions_makes_one_more_graph() -> None:
    """Where it varies: one for up to 64, one for more."""
    call = compiled_loss(backend="aot_eager", dynamic=True)
    for shape in ((8, 3), (9, 18), (10, 64), (11, 65), (12, 300), (13, 5000), (14, 30)):
        call(**make(shape))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.graph
@pytest.mark.parametrize("backend", ["auto", *serving(torch.device("cpu"))])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=shape_id)
def test_the_first_call_of_a_process_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, backend: str, shape: tuple[int, int]
) -> None:
    """A graph that stored the choice in a dictionary failed its own guard, that the key is absent.

    It was compiled a second time. The tests did not see it, because they made an eager call first.
    """
    monkeypatch.setattr(_backends, "_CHOSEN", {})
    call, arguments = compiled_loss(backend="aot_eager"), make(shape)
    for _ in range(3):
        call(**arguments, backend=backend)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.graph
@pytest.mark.parametrize("shape", [(33, 19), (1030, 7), (5, 65)], ids=shape_id)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_computes_what_the_oracle_does(name: str, shape: tuple[int, int]) -> None:
    check(AUTO, variant(name, shape), call=compiled_loss())


@pytest.mark.graph
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["huber", "double-mask", "munchausen-cql-masks-weights-huber"])
def test_a_graph_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check(AUTO, variant(name, (33, 19), dtype), call=compiled_loss())


@pytest.mark.graph
@pytest.mark.parametrize("A", [3, 70])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_illegal_actions_inside_a_graph(backend: str, A: int) -> None:
    """NaN in td and loss, a gradient row of zeros, stored densely or scattered; the others as they were."""
    arguments = variant("double-mask-weights-huber", (9, A), torch.float64)
    q = arguments["q"].requires_grad_()
    expected = fused_dqn_loss(**arguments, reduction="sum", return_td_error=True)
    (expected_grad,) = torch.autograd.grad(expected[0], q)
    bad = torch.tensor([-1, A, 2**32 + 1, -(2**40)])
    arguments["actions"] = arguments["actions"].index_copy(0, torch.arange(4), bad)
    loss, td = compiled_loss()(**arguments, reduction="sum", return_td_error=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, q)
    assert loss.isnan()
    assert td[:4].isnan().all()
    assert not grad[:4].any()
    assert_agree(td[4:], expected[1][4:])
    assert_agree(grad[4:], expected_grad[4:])


@pytest.mark.graph
@pytest.mark.parametrize("A", [2, 16, 19, 40])
def test_equal_and_nan_choices_inside_a_graph(A: int) -> None:
    """The first of equal values, and NaN above all, in whatever order the code of a graph compares them."""
    n = 200
    g = source()
    arguments = make((n, A)) | {"terminated": torch.zeros(n, dtype=torch.bool)}
    online = torch.randint(3, (n, A), generator=g).float()  # several largest in each row
    online[::5, A // 2] = torch.nan
    best = online.argmax(1)
    assert (best[::5] == A // 2).all()
    _, td = compiled_loss()(**arguments, next_q_online=online, gamma=1.0, return_td_error=True)
    assert_close("td_error", td, oracle(**arguments, next_q_online=online, gamma=1.0).td_error)
    assert td.isnan().sum() == n / 5


@pytest.mark.graph
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=shape_id)
def test_loss_and_grad_inside_a_graph(shape: tuple[int, int]) -> None:
    arguments = variant("double-mask-weights-huber", shape)
    both = torch.compile(lambda given: fused_dqn_loss_and_grad(**given), fullgraph=True)
    (loss, grad), expected = both(arguments), oracle(**arguments)
    assert_close("loss", loss, expected.loss)
    assert_close("grad_q", grad, expected.grad_q)
