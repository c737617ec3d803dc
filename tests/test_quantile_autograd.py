"""What autograd, torch.compile and torch.func see of the quantile loss."""

from typing import Any

import pytest
import torch
from bounds import assert_agree
from conftest import Setting
from quantile_data import check, compact, every_setting, make
from test_quantile_compiled import CASES, op_arguments
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dqn_fused import FusedQuantileLoss, fused_quantile_loss, fused_quantile_loss_and_grad
from dqn_fused._ops import REDUCTIONS
from dqn_fused.quantile_reference import quantile_loss


@every_setting
@pytest.mark.parametrize("kappa", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "none", "weighted_mean"])
def test_gradcheck(backend: Setting, kappa: float, reduction: str) -> None:
    arguments = make((3, 2, 4), 3, torch.float64, seed=40)
    x = arguments.pop("quantiles").requires_grad_()
    weights = torch.rand(3)

    def loss(x: Tensor) -> Any:
        return fused_quantile_loss(
            x, **arguments, weights=weights, kappa=kappa, reduction=reduction, backend=backend.backend
        )

    assert torch.autograd.gradcheck(loss, x)


def test_gradcheck_of_the_reference() -> None:
    arguments = make((3, 2, 4), 3, torch.float64, seed=41)
    x = arguments.pop("quantiles").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quantile_loss(x, **arguments), x)
    assert torch.autograd.gradgradcheck(lambda x: quantile_loss(x, **arguments), x)


@every_setting
@pytest.mark.parametrize("options", [{}, {"kappa": 0.0}, {"quantile_reduction": "mean", "reduction": "none"}])
def test_the_reference_agrees(backend: Setting, options: dict[str, Any]) -> None:
    arguments = make((2, 5, 3, 8), 6, torch.float64, seed=42)
    results = []
    for function in (fused_quantile_loss, quantile_loss):
        x = arguments["quantiles"].clone().requires_grad_()
        name = {"backend": backend.backend} if function is fused_quantile_loss else {}
        loss, td_error = function(**{**arguments, "quantiles": x}, **options, return_td_error=True, **name)
        loss.sum().backward()
        results.append((loss.detach(), td_error, x.grad))
    assert_agree(*results)


@every_setting
def test_everything_but_quantiles_is_a_constant(backend: Setting) -> None:
    arguments = make((4, 3, 5), seed=49)
    arguments |= {"weights": torch.rand(4), "taus": torch.rand(5), "gamma": torch.rand(4)}
    for name in ("rewards", "next_quantiles", "weights", "taus", "gamma"):
        arguments[name].requires_grad_()
    with pytest.warns(UserWarning, match="are they swapped"):
        assert not fused_quantile_loss(**arguments, backend=backend.backend).requires_grad
    assert not quantile_loss(**arguments).requires_grad
    x = arguments["quantiles"].requires_grad_()
    for loss in (fused_quantile_loss(**arguments, backend=backend.backend), quantile_loss(**arguments)):
        loss.backward()
    assert x.grad is not None
    assert all(arguments[name].grad is None for name in ("rewards", "next_quantiles", "weights", "taus", "gamma"))


@every_setting
def test_module_equals_function(backend: Setting) -> None:
    arguments = make((4, 3, 5), seed=52)
    options = {"kappa": 0.5, "quantile_reduction": "mean", "reduction": "sum", "return_td_error": True}
    module = FusedQuantileLoss(0.9, **options, backend=backend.backend)
    expected = fused_quantile_loss(**arguments, gamma=0.9, **options, backend=backend.backend)
    assert all(map(torch.equal, module(**arguments), expected))
    other = module(**arguments, gamma=0.5, taus=torch.rand(5), weights=torch.rand(4))
    assert not torch.equal(other[0], expected[0])
    moved = FusedQuantileLoss(torch.tensor(0.9)).double()
    assert moved.gamma.dtype is torch.float64
    assert "kappa=1.0" in repr(moved)


@every_setting
@pytest.mark.parametrize("name", ["plain", "everything", "mask", "loss_and_grad"])
@pytest.mark.graph
def test_torch_compile_of_network_and_loss(backend: Setting, name: str) -> None:
    """One graph without a break; a second one when the batch size has changed for the first time, and no third."""
    torch._dynamo.reset()
    counters.clear()
    A, K, D = 3, 5, 4
    model = nn.Linear(D, A * K, dtype=torch.float64)

    def loss(obs: Tensor, rest: dict[str, Tensor]) -> Tensor:
        x = model(obs).view(-1, A, K)
        if name == "loss_and_grad":
            value, gradient = fused_quantile_loss_and_grad(x, **rest, backend=backend.backend)
            return value + (x * gradient).sum() - (x * gradient).sum().detach()
        options = {"kappa": 0.5, "reduction": "weighted_mean"} if name == "everything" else {}
        result, _ = fused_quantile_loss(x, **rest, **options, return_td_error=True, backend=backend.backend)
        return result

    compiled = torch.compile(loss, fullgraph=True)
    for n in (6, 9, 11):
        arguments = make((n, A, K), 4, torch.float64, seed=n)
        if name == "everything":
            arguments |= {"weights": torch.rand(n), "taus": torch.rand(n, K), "gamma": torch.rand(n)}
            arguments["next_action_mask"] = torch.ones(n, A, dtype=torch.bool)
            arguments["next_quantiles_online"] = torch.randn(n, A)
        if name == "mask":
            arguments["terminated"] = torch.arange(n) % 4 == 0
            arguments = compact(arguments)
        arguments.pop("quantiles")
        obs = torch.randn(n, D, dtype=torch.float64)
        results = []
        for function in (compiled, loss):
            value = function(obs, arguments)
            results.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
        assert_agree(*results)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@every_setting
