"""An op that checks its arguments itself: it is called once, and an error that is not about them is raised as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loss import make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_fused
from dqn_fused import fused_categorical_loss, fused_dqn_loss, fused_quantile_loss

pytestmark = pytest.mark.skipif(not dqn_fused.backends()["compiled"].available, reason="the compiled ops are not built")
WITH_AND_WITHOUT_NODE = pytest.mark.parametrize(
    "compiled",
    [pytest.param("compiled", id="node"), pytest.param("compiled", id="python", marks=pytest.mark.without_node)],
)


def arguments(**more: Any) -> dict[str, Any]:
    found = make((7, 5)) | more
    found["q"].requires_grad_()
    return found


def distributions(**more: Any) -> dict[str, Any]:
    found = make((7, 5)) | more
    return {k: x for k, x in found.items() if k not in ("q", "next_q")}


CALLS: dict[str, Callable[..., Any]] = {
    "scalar": lambda **more: fused_dqn_loss(**arguments(), **more),
    "quantile": lambda **more: fused_quantile_loss(
        torch.zeros(7, 5, 3, requires_grad=True), next_quantiles=torch.zeros(7, 5, 3), **distributions(), **more
    ),
    "categorical": lambda **more: fused_categorical_loss(
        torch.zeros(7, 5, 3, requires_grad=True), next_logits=torch.zeros(7, 5, 3), support=(-1.0, 1.0),
        **distributions(), **more,
    ),
}  # fmt: skip


class FullOnce(TorchDispatchMode):
    """Memory that is full for the first call of an op of this package, and not for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dqn_fused":
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("out of memory")
        return func(*args, **kwargs or {})


@WITH_AND_WITHOUT_NODE
@pytest.mark.parametrize("family", CALLS)
def test_an_error_that_is_not_about_the_arguments_is_raised(family: str, compiled: str) -> None:
    """It was taken for a refusal: the op ran again, and where it then succeeded nobody heard of it."""
    with FullOnce() as mode, pytest.raises(RuntimeError, match=r"^out of memory$") as error:
        CALLS[family](backend=compiled)
    assert mode.calls == 1
    assert error.value.__context__ is None


@WITH_AND_WITHOUT_NODE
@pytest.mark.parametrize("family", CALLS)
def test_a_hook_that_raises_runs_once(family: str, compiled: str) -> None:
    """A RuntimeError of a hook of saved tensors was swallowed without the node, and the hook ran again."""
    calls = []

    def hook(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 1:
            raise RuntimeError("hook")
        return x

    with torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x), pytest.raises(RuntimeError, match=r"^hook$"):
        CALLS[family](backend=compiled)
    assert len(calls) == 1


@WITH_AND_WITHOUT_NODE
@pytest.mark.parametrize("name", ["rewards", "weights", "next_q", "terminated"])
def test_a_fake_tensor_outside_of_its_mode_is_checked(name: str, compiled: str) -> None:
    """The fake of an op infers a shape and checks nothing."""
    mode, given = FakeTensorMode(), arguments(weights=torch.rand(7))
    given = {k: mode.from_tensor(x.detach()) for k, x in given.items()}
    assert fused_dqn_loss(**given, backend=compiled).shape == ()
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        fused_dqn_loss(**given | {name: mode.from_tensor(torch.zeros(3))}, backend=compiled)


@WITH_AND_WITHOUT_NODE
def test_a_wrong_argument_is_the_only_error(compiled: str) -> None:
    """Not one that came during the handling of another."""
    with pytest.raises(ValueError, match=r"^rewards: expected shape") as error:
        fused_dqn_loss(**arguments(rewards=torch.zeros(3)), backend=compiled)
    assert error.value.__context__ is None or error.value.__suppress_context__
