"""The gradient as autograd sees it: first and second order, several backwards, what is saved and what is allocated."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from bounds import Arithmetic, Values, assert_agree, assert_close
from conftest import Setting
from oracle import oracle
from test_family import on, variant
from test_loss import compact, make
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_fused.arguments
import dqn_fused.reference
from dqn_fused import FusedDQNLoss, fused_dqn_loss, fused_dqn_loss_and_grad, node
from dqn_fused._backends import boxed
from dqn_fused.reference import dqn_loss


def loss_of_q(setting: Setting, arguments: dict[str, Any], reduction: str = "mean") -> Any:
    rest = {k: x for k, x in arguments.items() if k != "q"}
    return lambda q: fused_dqn_loss(q, **rest, reduction=reduction, backend=setting.backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 2, 3)], ids=["2d", "3d"])
def test_gradcheck(setting: Setting, shape: tuple[int, ...], form: Any, reduction: str) -> None:
    arguments = form(make(shape, torch.float64, setting.device))
    q = arguments["q"].requires_grad_()
    function = loss_of_q(setting, arguments, reduction)
    assert torch.autograd.gradcheck(function, q)
    assert torch.autograd.gradgradcheck(function, q)


def test_gradcheck_of_the_reference() -> None:
    arguments = make((5, 3), torch.float64)
    q = arguments.pop("q").requires_grad_()
    assert torch.autograd.gradcheck(lambda q: dqn_loss(q, **arguments), q)


def test_the_hessian_is_diagonal(setting: Setting) -> None:
    """A gradient penalty needs the second derivative, 2 / n at the actions taken; a constant backward has none."""
    arguments = make((4, 3), torch.float64, setting.device)
    q = arguments["q"].requires_grad_()
    (grad,) = torch.autograd.grad(loss_of_q(setting, arguments)(q), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), q)
    expected = torch.zeros_like(q).scatter_(1, arguments["actions"][:, None], 2 / 4)
    assert_agree(second, expected)


def test_two_backwards_with_different_upstream_gradients(setting: Setting) -> None:
    """A gradient computed in forward and scaled in place would be scaled twice."""
    arguments = make((7, 5), device=setting.device)
    q = arguments["q"].requires_grad_()
    loss = loss_of_q(setting, arguments, "none")(q)
    for _ in range(2):
        upstream = torch.randn(7, device=setting.device)
        (grad,) = torch.autograd.grad(loss, q, upstream, retain_graph=True)
        expected = oracle(**arguments, reduction="none", grad_loss=upstream).grad_q
        assert_close("grad_q", grad, expected)


def test_two_live_losses_do_not_share_anything(setting: Setting) -> None:
    """Outputs kept in buffers of a module have corrupted each other in an earlier library."""
    batches = [make((7, 5), device=setting.device, seed=seed) for seed in (1, 2)]
    losses = [loss_of_q(setting, a)(a["q"].requires_grad_()) for a in batches]
    for arguments, loss in zip(batches, losses, strict=True):
        loss.backward()
        expected = oracle(**arguments)
        assert_close("loss", loss, expected.loss)
        assert_close("grad_q", arguments["q"].grad, expected.grad_q)


def test_the_loss_need_not_be_the_last_node(setting: Setting) -> None:
    arguments = make((7, 5), device=setting.device)
    q = arguments["q"].requires_grad_()
    loss = loss_of_q(setting, arguments)(q)
    (3 * loss + q.square().sum()).backward()
    arithmetic, of_square = Arithmetic(torch.float32), 2 * q.detach().cpu().double().numpy()
    value, error = oracle(**arguments).grad_q
    expected = 3 * value + of_square
    error = 3 * error + arithmetic.unit * (np.abs(3 * value) + np.abs(expected))
    assert_close("grad", q.grad, Values(expected, error))


def test_an_expanded_upstream_gradient(setting: Setting) -> None:
    """loss.sum().backward() passes on a tensor of stride 0."""
    arguments = make((7, 5), device=setting.device)
    q = arguments["q"].requires_grad_()
    function = loss_of_q(setting, arguments, "none")
    (of_sum,) = torch.autograd.grad(function(q).sum(), q)
    (of_ones,) = torch.autograd.grad(function(q), q, torch.ones(7, device=setting.device))
    expected = oracle(**arguments, reduction="none").grad_q
    assert_close("gradient of the sum", of_sum, expected)
    assert_close("gradient for ones", of_ones, expected)


def test_the_td_error_carries_no_graph(setting: Setting) -> None:
    arguments = make((7, 5), device=setting.device)
    arguments["q"].requires_grad_()
    loss, td_error = fused_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)
    assert loss.requires_grad
    assert not td_error.requires_grad
    td_error.abs().cpu().numpy()


def test_no_graph_without_a_gradient_to_give(setting: Setting) -> None:
    arguments = make((7, 5), device=setting.device)
    assert not fused_dqn_loss(**arguments, backend=setting.backend).requires_grad
    for reduction in ("mean", "weighted_mean"):  # of "torch" the loss was differentiable by the weights
        weighted = arguments | {"weights": torch.rand_like(arguments["rewards"]).requires_grad_()}
        assert not fused_dqn_loss(**weighted, reduction=reduction, backend=setting.backend).requires_grad
    arguments["q"].requires_grad_()
    with torch.no_grad():
        assert not fused_dqn_loss(**arguments, backend=setting.backend).requires_grad


def test_actions_changed_in_place_before_backward_are_noticed(setting: Setting) -> None:
    """A replay buffer that reuses its batch would otherwise silently move the gradient to other actions."""
    arguments = make((7, 5), device=setting.device)
    q = arguments["q"].requires_grad_()
    loss = loss_of_q(setting, arguments)(q)
    arguments["actions"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)], ids=["2d", "3d"])
def test_the_loss_may_be_changed_in_place(setting: Setting, shape: tuple[int, ...]) -> None:
    """loss *= weights is how prioritised replay is written; a view made inside the Function would refuse it."""
    arguments = make(shape, device=setting.device)
    q = arguments["q"].requires_grad_()
    weights = torch.rand(shape[:-1], device=setting.device)
    loss = loss_of_q(setting, arguments, "none")(q)
    loss *= weights
    (grad,) = torch.autograd.grad(loss.sum(), q)
    assert_close("grad_q", grad, oracle(**arguments, reduction="none", grad_loss=weights).grad_q)


def test_batched_gradients(setting: Setting) -> None:
    """A Jacobian in one vectorised backward."""
    arguments = make((4, 3), torch.float64, setting.device)
    q = arguments["q"].requires_grad_()
    function = loss_of_q(setting, arguments, "none")
    together, apart = (torch.autograd.functional.jacobian(function, q, vectorize=v) for v in (True, False))
    assert_agree(together, apart)


def test_forward_mode_is_refused(setting: Setting) -> None:
    """A backend without a rule for it would give a tangent of zero."""
    arguments = make((4, 3), device=setting.device)
    q = arguments["q"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            loss_of_q(setting, arguments)(dual)
        with pytest.raises(NotImplementedError, match="jvp"):
            fused_dqn_loss_and_grad(**{**arguments, "q": dual}, backend=setting.backend)
        fused_dqn_loss_and_grad(**arguments, backend=setting.backend)


def test_module_equals_function(setting: Setting) -> None:
    arguments = make((7, 5), device=setting.device)
    gamma = torch.tensor(0.5)
    module = FusedDQNLoss(gamma, reduction="sum", return_td_error=True, backend=setting.backend).to(setting.device)
    assert module.gamma.device.type == setting.device
    assert "gamma" in module.state_dict()
    expected = fused_dqn_loss(
        **arguments, gamma=gamma.to(setting.device), reduction="sum", return_td_error=True, backend=setting.backend
    )
    for got, value in zip(module(**arguments), expected, strict=True):
        assert torch.equal(got, value), "the module calls the function"
    exact = oracle(**arguments, gamma=0.5, reduction="sum")
    assert_close("loss", module(**arguments, gamma=0.5)[0], exact.loss)
    assert_close("loss", module(**compact(arguments))[0], exact.loss)
    assert not torch.equal(module(**arguments, gamma=0.1)[0], expected[0])


def test_the_module_passes_its_backend_on() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        FusedDQNLoss(backend="gpu")(**make((7, 5)))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at values, as on a GPU, where looking would cost a synchronisation."""
    for module in (dqn_fused.arguments, dqn_fused.reference, boxed):
        monkeypatch.setattr(module, "looks_at_values", lambda device: False)
    monkeypatch.setattr(node, "serves", set())  # whose ops look, as those on the CPU always do


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("A", [1, 4, 2500])
def test_illegal_actions_where_nothing_looks(setting: Setting, A: int) -> None:
    """NaN in that row's td and in the loss, zero in its gradient row, nothing out of bounds and nothing elsewhere."""
    arguments = make((8, A), device=setting.device)
    for row, action in {1: -1, 3: A, 4: 2**40, 6: -(2**63)}.items():
        arguments["actions"][row] = action
    q = arguments["q"].requires_grad_()
    per_sample, td_error = fused_dqn_loss(**arguments, reduction="none", return_td_error=True, backend=setting.backend)
    (grad,) = torch.autograd.grad(per_sample, q, torch.ones_like(per_sample))
    expected = oracle(**arguments, reduction="none")
    assert_close("td_error", td_error, expected.td_error)
    assert_close("grad_q", grad, expected.grad_q)
    assert td_error.isnan().sum() == 4
    (grad,) = torch.autograd.grad(
        loss_of_q(setting, arguments, "none")(q), q, torch.ones_like(per_sample), create_graph=True
    )
    assert_close("grad_q", grad, expected.grad_q)
    assert fused_dqn_loss(**arguments, backend=setting.backend).isnan()


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", ["double-mask-weights-huber", "munchausen-cql-masks-weights-huber"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (6, 2500)], ids=str)
def test_illegal_actions_in_the_family(setting: Setting, shape: tuple[int, ...], name: str) -> None:
    """The conservative term gives every action a gradient, but none to a row whose own action is illegal."""
    arguments = variant(name, shape)
    for row, action in {1: -1, 3: shape[-1], 4: 2**40}.items():
        arguments["actions"].view(-1)[row] = action
    expected = oracle(**arguments, reduction="sum")
    arguments = on(setting, arguments)
    q = arguments["q"].requires_grad_()
    for create_graph in (False, True):
        loss, td_error = fused_dqn_loss(**arguments, reduction="sum", return_td_error=True, backend=setting.backend)
        (grad,) = torch.autograd.grad(loss, q, create_graph=create_graph)
        assert loss.isnan()
        assert td_error.flatten().isnan().tolist() == [False, True, False, True, True, False]
        assert_close("grad_q", grad, expected.grad_q)
    if "cql" in name:
        cql = fused_dqn_loss(**arguments, return_cql=True, backend=setting.backend)[1]
        assert cql.flatten().isnan().tolist() == [False, True, False, True, True, False]


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("A", [5, 300])
def test_a_wrong_mask_where_nothing_looks(setting: Setting, A: int, count: int) -> None:
    arguments = make((6, A), device=setting.device)
    arguments["terminated"] = None
    mask = torch.arange(6, device=setting.device) < count
    arguments |= {
        "non_final_mask": mask,
        "next_q": arguments["next_q"][:3],
        "actions": arguments["actions"].to(torch.uint8),
    }
    q = arguments["q"].requires_grad_()
    loss, td_error = fused_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)
    assert loss.isnan()
    assert td_error.isnan().all()
    for create_graph in (True, False):
        (grad,) = torch.autograd.grad(loss, q, create_graph=create_graph)
        assert (grad == 0).all()
    loss, grad = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
    assert loss.isnan()
    assert (grad == 0).all()


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(("n", "A"), [(6, 5), (6, 300), (200, 18), (301, 18), (4500, 3), (20_000, 1)], ids=str)
def test_a_right_mask_where_nothing_looks(setting: Setting, n: int, A: int) -> None:
    """Its true entries are counted in the launch, or in one before it: the same loss as with terminated."""
    arguments = make((n, A), device=setting.device)
    for reduction in ("none", "sum"):
        options = {"reduction": reduction, "return_td_error": True, "backend": setting.backend}
        expected = oracle(**arguments, reduction=reduction)
        for given in (arguments, compact(arguments)):
            loss, td_error = fused_dqn_loss(**given, **options)
            assert_close("loss", loss, expected.loss)
            assert_close("td_error", td_error, expected.td_error)