@pytest.mark.graph
def test_a_graph_computes_what_the_oracle_does(backend: Setting) -> None:
    torch._dynamo.reset()
    graph = torch.compile(lambda given: fused_quantile_loss(**given), fullgraph=True)
    check(backend, make((6, 3, 5), 4, seed=57), call=lambda **given: graph(given))


@every_setting
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("case", ["plain", "float64", "everything", "q-values, taus of all"])
def test_the_ops_that_a_graph_holds(backend: Setting, case: str, reduction: str) -> None:
    if backend.backend != "triton":
        pytest.skip("its graph holds the compiled ops, or PyTorch's operations")
    from dqn_fused import _distributional_ops as ops

    arguments = {k: x.to(backend.device) for k, x in CASES[case]().items()}
    arguments["next_action_mask"] = None  # a row without a legal action is NaN, which opcheck compares with NaN
    given = op_arguments(arguments, reduction)
    torch.library.opcheck(ops.triton_quantile_loss, given)
    torch.library.opcheck(ops.triton_quantile_loss_and_grad, given)
    loss, _, slopes = ops.triton_quantile_loss(*given)
    x = arguments["quantiles"]
    saved = (slopes, arguments["actions"], arguments.get("weights"), x.shape[1], x.dtype, REDUCTIONS[reduction])
    torch.library.opcheck(ops.triton_rows_backward, (torch.ones_like(loss), *saved))


@every_setting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_inside(backend: Setting, dtype: torch.dtype) -> None:
    arguments = make((4, 3, 5), dtype=dtype, seed=53)
    plain = fused_quantile_loss_and_grad(**arguments, backend=backend.backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_quantile_loss_and_grad(**arguments, backend=backend.backend)
    assert all(map(torch.equal, plain, inside))


@every_setting
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_tensors_without_values(backend: Setting, mode: str) -> None:
    if mode == "meta" and backend.backend != "torch":
        pytest.skip("a device of its own, which torch serves")
    arguments = make((4, 3, 5), seed=54)
    if mode == "meta":
        arguments = {k: x.to("meta") for k, x in arguments.items()}
        x = arguments["quantiles"].requires_grad_()
        loss = fused_quantile_loss(**arguments)
        loss.backward()
    else:
        with torch._subclasses.FakeTensorMode() as fake:
            arguments = {k: fake.from_tensor(x) for k, x in arguments.items()}
            x = arguments["quantiles"].requires_grad_()
            loss = fused_quantile_loss(**arguments, backend=backend.backend)
            loss.backward()
    assert loss.shape == ()
    assert x.grad.shape == x.shape


def nothing_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("arguments", "reference", "_backends.boxed"):
        monkeypatch.setattr(f"dqn_fused.{module}.looks_at_values", lambda device: False)


@every_setting
def test_illegal_actions_where_nothing_looks(backend: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the loss is NaN and the gradient's row zero."""
    nothing_looks(monkeypatch)
    arguments = make((4, 3, 5), seed=55)
    arguments["actions"] = torch.tensor([0, 3, -1, 2])
    x = arguments["quantiles"].requires_grad_()
    loss, td_error = fused_quantile_loss(**arguments, reduction="none", return_td_error=True, backend=backend.backend)
    assert loss.isnan().tolist() == td_error.isnan().tolist() == [False, True, True, False]
    loss.sum().backward()
    assert (x.grad != 0).any(2).any(1).tolist() == [True, False, False, True]
    assert not x.grad.isnan().any()


@every_setting
@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_mask_where_nothing_looks(backend: Setting, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    nothing_looks(monkeypatch)
    arguments = make((4, 3, 5), seed=56)
    del arguments["terminated"]
    arguments |= {"non_final_mask": torch.arange(4) < 3, "next_quantiles": torch.randn(count, 3, 5)}
    x = arguments["quantiles"].requires_grad_()
    loss = fused_quantile_loss(**arguments, backend=backend.backend)
    loss.backward()
    assert loss.isnan()
    assert not x.grad.any()
