"""The node in C++ does what autograd.TDLoss does, for the compiled ops, and only where it may."""

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_family import VARIANTS, variant
from test_loss import compact, make
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_fused
from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad, fused_td_loss, node
from dqn_fused.__main__ import facts, report

pytestmark = pytest.mark.skipif(node.MODULE is None, reason=f"no node in C++: {node.MISSING}")


@pytest.fixture(autouse=True)
def loaded() -> None:
    """The node serves once the compiled backend has been asked for."""
    dqn_fused.backends()
    assert {"auto", "compiled"} <= node.serves


def recorded(loss: Tensor, name: str = "TDLossBackward") -> bool:
    """Whether the node in C++ recorded it: a Python Function has saved_tensors."""
    graph = loss.grad_fn
    while graph is not None and graph.name() != name:  # what gives it another shape
        graph = graph.next_functions[0][0]
    assert graph is not None
    return not hasattr(graph, "saved_tensors")


def arguments(**more: Any) -> dict[str, Any]:
    found = make((7, 5)) | more
    found["q"].requires_grad_()
    return found


def results(arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """(loss, TD errors, gradient) and the loss with its graph."""
    q = arguments["q"].detach().clone().requires_grad_()
    loss, td_error = fused_dqn_loss(**arguments | {"q": q}, return_td_error=True)
    return [loss.detach(), td_error, *torch.autograd.grad(loss.sum(), q, retain_graph=True)], loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "weighted_mean"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bits_as_the_function(name: str, shape: tuple[int, ...], reduction: str) -> None:
    """Both call the same ops: there is nothing to round."""
    given = variant(name, shape) | {"reduction": reduction}
    found, loss = results(given)
    assert recorded(loss)
    expected, loss = node.without(lambda: results(given))()
    assert not recorded(loss)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_what_else_is_recorded() -> None:
    given = arguments()
    assert recorded(fused_dqn_loss(**given, backend="compiled"))
    assert recorded(fused_dqn_loss(**compact(given)))
    assert recorded(fused_td_loss(given["q"], given["actions"], given["rewards"]))
    assert recorded(fused_dqn_loss(**given | {"gamma": torch.rand(7), "actions": given["actions"].unsqueeze(1)}))
    assert recorded(fused_dqn_loss(**given | {"q": torch.nn.Parameter(given["q"].detach())}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recorded(fused_dqn_loss(**given))
    assert not recorded(fused_dqn_loss(**given, backend="torch"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded(mode: Callable[[], Any]) -> None:
    given = arguments()
    with mode():
        loss = fused_dqn_loss(**given)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert fused_dqn_loss(**given | {"q": given["q"].detach()}).grad_fn is None
    assert all(x.grad_fn is None for x in fused_dqn_loss_and_grad(**given))


class Seen(TorchDispatchMode):
    """What a mode sees of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


class Sub(Tensor):
    """A subclass that changes nothing."""


def test_modes_and_subclasses_see_the_ops() -> None:
    given = arguments()
    with Seen() as seen:
        fused_dqn_loss(**given).backward()
    assert {"dqn_fused::td_loss", "dqn_fused::td_loss_backward"} <= set(seen.names)
    loss = fused_dqn_loss(**given | {"next_q": given["next_q"].as_subclass(Sub)})
    assert torch.equal(loss.as_subclass(Tensor), fused_dqn_loss(**given))


def test_hooks() -> None:
    """Of the node, of q and of what is saved."""
    given = arguments()
    (expected,) = torch.autograd.grad(fused_dqn_loss(**given), given["q"])
    counts = {"pack": 0, "unpack": 0}

    def counted(what: str) -> Callable[[Tensor], Tensor]:
        def hook(x: Tensor) -> Tensor:
            counts[what] += 1
            return x.clone()

        return hook

    with torch.autograd.graph.saved_tensors_hooks(counted("pack"), counted("unpack")):
        loss = fused_dqn_loss(**given)
    seen: list[Tensor] = []
    loss.grad_fn.register_hook(lambda grads, outputs: seen.append(grads[0]))
    loss.grad_fn.register_prehook(lambda outputs: (2 * outputs[0], *outputs[1:]))
    given["q"].register_hook(lambda grad: grad * 2)
    loss.backward()
    assert counts == {"pack": 2, "unpack": 2}
    assert torch.equal(seen[0], 2 * expected)
    assert torch.equal(given["q"].grad, 4 * expected)


def test_a_hook_that_raises_is_not_swallowed() -> None:
    def hook(x: Tensor) -> Tensor:
        raise LookupError("hook")

    with pytest.raises(LookupError, match="hook"), torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x):
        fused_dqn_loss(**arguments())


def test_anomaly_mode_names_the_forward() -> None:
    with torch.autograd.set_detect_anomaly(True):
        loss = fused_dqn_loss(**arguments(rewards=torch.full((7,), torch.nan)))
        raised = pytest.raises(RuntimeError, match=r"TDLossBackward.* returned nan values")
        with raised, pytest.warns(UserWarning, match=r"Error detected in TDLoss(.|\n)*test_node"):
            loss.backward()


@pytest.mark.parametrize("name", ["actions", "weights"])
def test_a_change_of_what_is_saved_is_noticed(name: str) -> None:
    given = arguments(weights=torch.rand(7))
    loss = fused_dqn_loss(**given)
    given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_of_q_or_the_td_errors_is_noticed() -> None:
    given = arguments(q=torch.randn(7, 5, requires_grad=True))
    q = given["q"] * 1
    loss, td_error = fused_dqn_loss(**given | {"q": q}, return_td_error=True)
    q.mul_(2)  # not needed
    loss.backward(retain_graph=True)
    td_error.abs_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    q = given["q"] * 1
    loss = fused_dqn_loss(**given | {"q": q}, cql_alpha=0.5)
    q.mul_(2)  # of which the conservative term takes the softmax
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_released_graph_says_so() -> None:
    loss = fused_dqn_loss(**arguments())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def in_graphs() -> int:
    """How many tensors there are that a graph has made."""
    gc.collect()
    return sum(type(x) is Tensor and x.grad_fn is not None for x in gc.get_objects())


def test_nothing_is_left_behind() -> None:
    """The node holds the TD errors, whose grad_fn it is: a cycle, were the result saved as another tensor is."""
    given = arguments(weights=torch.rand(7))
    before, others = (sys.getrefcount(given["weights"]), sys.getrefcount(given["q"])), in_graphs()
    for _ in range(20):
        fused_dqn_loss(**given, cql_alpha=0.5)
        fused_dqn_loss(**given).backward()
        grad = torch.autograd.grad(fused_dqn_loss(**given), given["q"], create_graph=True)[0]
        grad.sum().backward()
    del grad
    assert (sys.getrefcount(given["weights"]), sys.getrefcount(given["q"])) == before
    assert in_graphs() <= others  # fewer, if what an earlier test has left goes meanwhile


@pytest.mark.graph
def test_compiled_autograd() -> None:
    """A backward that torch.compile traces, of a graph that was recorded without it."""
    given = arguments(weights=torch.rand(7))
    (expected,) = torch.autograd.grad(fused_dqn_loss(**given, cql_alpha=0.5), given["q"])
    for _ in range(2):
        loss = fused_dqn_loss(**given, cql_alpha=0.5)
        assert recorded(loss)
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            loss.backward()
        assert torch.equal(given["q"].grad, expected)
        given["q"].grad = None


def in_threads(work: Callable[[int], None]) -> None:
    """Call work(0) to work(3), each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads() -> None:
    """Calls from several threads at once, whose backwards need Python and the node's lock."""
    given = [arguments(weights=torch.rand(7)) for _ in range(4)]
    expected = [torch.autograd.grad(fused_dqn_loss(**one), one["q"])[0] for one in given]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            q = given[i]["q"]
            (grad,) = torch.autograd.grad(fused_dqn_loss(**given[i]), q, create_graph=True)
            grad.sum().backward()
            (plain,) = torch.autograd.grad(fused_dqn_loss(**given[i]), q)
            if not torch.equal(plain, expected[i]):
                wrong.append(i)

    in_threads(work)
    assert wrong == []


def test_a_call_that_is_no_batch_is_an_error_and_no_crash() -> None:
    assert node.MODULE is not None
    batch = dqn_fused.arguments.Batch(None, 1, "x", None)  # type: ignore[arg-type]
    spec = dqn_fused.arguments.LossSpec()
    assert node.calls[True](spec, batch) is None
    assert node.calls[False](spec, batch) is None
    with pytest.raises(TypeError):
        node.MODULE.record(spec, batch, True)


def test_a_discount_too_large_for_a_float() -> None:
    with pytest.raises(OverflowError):
        fused_dqn_loss(**arguments(), gamma=10**400)


def test_a_build_for_another_torch_is_refused_in_words(tmp_path: Path) -> None:
    module, reason = node.load(tmp_path)
    assert module is None
    assert f"expected {node.file_name()}, got no build of it" in reason
    (tmp_path / "_C_autograd.cpython-311.torch-1.0.so").write_bytes(b"")
    assert "got _C_autograd.cpython-311.torch-1.0.so" in node.load(tmp_path)[1]
    (tmp_path / node.file_name()).write_bytes(b"no library")
    assert "cannot be loaded" in node.load(tmp_path)[1]


def test_the_report_names_it() -> None:
    assert "autograd   recorded in C++" in report(facts())