def test_everything_but_q_is_a_constant(setting: Setting) -> None:
    """Call sites forget no_grad: no gradient may reach what the other arguments were computed from."""
    for name in ("double-mask-weights-huber", "munchausen-cql-masks-weights-huber"):
        arguments = on(setting, variant(name, (7, 5)))
        floats = [k for k, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
        for k in floats:
            arguments[k].requires_grad_()
        loss = fused_dqn_loss(**arguments, backend=setting.backend)
        loss.backward()
        assert [k for k in floats if arguments[k].grad is not None] == ["q"]


def test_everything_but_q_is_a_constant_of_the_reference() -> None:
    """It is differentiated by autograd, where no_grad around the target does not cover the weights, nor a tangent."""
    arguments = variant("munchausen-cql-masks-weights-huber", (7, 5))
    floats = [k for k, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for k in floats:
        arguments[k].requires_grad_()
    dqn_loss(**arguments).backward()
    assert [k for k in floats if arguments[k].grad is not None] == ["q"]
    constants = {k: x.detach() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    for k in floats[1:]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(constants[k], torch.ones_like(constants[k]))
            assert forward_ad.unpack_dual(dqn_loss(**{**constants, k: dual})).tangent is None, k


def test_a_penalty_on_the_gradient_of_the_conservative_term(setting: Setting) -> None:
    """Second order with a dense Hessian: the softmax's own derivative, which a constant backward would lose."""
    arguments = on(setting, variant("cql-mask-weights", (4, 3), torch.float64))
    q = arguments.pop("q").requires_grad_()
    seconds = []
    for loss in (
        lambda q: fused_dqn_loss(q, **arguments, backend=setting.backend),
        lambda q: dqn_loss(q, **arguments),
    ):
        (grad,) = torch.autograd.grad(loss(q), q, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), q)
        seconds.append(second)
    assert_agree(*seconds)


@pytest.mark.parametrize("name", ["q", "weights"])
def test_what_backward_reads_must_not_change(setting: Setting, name: str) -> None:
    arguments = on(setting, variant("cql-mask-weights", (7, 5)))
    arguments["q"] = arguments["q"].requires_grad_().clone()
    loss = fused_dqn_loss(**arguments, backend=setting.backend)
    arguments[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Allocations(TorchDispatchMode):
    """Elements of every new tensor that an operation returns. Tensors are kept, so that no address serves twice."""

    def __init__(self, known: dict[str, Tensor]) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.seen = {x.untyped_storage().data_ptr(): x for x in known.values() if isinstance(x, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not x.is_sparse and x.untyped_storage().data_ptr() not in self.seen:
                self.seen[x.untyped_storage().data_ptr()] = x
                self.sizes.append(x.numel())
        return out


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """What a graph saves for its backward."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def mask_address(arguments: dict[str, Any]) -> int:
    mask = arguments.get("action_mask")
    return 0 if mask is None else mask.data_ptr()


@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
def test_memory(setting: Setting, form: Any) -> None:
    """Forward allocates O(n), backward one (n, A) matrix: its result. Nothing of that size is kept in between."""
    n, A = 16, 1000
    arguments = form(make((n, A), device=setting.device))
    q = arguments["q"].requires_grad_()
    with Allocations(arguments) as forward, saving() as saved:
        loss = loss_of_q(setting, arguments)(q)
    assert max(forward.sizes) <= 4 * n
    assert sum(x.numel() for x in saved) == 2 * n
    saved.clear()
    next_q = weakref.ref(arguments["next_q"])
    with Allocations(arguments) as backward:
        (grad,) = torch.autograd.grad(loss, q)
    assert sorted(backward.sizes)[-1] == grad.numel() == n * A
    assert sum(size >= A for size in backward.sizes) == 1
    del arguments, forward, backward
    gc.collect()
    assert next_q() is None, "the graph keeps next_q alive"
    assert loss.grad_fn is not None


@pytest.mark.parametrize("name", ["double-mask-weights-huber", "munchausen-masks-huber", "cql-mask-weights"])
def test_memory_of_the_family(setting: Setting, name: str) -> None:
    """Masks, exponentials and a dense gradient, and still no (n, A) matrix except the gradient."""
    if setting.backend == "torch":
        pytest.skip("its operations hold what eager code holds")
    n, A = 16, 1000
    arguments = on(setting, variant(name, (n, A)))
    q = arguments["q"].requires_grad_()
    with Allocations(arguments) as forward, saving() as saved:
        loss = fused_dqn_loss(**arguments, backend=setting.backend)
    assert max(forward.sizes) <= 4 * n
    assert sum(x.numel() for x in saved if x.numel() < n * A) <= 5 * n
    assert all(x.data_ptr() in (q.data_ptr(), mask_address(arguments)) for x in saved if x.numel() >= n * A)
    with Allocations(arguments) as backward:
        (grad,) = torch.autograd.grad(loss, q)
    assert sorted(backward.sizes)[-1] == grad.numel() == n * A
    assert sum(size >= A for size in backward.sizes) == 1
