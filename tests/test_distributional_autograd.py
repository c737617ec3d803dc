"""What autograd and torch.func see of the distributional losses, all of which are recorded by row_loss.RowLoss."""

import warnings
from typing import Any

import pytest
import torch
from bounds import assert_agree
from conftest import Setting
from distributional_data import Loss, every_loss, every_setting
from torch import Tensor


@every_setting
@every_loss
def test_two_backwards_with_different_upstream_gradients(backend: Setting, family: Loss) -> None:
    arguments = family.arguments((6, 3, 4), seed=43, dtype=torch.float64, reduction="none")
    x = arguments[family.input]
    loss = family.function(**arguments, backend=backend.backend)
    upstream = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, 4.0])  # powers of two, by which scaling rounds nothing
    (ones,) = torch.autograd.grad(loss, x, torch.ones(6), retain_graph=True)
    (other,) = torch.autograd.grad(loss, x, upstream)
    assert torch.equal(other, ones * upstream[:, None, None])
    _, gradient = family.and_grad(**arguments, backend=backend.backend)
    assert_agree(gradient, ones)


@every_setting
@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upstream_gradient_of_any_stride(backend: Setting, family: Loss, reduction: str) -> None:
    arguments = family.arguments((2, 3, 3, 4), seed=44, reduction=reduction)
    x = arguments[family.input]
    loss = family.function(**arguments, backend=backend.backend)
    (expanded,) = torch.autograd.grad(loss.sum() * 2, x, retain_graph=True)
    (transposed,) = torch.autograd.grad(loss.t() if reduction == "none" else loss, x, torch.full_like(loss.t(), 2.0))
    assert torch.equal(expanded, transposed)


@every_setting
@every_loss
def test_the_derivative_by_the_upstream_gradient(backend: Setting, family: Loss) -> None:
    """The gradient is linear in it, and so in learned weights of the losses; only the curvature is refused."""
    arguments = family.arguments((4, 3, 5), seed=45, dtype=torch.float64, reduction="none")
    x = arguments[family.input]
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64, requires_grad=True)
    loss = family.function(**arguments, backend=backend.backend)
    (gradient,) = torch.autograd.grad((loss * scale).sum(), x, create_graph=True)
    direction = torch.randn_like(gradient)
    (by_scale,) = torch.autograd.grad((gradient * direction).sum(), scale, retain_graph=True)
    _, ones = family.and_grad(**arguments, backend=backend.backend)
    assert_agree(by_scale, (ones * direction).sum((1, 2)), float((ones * direction).abs().sum((1, 2)).max()))


@every_setting
@every_loss
def test_columns_in_a_backward_that_is_recorded(backend: Setting, family: Loss) -> None:
    """An op that checks its arguments saves them as they are: weights of (n, 1) would broadcast against (n,)."""
    arguments = family.arguments((4, 3, 5), seed=45, dtype=torch.float64, weights=torch.rand(4))
    gradients = []
    for create_graph in (False, True):
        for form in (lambda x: x, lambda x: x.unsqueeze(1)):
            given = {**arguments, "actions": form(arguments["actions"]), "weights": form(arguments["weights"])}
            loss = family.function(**given, backend=backend.backend)
            gradients += torch.autograd.grad(loss, arguments[family.input], create_graph=create_graph)
    for gradient in gradients:
        assert_agree(gradient, gradients[0])


@every_setting
@every_loss
def test_a_second_derivative_is_refused(backend: Setting, family: Loss) -> None:
    arguments = family.arguments((4, 3, 5), seed=46)
    loss = family.function(**arguments, backend=backend.backend)
    (gradient,) = torch.autograd.grad(loss, arguments[family.input], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative of a distributional loss .*quantile_reference"):
        gradient.square().sum().backward()


@every_setting
@every_loss
def test_forward_mode_is_refused(backend: Setting, family: Loss) -> None:
    arguments = family.make((4, 3, 5), seed=47)
    x = arguments.pop(family.input)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for function in (family.function, family.and_grad):
            with pytest.raises((NotImplementedError, RuntimeError), match=r"(jvp|forward mode)"):
                function(dual, **arguments, backend=backend.backend)


@every_setting
@every_loss
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_refused_with_a_way_out(backend: Setting, family: Loss, transform: str) -> None:
    arguments = family.make((4, 3, 5), seed=48)
    x = arguments.pop(family.input)

    def run(x: Tensor) -> Any:
        return family.function(x, **arguments, backend=backend.backend)

    name = "fused_quantile_loss" if family.input == "quantiles" else "the categorical losses"
    with pytest.raises(
        RuntimeError, match=rf"{name}: not inside torch\.func's transforms; there, give an .* leading dim"
    ):
        torch.func.grad(run)(x) if transform == "grad" else torch.func.vmap(run)(torch.stack([x, x]))


@every_setting
@every_loss
def test_what_backward_reads_must_not_change(backend: Setting, family: Loss) -> None:
    arguments = family.arguments((4, 3, 5), seed=50)
    loss = family.function(**arguments, backend=backend.backend)
    arguments["actions"] += 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    arguments = family.arguments((4, 3, 5), seed=50)
    loss, td_error = family.function(**arguments, return_td_error=True, backend=backend.backend)
    td_error.abs_()  # the user's
    for name in {family.reward(), f"next_{family.input}"} & arguments.keys():
        arguments[name].zero_()  # not saved
    loss.backward()
    assert arguments[family.input].grad.isfinite().all()


@every_setting
@every_loss
def test_no_graph_without_a_gradient_to_give(backend: Setting, family: Loss) -> None:
    arguments = family.make((4, 3, 5), seed=51)
    assert family.function(**arguments, backend=backend.backend).grad_fn is None
    arguments[family.input].requires_grad_()
    with torch.no_grad():
        assert family.function(**arguments, backend=backend.backend).grad_fn is None
    assert all(not x.requires_grad for x in family.and_grad(**arguments, backend=backend.backend))


@every_setting
@every_loss
def test_the_input_and_the_next_one_exchanged(backend: Setting, family: Loss) -> None:
    """A warning that names the arguments, at the line that calls; as of the scalar losses, in test_hints.py."""
    arguments = family.make((4, 3, 5), seed=52)
    following = f"next_{family.input}"
    if following not in arguments:
        pytest.skip("a ready target is not exchanged with anything")
    arguments[following].requires_grad_()
    said = f"^{family.input} does not require a gradient and {following} does: are they swapped"
    for function in (family.function, family.and_grad):
        with pytest.warns(UserWarning, match=said) as caught:
            function(**arguments, backend=backend.backend)
        assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with torch.no_grad():
            family.function(**arguments, backend=backend.backend)
        family.function(**arguments | {following: arguments[following].detach()}, backend=backend.backend)
        arguments[family.input].requires_grad_()
        for function in (family.function, family.and_grad):
            function(**arguments, backend=backend.backend)


@every_setting
@every_loss
@pytest.mark.parametrize("n", [1, 4])
def test_a_lazy_minus_sign_is_seen(backend: Setting, family: Loss, n: int) -> None:
    """conj().imag negates when it is read. That of one sample is contiguous, and so is a discount of all samples."""
    arguments = family.make((n, 3, 5), seed=53) | {"weights": torch.rand(n)}
    if family.reward() == "rewards":
        arguments["gamma"] = torch.tensor(0.5)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
            assert lazy.is_neg()
            found, expected = (
                family.and_grad(**arguments | {name: given}, return_td_error=True, backend=backend.backend)
                for given in (lazy, x)
            )
            assert all(map(torch.equal, found, expected)), name
