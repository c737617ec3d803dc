"""The linear head where all actions of the state count: the backward that multiplies again, and a ready target."""

from typing import Any

import pytest
import torch
from bounds import Arithmetic, assert_agree, roundings
from conftest import Setting
from data import source
from test_autograd import Allocations
from test_linear import Arguments, Operations, check, legal, legal_here, make, matrices, small_tiles  # noqa: F401
from test_loss import to_device
from torch import Tensor, nn

import dqn_fused.arguments
import dqn_fused.reference
from dqn_fused import FusedLinearDQNLoss, fused_linear_dqn_loss, fused_linear_td_loss
from dqn_fused.head import sweep
from dqn_fused.reference import dqn_loss

LEARNED = ("hidden", "weight", "bias")
FAMILY: dict[str, Any] = {
    "munchausen": lambda a: {"target": "munchausen", "target_hidden": a["hidden"].detach().flip(-1)},
    "cql": lambda a: {"cql_alpha": 0.7},
    "cql-mask": lambda a: {"cql_alpha": 0.7, "action_mask": legal_here(a)},
}


def family(
    name: str, shape: tuple[int, ...], setting: Setting, A: int = 41, dtype: torch.dtype = torch.float32
) -> Arguments:
    arguments = make(shape, A, dtype)
    return {k: to_device(x, setting.device) for k, x in (arguments | FAMILY[name](arguments)).items()}


def learned(arguments: Arguments) -> list[Tensor]:
    return [arguments[k].requires_grad_() for k in LEARNED]


@pytest.mark.product
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", FAMILY)
def test_gradcheck(setting: Setting, name: str, reduction: str) -> None:
    arguments = family(name, (4, 3), setting, 17, torch.float64)
    given = [arguments.pop(k).requires_grad_() for k in LEARNED]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_dqn_loss(  # type: ignore[return-value]
            hidden, weight, bias=bias, **arguments, reduction=reduction, backend=setting.backend
        )

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_create_graph_gives_the_same_bits(setting: Setting) -> None:
    """It may be asked for by a library that never differentiates again. Both run the same backward."""
    arguments = family("cql", (4, 3), setting)
    given = learned(arguments)
    loss = fused_linear_dqn_loss(**arguments, backend=setting.backend)
    first = torch.autograd.grad(loss, given, create_graph=True)
    plain = torch.autograd.grad(fused_linear_dqn_loss(**arguments, backend=setting.backend), given)
    assert all(torch.equal(x, y) for x, y in zip(first, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("learns", [LEARNED, ("hidden",), ("weight",), ("bias",)], ids="-".join)
def test_the_second_order_is_that_of_the_matrix(setting: Setting, learns: tuple[str, ...], dtype: torch.dtype) -> None:
    """A penalty of some of the gradients; in half precision the policy is that of rounded Q-values.

    There dozens of roundings to it add up, so that the error of all numbers together is measured by the matrix's own.
    """
    arguments = family("cql-mask", (7, 3), setting, dtype=dtype)

    def second_order(loss_of: Any, arguments: Arguments) -> tuple[Tensor, ...]:
        given = [arguments[k].detach().requires_grad_(k in learns) for k in LEARNED]
        inputs = [x for x in given if x.requires_grad]
        loss = loss_of(**{**arguments, **dict(zip(LEARNED, given, strict=True))})
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(x.to(loss.dtype).square().sum() for x in first)
        return torch.autograd.grad(penalty, inputs)

    both = [second_order(f, arguments) for f in (fused_linear_dqn_loss, lambda **a: dqn_loss(**matrices(a)))]
    if dtype is torch.float64:
        assert_agree(*both)
        return
    wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}
    joined = [torch.cat([x.double().flatten() for x in f]) for f in (*both, second_order(fused_linear_dqn_loss, wide))]
    ours, theirs = ((x - joined[2]).norm() for x in joined[:2])
    assert ours <= 2 * theirs + 16 * torch.finfo(dtype).eps * joined[2].norm()


def test_a_backward_under_autocast_has_the_same_bits(setting: Setting) -> None:
    """Products of float32 were cast to bfloat16 there."""
    arguments = family("cql", (7, 3), setting)
    given = learned(arguments)

    def gradients() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss, given, create_graph=True)
        return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), given, retain_graph=True)

    loss = fused_linear_dqn_loss(**arguments, backend=setting.backend)
    expected = gradients()
    with torch.autocast(setting.device, torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(gradients(), expected, strict=True))


def test_a_third_order_raises(setting: Setting) -> None:
    arguments = family("cql", (4, 3), setting)
    hidden = arguments["hidden"].requires_grad_()
    loss = fused_linear_dqn_loss(**arguments, backend=setting.backend)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative of the conservative term"):
        torch.autograd.grad(second.sum(), hidden)


def test_two_backwards_with_different_upstream_gradients(setting: Setting) -> None:
    arguments = family("cql-mask", (2, 5, 3), setting, dtype=torch.float64)
    given = learned(arguments)
    each = fused_linear_dqn_loss(**arguments, reduction="none", backend=setting.backend)
    ones, twos = torch.ones_like(each), torch.full_like(each, 2.0)
    first = torch.autograd.grad(each, given, ones, retain_graph=True)
    second = torch.autograd.grad(each, given, twos, retain_graph=True)
    again = torch.autograd.grad(each, given, ones)
    for x, y, z in zip(first, second, again, strict=True):
        assert torch.equal(2 * x, y), "a power of two scales every rounding"
        assert torch.equal(x, z)
    total = fused_linear_dqn_loss(**arguments, reduction="sum", backend=setting.backend)
    assert_agree(torch.autograd.grad(total, given), first)


@pytest.mark.parametrize("names", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"]], ids="-".join)
def test_only_what_asks_for_a_gradient_gets_one(setting: Setting, names: list[str]) -> None:
    arguments = family("cql", (7, 3), setting, dtype=torch.float64)
    given = learned(arguments)
    every = dict(zip(LEARNED, torch.autograd.grad(fused_linear_dqn_loss(**arguments), given), strict=True))
    some = {k: x.detach().requires_grad_(k in names) if k in LEARNED else x for k, x in arguments.items()}
    fused_linear_dqn_loss(**some, backend=setting.backend).backward()
    for k in LEARNED:
        assert (some[k].grad is not None) == (k in names)
        if k in names:
            assert_agree(some[k].grad, every[k])
    assert not fused_linear_dqn_loss(**{k: x.detach() if k in LEARNED else x for k, x in some.items()}).requires_grad


def test_every_action_has_a_share(setting: Setting) -> None:
    """But for those that are illegal for all samples."""
    arguments = make((33, 8))
    mask = torch.ones(33, 41, dtype=torch.bool)
    mask[:, 5] = False
    assert not (arguments["actions"] == 5).any()
    weight = check(setting, {**arguments, "cql_alpha": 0.5, "action_mask": mask})["weight"]
    assert ((weight != 0).any(1).cpu() == mask[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_sum_in_an_order_that_is_not_fixed(setting: Setting, dtype: torch.dtype) -> None:
    arguments = family("cql", (9, 4), setting, dtype=dtype)
    given = learned(arguments)
    with Operations() as operations:
        torch.autograd.grad(fused_linear_dqn_loss(**arguments, backend=setting.backend), given)
    names = {
        name for name in operations.names if name.startswith(("index_add", "index_reduce", "scatter_", "index_put"))
    }
    assert names <= {"scatter_"}  # one action a row


def test_the_same_bits_every_time(setting: Setting) -> None:
    arguments = make((33, 8)) | {"cql_alpha": 0.7}
    first = check(setting, arguments)
    for _ in range(2):
        again = check(setting, arguments)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_strided_inputs(setting: Setting) -> None:
    arguments = make((7, 6)) | {"cql_alpha": 0.7, "action_mask": legal((7, 6), 41)}
    arguments["target"], arguments["target_hidden"] = "munchausen", arguments["next_hidden"] * 2
    for k in ("hidden", "target_hidden", "weight", "action_mask"):
        x = arguments[k]
        check(setting, {**arguments, k: x.t().contiguous().t()})
        check(setting, {**arguments, k: torch.cat([x, x], 1)[:, : x.shape[1]]})


@pytest.mark.parametrize("name", FAMILY)
def test_nan(setting: Setting, name: str) -> None:
    """NaN in the state is NaN in the loss of a terminated row, too: of the row, and of no other."""
    arguments = family(name, (6, 4), setting)
    arguments["terminated"] = torch.ones(6, dtype=torch.bool, device=setting.device)
    for k in ("hidden", "target_hidden"):
        if k in arguments:
            changed = {**arguments, k: arguments[k].clone()}
            changed[k][2] = torch.nan
            given = learned(changed) if k != "hidden" else [changed["hidden"].requires_grad_()]
            each = fused_linear_dqn_loss(**changed, reduction="none", backend=setting.backend)
            assert each.isnan().nonzero().flatten().tolist() == [2]
            grad = torch.autograd.grad(each, given, torch.ones_like(each))[0]
            assert grad.isnan().any(1).nonzero().flatten().tolist() == [2]


def test_illegal_values_are_not_read(setting: Setting) -> None:
    """Whatever stands in the rows of the weight that are illegal for all."""
    arguments = make((6, 4)) | {"cql_alpha": 0.7}
    mask = torch.ones(6, 41, dtype=torch.bool)
    mask[:, [6, 17]] = False
    arguments |= {"action_mask": mask, "next_action_mask": mask}
    arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
    expected = fused_linear_dqn_loss(**arguments, backend=setting.backend)
    arguments["bias"] = arguments["bias"].clone()
    arguments["bias"][[6, 17]] = torch.tensor([torch.nan, torch.inf], device=setting.device)
    given = learned(arguments)
    loss = fused_linear_dqn_loss(**arguments, backend=setting.backend)
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, given)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][[6, 17]].any()


def test_rows_without_a_legal_action(setting: Setting) -> None:
    """The loss of that row is NaN, as that of the matrices, and the conservative term has no gradient there.

    The largest Q-value was NaN there for the backward, too, and with it the gradient of all of the weight.
    """
    for name in ("munchausen", "cql"):
        arguments = family(name, (4, 3), setting)
        arguments["action_mask"] = torch.ones(4, 41, dtype=torch.bool, device=setting.device)
        arguments["action_mask"][1] = False
        given = learned(arguments)
        each, cql = fused_linear_dqn_loss(**arguments, reduction="none", return_cql=True, backend=setting.backend)
        assert each.isnan().tolist() == cql.isnan().tolist() == [False, True, False, False]
        grads = torch.autograd.grad(each, given, torch.ones_like(each))
        assert grads[0][[0, 2, 3]].isfinite().all()
        assert name != "cql" or all(x.isfinite().all() for x in grads)  # the TD error is a number there


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_the_term_of_one_action_is_zero(setting: Setting, dtype: torch.dtype) -> None:
    """It was a rounding of the Q-value to half precision: the largest was rounded, and the value taken was not.

    Of more actions it is not negative. What may be left is that of the same dot product twice, in float32.
    """
    for A in (1, 41):
        arguments = family("cql", (33, 24), setting, A, dtype)
        given = learned(arguments)
        loss, cql = fused_linear_dqn_loss(**arguments, return_cql=True, backend=setting.backend)
        hidden, weight, bias, term = (x.detach().cpu().double() for x in (*given, cql))
        taken = arguments["actions"].cpu()
        size = (hidden.abs() * weight[taken].abs()).sum(1) + bias[taken].abs()
        bound = 2 * (roundings(24) + 1) * Arithmetic(torch.float32).unit * size
        assert (term >= -bound).all()
        if A == 1:
            assert (term <= bound).all()
            assert dtype is torch.float32 or setting.backend == "triton" or not term.any()
        assert not any(x.isnan().any() for x in torch.autograd.grad(loss, given))


def test_large_q_values(setting: Setting) -> None:
    """No exponential overflows, and the term keeps its digits where Q-values are far from zero."""
    arguments = make((7, 4))
    for scale in (1e3, 1e6):
        check(setting, {**arguments, "hidden": arguments["hidden"] * scale, "cql_alpha": 0.7})
    check(setting, {**arguments, "bias": arguments["bias"] + 1e4, "cql_alpha": 0.7})


def test_illegal_actions_where_nothing_looks(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dqn_fused.arguments, dqn_fused.reference):
        monkeypatch.setattr(module, "looks_at_values", lambda device: False)
    for name in FAMILY:
        arguments = make((6, 4))
        arguments |= FAMILY[name](arguments)
        arguments["actions"][[1, 4]] = torch.tensor([41, -1])
        arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
        given = learned(arguments)
        loss, td, cql = fused_linear_dqn_loss(
            **arguments, reduction="sum", return_td_error=True, return_cql=True, backend=setting.backend
        )
        assert loss.isnan()
        assert td.isnan().tolist() == cql.isnan().tolist() == [False, True, False, False, True, False]
        grads = torch.autograd.grad(loss, given)
        assert all(x.isfinite().all() for x in grads)
        assert (grads[0][[1, 4]] == 0).all()


@pytest.mark.parametrize("name", FAMILY)
def test_memory(setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix of n * A, forward or backward; but for the gradients of weight and bias nothing grows with A."""
    monkeypatch.setattr(sweep, "TILE", {"cpu": 4096})
    monkeypatch.setattr(sweep, "MIN_COLUMNS", 64)
    monkeypatch.setattr(sweep, "TILE_ROWS", 64)
    n, D = 64, 8
    largest = []
    for A in (1000, 4000):
        arguments = family(name, (n, D), setting, A)
        given = learned(arguments)
        with Allocations(arguments) as allocations:
            loss = fused_linear_dqn_loss(**arguments, backend=setting.backend)
            torch.autograd.grad(loss, given)
        assert sum(size == A * D for size in allocations.sizes) <= 1
        largest.append(max(size for size in allocations.sizes if size not in (A * D, A)))
    assert largest[0] == largest[1] <= 4096


@pytest.mark.parametrize("cql_alpha", [0.0, 0.7])
def test_a_ready_target(setting: Setting, cql_alpha: float) -> None:
    """It is what rewards are of which every one is the last."""
    a = {k: to_device(x, setting.device) for k, x in make((2, 3, 5), dtype=torch.float64).items()}
    a["terminated"] = torch.ones(2, 3, dtype=torch.bool, device=setting.device)
    given, options = learned(a), {"cql_alpha": cql_alpha, "loss": "huber", "backend": setting.backend}
    weights = torch.rand(2, 3, generator=source(5)).to(setting.device)
    asked = {"return_td_error": True, "return_cql": True, "reduction": "weighted_mean", "weights": weights}
    ours = fused_linear_td_loss(
        a["hidden"], a["weight"], a["actions"], a["rewards"], bias=a["bias"], **options, **asked
    )
    theirs = fused_linear_dqn_loss(**a, **options, **asked)
    assert_agree(ours, theirs)
    assert_agree(*(torch.autograd.grad(x[0], given) for x in (ours, theirs)))
    sparse = {**options, "cql_alpha": 0.0, "sparse_grad": True}
    loss = fused_linear_td_loss(*given[:2], a["actions"], a["rewards"], bias=given[2], **sparse)
    assert torch.autograd.grad(loss, given[1])[0].is_sparse


def test_errors_of_a_ready_target() -> None:
    a = make((6, 4))
    given = (a["hidden"], a["weight"], a["actions"])
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\) or \(6, 1\), got \(1, 6\)"):
        fused_linear_td_loss(*given, a["rewards"][None])
    with pytest.raises(ValueError, match="sparse_grad: expected False with cql_alpha"):
        fused_linear_td_loss(*given, a["rewards"], cql_alpha=0.1, sparse_grad=True)
    with pytest.raises(RuntimeError, match=r"fused_linear_td_loss: .* call fused_td_loss with"):
        torch.func.grad(lambda h: fused_linear_td_loss(h, *given[1:], a["rewards"]))(given[0])


def test_module(setting: Setting) -> None:
    layer, next_layer = nn.Linear(6, 41).to(setting.device), nn.Linear(6, 41).to(setting.device)
    a = {k: to_device(x, setting.device) for k, x in make((7, 6)).items()}
    options = {"target": "munchausen", "cql_alpha": 0.7, "return_cql": True, "backend": setting.backend}
    state = {"target_hidden": a["next_hidden"] * 2, "action_mask": legal((7, 6), 41).to(setting.device)}
    given = (a["hidden"], a["actions"], a["rewards"])
    ours = FusedLinearDQNLoss(gamma=0.9, **options)(layer, *given, next_layer, a["next_hidden"], **state)
    theirs = fused_linear_dqn_loss(
        a["hidden"], layer.weight, *given[1:], a["next_hidden"], next_layer.weight, gamma=0.9,
        bias=layer.bias, next_bias=next_layer.bias, **options, **state,
    )  # fmt: skip
    assert len(ours) == len(theirs) == 2
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)), "the module calls the function"
