"""The loss family: each option on every setting against the oracle, alone and together, and the identities."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_agree, assert_close
from conftest import INTERPRETED, Setting
from data import source
from oracle import oracle
from test_loss import DTYPES, LAYOUTS, check, compact, dtype_id, make, same_oracle, shape_id, to_device
from torch import Tensor

from dqn_fused import Munchausen, Soft, fused_dqn_loss, fused_dqn_loss_and_grad, fused_td_loss

SHAPES = [(7, 3), (33, 19), (2, 3, 5), (5, 65), (3, 257), (2, 3, 70), (2, 5003), (0, 4), (4, 1)]
Arguments = dict[str, Any]


def double(a: Arguments, g: torch.Generator) -> Arguments:
    return {"next_q_online": torch.randn(a["next_q"].shape, generator=g).to(a["q"].dtype)}


def some(shape: torch.Size, g: torch.Generator) -> Tensor:
    """A mask with at least one legal action in each row."""
    mask = torch.rand(shape, generator=g) < 0.6
    return mask.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=g), True)


def next_mask(a: Arguments, g: torch.Generator) -> Arguments:
    return {"next_action_mask": some(a["next_q"].shape, g)}


def mask(a: Arguments, g: torch.Generator) -> Arguments:
    return {"action_mask": some(a["q"].shape, g)}


def weights(a: Arguments, g: torch.Generator) -> Arguments:
    return {"weights": torch.rand(a["actions"].shape, generator=g) + 0.1}


def huber(a: Arguments, g: torch.Generator) -> Arguments:
    return {"loss": "huber", "delta": 0.7}


def smooth_l1(a: Arguments, g: torch.Generator) -> Arguments:
    return {"loss": "smooth_l1", "delta": 0.7}


def l1(a: Arguments, g: torch.Generator) -> Arguments:
    return {"loss": "smooth_l1", "delta": 0.0}


def soft(a: Arguments, g: torch.Generator) -> Arguments:
    return {"target": Soft(0.3)}


def munchausen(a: Arguments, g: torch.Generator) -> Arguments:
    return {
        "target": Munchausen(0.3, alpha=0.8, clip=-0.9),
        "target_q": torch.randn(a["q"].shape, generator=g).to(a["q"].dtype),
    }


def cql(a: Arguments, g: torch.Generator) -> Arguments:
    return {"cql_alpha": 0.7}


def transform(a: Arguments, g: torch.Generator) -> Arguments:
    """Rewards of the size that they have unclipped."""
    return {"value_transform": "signed_hyperbolic", "rewards": 100 * a["rewards"]}


VARIANTS: dict[str, tuple[Callable[..., Arguments], ...]] = {
    "double": (double,),
    "mask": (next_mask,),
    "double-mask": (double, next_mask),
    "double-mask-weights-huber": (double, next_mask, weights, huber),
    "weights": (weights,),
    "huber": (huber,),
    "smooth_l1": (smooth_l1,),
    "l1": (l1,),
    "soft": (soft,),
    "soft-mask": (soft, next_mask),
    "munchausen": (munchausen,),
    "munchausen-masks-huber": (munchausen, next_mask, mask, huber),
    "cql": (cql,),
    "cql-mask-weights": (cql, mask, weights),
    "double-cql-weights-smooth_l1": (double, cql, weights, smooth_l1),
    "transform": (transform,),
    "transform-double-mask-weights": (transform, double, next_mask, weights),
    "transform-munchausen-cql-huber": (transform, munchausen, cql, huber),
    "munchausen-cql-masks-weights-huber": (munchausen, cql, next_mask, mask, weights, huber),
}


def variant(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Arguments:
    g = source(seed + 1)
    arguments = make(shape, dtype, seed=seed)
    for part in VARIANTS[name]:
        arguments |= part(arguments, g)
    return arguments


def compacted(arguments: Arguments) -> Arguments:
    """The same with non_final_mask: everything of the next state holds the non-final rows only."""
    rows = ~arguments["terminated"]
    changed = {k: x[rows] for k, x in arguments.items() if k in ("next_q_online", "next_action_mask")}
    return compact(arguments) | changed


def on(setting: Setting, arguments: Arguments) -> Arguments:
    return {k: to_device(x, setting.device) for k, x in arguments.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    check(setting, variant(name, shape))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("shape", [(9, 5), (3, 130)], ids=shape_id)
@pytest.mark.parametrize("name", VARIANTS)
def test_dtypes(setting: Setting, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(setting, variant(name, shape, dtype))


@pytest.mark.parametrize("reduction", ["sum", "none", "weighted_mean"])
@pytest.mark.parametrize("shape", [(9, 5), (520, 40), (2, 3, 70)], ids=shape_id)
@pytest.mark.parametrize("name", ["weights", "double-mask-weights-huber", "munchausen-cql-masks-weights-huber"])
def test_reductions(setting: Setting, name: str, shape: tuple[int, ...], reduction: str) -> None:
    upstream = torch.randn(shape[:-1] if reduction == "none" else (), device=setting.device)
    check(setting, variant(name, shape), reduction, upstream)


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (9, 130), (3, 5003)], ids=shape_id)
@pytest.mark.parametrize("name", ["double", "double-mask", "soft-mask", "munchausen-cql-masks-weights-huber"])
def test_non_final_mask(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    arguments = variant(name, shape)
    same_oracle(arguments, compacted(arguments))
    check(setting, arguments)
    check(setting, compacted(arguments))
    for final in (True, False):
        ends = torch.full(shape[:-1], final)
        check(setting, compacted({**arguments, "terminated": ends}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 6), (7, 150)], ids=shape_id)
def test_layouts(setting: Setting, shape: tuple[int, ...], layout: str) -> None:
    """Each matrix with strides of its own, then all of them with the same."""
    change = LAYOUTS[layout]
    for name in ("double-mask", "munchausen-cql-masks-weights-huber"):
        arguments = variant(name, shape)
        matrices = [k for k, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 2]
        if layout == "flipped_expand":  # one row for all: its own terms are right, but a mask must keep its action
            matrices = [k for k in matrices if k != "action_mask"]
        for k in matrices:
            check(setting, {**arguments, k: change(arguments[k])})
        check(setting, arguments | {k: change(arguments[k]) for k in matrices})


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["double-mask", "munchausen-cql-masks-weights-huber"])
def test_a_lazy_minus_sign_of_any_tensor(setting: Setting, name: str, n: int) -> None:
    """That of the values of one sample is contiguous, and so is a discount of all samples: no copy resolves it."""

    def lazy(x: Tensor) -> Tensor:
        negated = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert negated.is_neg()
        return negated

    arguments = variant(name, (n, 5)) | {"gamma": torch.tensor(0.5)}
    for k, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            check(setting, {**arguments, k: lazy(x)})
    check(setting, arguments, grad_loss=lazy(torch.tensor(-1.5)).to(setting.device))


@pytest.mark.parametrize("A", [5, 130])
@pytest.mark.parametrize("name", ["double-mask", "munchausen-cql-masks-weights-huber"])
def test_time_slices(setting: Setting, name: str, A: int) -> None:
    """The slices of one (B, T, A) sequence have no single row stride: q and its mask [:, :-1], next_q [:, 1:]."""
    arguments = variant(name, (3, 4, A))
    sliced = {}
    for k, x in arguments.items():
        if isinstance(x, Tensor) and x.dim() == 3:
            padding = torch.zeros_like(x[:, :1])
            sliced[k] = (
                torch.cat([padding, x], 1)[:, 1:] if k.startswith("next") else torch.cat([x, padding], 1)[:, :-1]
            )
            check(setting, {**arguments, k: sliced[k]})
    check(setting, arguments | sliced)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_matrices_of_other_dtypes(setting: Setting, other: torch.dtype) -> None:
    for shape in ((6, 5), (6, 130)):
        for name in ("double-mask", "munchausen-cql-masks-weights-huber"):
            arguments = variant(name, shape)
            for k in ("next_q_online", "target_q", "weights"):
                if k in arguments:
                    check(setting, {**arguments, k: arguments[k].to(other)})


@pytest.mark.parametrize("A", [4, 64, 65, 1000, 5003])
def test_the_first_of_equal_actions_is_chosen(setting: Setting, A: int) -> None:
    """Ties in other lanes, tiles and splits: the value of another action would show, since next_q is all different."""
    arguments = variant("double", (6, A))
    arguments["terminated"] = None
    online = -arguments["next_q_online"].abs()
    places = [(0,), (A - 1,), (1, 2), (A // 3, A // 2), (A // 2, A - 1), tuple(range(A))]
    for row, where in enumerate(places):
        online[row, list(where)] = 1.0
    check(setting, {**arguments, "next_q_online": online})
    legal = torch.ones(6, A, dtype=torch.bool)
    for row, where in enumerate(places):
        if len(where) > 1:
            legal[row, where[0]] = False
    check(setting, {**arguments, "next_q_online": online, "next_action_mask": legal})


@pytest.mark.parametrize("name", ["mask", "double-mask", "soft-mask", "munchausen-masks-huber"])
@pytest.mark.parametrize("A", [4, 150, 1501])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_an_illegal_action_is_never_read_into_the_result(setting: Setting, poison: float, A: int, name: str) -> None:
    arguments = variant(name, (6, A))
    clean = dict(arguments)
    for matrix, legal in (
        ("next_q", "next_action_mask"), ("next_q_online", "next_action_mask"), ("target_q", "action_mask"),
    ):  # fmt: skip
        if matrix in arguments:
            arguments[matrix] = torch.where(arguments[legal], arguments[matrix], poison)
    # What is selected is the same, at the same places, so there is nothing to round. It is so in the tests below.
    assert torch.equal(check(setting, arguments), check(setting, clean))


@pytest.mark.parametrize("A", [4, 150, 1501])
def test_an_illegal_action_has_no_part_in_the_conservative_term(setting: Setting, A: int) -> None:
    arguments = variant("cql-mask-weights", (6, A))
    arguments["action_mask"].scatter_(1, arguments["actions"][:, None], True)
    q = torch.where(arguments["action_mask"], arguments["q"], torch.inf)
    grad = check(setting, {**arguments, "q": q})
    assert torch.equal(grad, check(setting, arguments))
    assert (grad.cpu()[~arguments["action_mask"]] == 0).all()


@pytest.mark.parametrize("name", ["mask", "double-mask", "soft-mask", "munchausen-cql-masks-weights-huber"])
@pytest.mark.parametrize("A", [4, 150, 1501])
def test_a_row_without_a_legal_action_is_nan_unless_terminated(setting: Setting, A: int, name: str) -> None:
    arguments = variant(name, (6, A))
    arguments["terminated"] = torch.tensor([True, False, False, True, False, False])
    arguments["next_action_mask"][:2] = False
    arguments |= on(setting, arguments)
    td_error = fused_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)[1]
    assert td_error.isnan().tolist() == [False, True, False, False, False, False]
    check(setting, arguments)


@pytest.mark.parametrize("A", [4, 150])
def test_no_legal_action_in_the_state_itself_is_nan(setting: Setting, A: int) -> None:
    for name in ("munchausen-masks-huber", "cql-mask-weights"):
        arguments = on(setting, variant(name, (6, A)))
        arguments["action_mask"][2] = False
        losses = fused_dqn_loss(**arguments, reduction="none", backend=setting.backend)
        assert losses.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("A", [4, 150])
def test_the_conservative_gradient_without_a_finite_sum(setting: Setting, A: int) -> None:
    """NaN in a legal action makes the gradient NaN at the legal actions only; a row without a legal action has no sum.

    The tests above look at losses, which are NaN as a whole.
    """
    arguments = variant("cql-mask-weights", (6, A))
    arguments["actions"][:3] = 0
    arguments["action_mask"][1, :3] = torch.tensor([True, False, True])
    arguments["action_mask"][2] = False
    arguments["q"][1, 2] = torch.nan
    grad = check(setting, arguments)
    expected = oracle(**arguments).grad_q
    mask = arguments["action_mask"]
    assert torch.equal(grad.isnan().cpu()[1], mask[1])
    assert not grad[2, 1:].any()
    arguments = on(setting, arguments)
    q = arguments["q"].requires_grad_()
    loss = fused_dqn_loss(**arguments, backend=setting.backend)
    (recorded,) = torch.autograd.grad(loss, q, create_graph=True)
    assert_close("recorded", recorded, expected)


@pytest.mark.parametrize("A", [4, 150, 1501])
@pytest.mark.parametrize("name", ["double", "double-mask", "soft", "munchausen", "cql", "transform"])
def test_nan_in_a_live_row_is_nan_in_the_loss(setting: Setting, name: str, A: int) -> None:
    matrix = {"double": "next_q_online", "double-mask": "next_q_online", "munchausen": "target_q", "cql": "q"}
    for column in {0, A // 2, A - 1}:
        arguments = variant(name, (3, A))
        arguments["terminated"] = None
        if "next_action_mask" in arguments:
            arguments["next_action_mask"][1, column] = True
        arguments[matrix.get(name, "next_q")][1, column] = torch.nan
        arguments["actions"][:] = 1
        check(setting, arguments)
        losses = fused_dqn_loss(**on(setting, arguments), reduction="none", backend=setting.backend)
        assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["double", "soft", "munchausen", "munchausen-cql-masks-weights-huber", "transform"])
def test_nan_in_a_terminated_row_is_not_used(setting: Setting, name: str) -> None:
    for A in (4, 1500):
        arguments = variant(name, (6, A))
        arguments["terminated"] = torch.tensor([True, False] * 3)
        clean = dict(arguments)
        for matrix in ("next_q", "next_q_online"):
            if matrix in arguments:
                arguments[matrix] = arguments[matrix].clone()
                arguments[matrix][0], arguments[matrix][2], arguments[matrix][4] = torch.nan, torch.inf, -torch.inf
        assert torch.equal(check(setting, arguments), check(setting, clean))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["double", "soft", "munchausen", "transform"])
def test_infinite_next_values(setting: Setting, name: str, value: float) -> None:
    for A in (4, 150):
        arguments = variant(name, (3, A))
        arguments["terminated"] = None
        arguments["next_q"][1, :] = value
        arguments["next_q"][2, 1] = value
        if "next_q_online" in arguments:
            arguments["next_q_online"][0, :] = value  # all equal: the first is chosen, though it is -inf
        check(setting, arguments)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_any_temperature_is_stable(setting: Setting, dtype: torch.dtype, temperature: float) -> None:
    """x / temperature overflows where the differences from the maximum do not; values far from 0 cancel.

    The inverse of 1e-300 is infinite in float32, and multiplied by the difference 0 it is NaN; that of 1e-30 is not.
    """
    for A in (5, 300):
        for offset in (0, 1e4):
            arguments = variant("munchausen-masks-huber", (6, A), dtype)
            arguments["target"] = Munchausen(temperature)
            arguments["next_q"] += offset
            arguments["target_q"] -= offset
            check(setting, arguments)


def test_large_td_errors(setting: Setting) -> None:
    """Where the square overflows, huber's slope is still delta."""
    for name in ("huber", "smooth_l1", "l1"):
        arguments = variant(name, (5, 3))
        arguments["rewards"][:4] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf])
        arguments["rewards"][4] = arguments["q"][4, arguments["actions"][4]]
        check(setting, {**arguments, "gamma": 0.0})
        grad = check(setting, {**arguments, "gamma": 0.0}, "sum")
        nan = check(setting, {**arguments, "gamma": 0.0, "rewards": torch.full((5,), torch.nan)})
        assert nan.isnan().sum() == 5
        bound = 0.7 if name == "huber" else 1.0
        slopes = grad.cpu().gather(1, arguments["actions"][:, None]).squeeze(1)
        assert slopes.tolist() == pytest.approx([-bound, bound, -bound, bound, 0.0])  # check has held their roundings


def test_per_sample_inputs_of_any_shape_and_stride(setting: Setting) -> None:
    arguments = variant("weights", (7, 5))
    for change in (lambda x: x[:, None], lambda x: torch.stack([x, x], 1)[:, 1], lambda x: x[:1].expand(7)):
        check(setting, {**arguments, "weights": change(arguments["weights"])})


@pytest.mark.parametrize("name", ["weights", "cql-mask-weights", "double-mask-weights-huber"])
@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 70), (0, 4), (4, 1)], ids=shape_id)
def test_fused_td_loss(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    """The loss for a ready target is the loss of terminated samples whose reward it is."""
    family = variant(name, shape)
    options = {k: x for k, x in family.items() if k in ("weights", "loss", "delta", "cql_alpha", "action_mask")}
    q, actions, target = (on(setting, family)[k] for k in ("q", "actions", "rewards"))
    ends = torch.ones(shape[:-1], dtype=torch.bool)
    for column in (False, True):
        q = q.detach().requires_grad_()
        given = target.unsqueeze(-1) if column else target
        loss, td_error = fused_td_loss(
            q, actions, given, **on(setting, options), return_td_error=True, backend=setting.backend
        )
        (grad,) = torch.autograd.grad(loss, q)
        exact = oracle(family["q"], family["actions"], family["rewards"], family["next_q"], ends, **options)
        assert_close("loss", loss, exact.loss)
        assert_close("td_error", td_error, exact.td_error)
        assert_close("grad_q", grad, exact.grad_q)


def test_the_conservative_term_is_returned(setting: Setting) -> None:
    for shape in ((7, 5), (3, 130), (2, 3, 5)):
        for alpha in (0.0, 0.7):
            family = {**variant("cql-mask-weights", shape), "cql_alpha": alpha}
            arguments = on(setting, family)
            arguments["q"].requires_grad_()  # to which the term must carry no graph
            loss, td_error, term = fused_dqn_loss(
                **arguments, return_td_error=True, return_cql=True, backend=setting.backend
            )
            exact = oracle(**family)
            without = {**arguments, "action_mask": arguments["action_mask"] if alpha else None}
            assert_close("td_error", td_error, exact.td_error)
            assert_close("cql", term, exact.cql)
            assert_close("loss", loss, exact.loss)
            assert_close("loss", fused_dqn_loss(**without, backend=setting.backend), exact.loss)
            both = fused_dqn_loss_and_grad(**arguments, return_td_error=True, return_cql=True, backend=setting.backend)
            assert len(both) == 4
            assert_close("loss", both[0], exact.loss)
            assert_close("td_error", both[2], exact.td_error)
            assert_close("cql", both[3], exact.cql)
            assert not term.requires_grad


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5), (9, 130), (2, 5003), (0, 4)], ids=shape_id)
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_grad_is_forward_and_backward(setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    for reduction in ("mean", "none", "weighted_mean"):
        arguments = on(setting, variant(name, shape))
        expected = oracle(**arguments, reduction=reduction)
        q = arguments["q"].requires_grad_()
        loss, td_error = fused_dqn_loss(**arguments, reduction=reduction, return_td_error=True, backend=setting.backend)
        (grad,) = torch.autograd.grad(loss, q, torch.ones_like(loss))
        got = fused_dqn_loss_and_grad(**arguments, reduction=reduction, return_td_error=True, backend=setting.backend)
        for found in ((loss, grad, td_error), got):
            assert_close("loss", found[0], expected.loss)
            assert_close("grad_q", found[1], expected.grad_q)
            assert_close("td_error", found[2], expected.td_error)
        assert got[1].is_contiguous()


OPTIONS = [
    [(), (double,), (soft,), (munchausen,)],
    [(), (next_mask,)],
    [(), (cql,), (cql, mask)],
    [(), (weights,)],
    [(), (huber,), (smooth_l1,)],
]
COMBINATIONS = {
    "-".join(part.__name__ for part in parts) or "plain": parts
    for parts in (tuple(itertools.chain(*choice)) for choice in itertools.product(*OPTIONS))
}


@pytest.mark.product
@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradcheck_of_every_combination(setting: Setting, name: str) -> None:
    g = source(3)
    arguments = make((3, 4), torch.float64)
    for part in COMBINATIONS[name]:
        arguments |= part(arguments, g)
    arguments = on(setting, arguments)
    q = arguments.pop("q").requires_grad_()
    function = lambda q: fused_dqn_loss(q, **arguments, backend=setting.backend)  # noqa: E731
    interpreted = setting.backend == "triton" and setting.device == "cpu"  # 10 ms a launch
    assert torch.autograd.gradcheck(function, q, fast_mode=interpreted)
    if "cql_alpha" in arguments or "loss" in arguments:
        assert torch.autograd.gradgradcheck(function, q, fast_mode=interpreted)


def family_of(
    setting: Setting, shape: tuple[int, ...] = (33, 19)
) -> tuple[Arguments, Callable[..., tuple[Tensor, Tensor]]]:
    """Identities of the loss and its gradient are looked at in float64: each side may be another code."""
    arguments = make(shape, torch.float64, setting.device)

    def loss_and_grad(**changes: Any) -> tuple[Tensor, Tensor]:
        found = fused_dqn_loss_and_grad(**{**arguments, **changes}, backend=setting.backend)
        return found[0], found[1]

    return arguments, loss_and_grad


@pytest.mark.parametrize("shape", [(33, 19), (5, 700)], ids=shape_id)
def test_identities(setting: Setting, shape: tuple[int, ...]) -> None:
    a, loss = family_of(setting, shape)
    plain = loss()
    ones, all_legal = torch.ones_like(a["rewards"]), torch.ones_like(a["q"], dtype=torch.bool)
    assert_agree(loss(next_q_online=a["next_q"]), plain)  # double DQN with equal networks is the maximum
    assert_agree(loss(weights=ones), plain)
    assert_agree(loss(weights=ones, reduction="mean"), plain)
    assert_agree(loss(weights=ones / 2, reduction="weighted_mean"), plain)
    assert_agree(loss(reduction="weighted_mean"), plain)
    assert_agree(loss(next_action_mask=all_legal), plain)
    online = a["next_q"].flip(1)
    assert_agree(loss(next_q_online=online, next_action_mask=all_legal), loss(next_q_online=online))
    only = torch.zeros_like(all_legal).scatter_(1, a["actions"][:, None], True)
    chosen = a["next_q"].gather(1, a["actions"][:, None]).expand(shape)
    assert_agree(loss(next_action_mask=only), loss(next_q=chosen))  # one legal action is the policy
    huber, smooth = loss(loss="huber", delta=0.5), loss(loss="smooth_l1", delta=0.5)
    assert_agree(huber, tuple(0.5 * x for x in smooth))
    assert_agree(loss(loss="huber", delta=1e6), tuple(x / 2 for x in plain))


@pytest.mark.parametrize("shape", [(33, 19), (5, 700)], ids=shape_id)
def test_identities_of_the_soft_targets(setting: Setting, shape: tuple[int, ...]) -> None:
    a, loss = family_of(setting, shape)
    plain = loss()
    assert_agree(loss(target=Soft(1e-13)), plain)  # the soft value tends to the maximum, with log(A) of it at most
    soft = loss(target=Soft(0.5))
    no_bonus = Munchausen(0.5, alpha=0.0)
    assert_agree(loss(target=no_bonus, target_q=a["q"]), soft)
    all_legal = torch.ones_like(a["q"], dtype=torch.bool)
    assert_agree(loss(target=Soft(0.5), next_action_mask=all_legal), soft)
    certain = torch.zeros_like(a["q"]).scatter_(1, a["actions"][:, None], 100.0)
    assert_agree(loss(target=Munchausen(0.5), target_q=certain), soft)  # log pi of a certain action is zero
    assert_agree(loss(target="soft"), loss(target=Soft()))
    assert_agree(loss(target="munchausen", target_q=a["q"]), loss(target=Munchausen(), target_q=a["q"]))
    one = {k: a[k][:, :1] for k in ("q", "next_q")} | {"actions": torch.zeros_like(a["actions"])}
    assert_agree(loss(**one, target=Soft(0.5)), loss(**one))


@pytest.mark.parametrize("shape", [(33, 19), (5, 700)], ids=shape_id)
def test_identities_of_the_conservative_term(setting: Setting, shape: tuple[int, ...]) -> None:
    a, loss = family_of(setting, shape)
    plain, conservative = loss(), loss(cql_alpha=0.7)
    terms = conservative[1] - plain[1]
    sums = terms.sum(1)
    assert_agree(sums, torch.zeros_like(sums), float(terms.abs().sum(1).max()))  # the softmax less the action taken
    assert_agree(conservative[0], plain[0] + 0.7 * F.cross_entropy(a["q"], a["actions"]))
    # The reward is float32 and is shifted as a float64.
    shifted = loss(cql_alpha=0.7, q=a["q"] + 3, rewards=a["rewards"].double() + 3)
    assert_agree(shifted, conservative)
    one = {k: a[k][:, :1] for k in ("q", "next_q")} | {"actions": torch.zeros_like(a["actions"])}
    assert_agree(loss(**one, cql_alpha=0.7), loss(**one))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is sequential")
def test_the_same_bits_every_time(setting: Setting) -> None:
    for shape in ((520, 40), (2, 5000), (70, 700)):
        arguments = on(setting, variant("munchausen-cql-masks-weights-huber", shape))
        first = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
        for _ in range(2):
            again = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_weights_multiply_the_loss_not_the_td_error(setting: Setting) -> None:
    """Clipping the weighted gradient instead is another loss, as dqn_zoo's prioritised agent remarks."""
    arguments = {**make((4, 2), device=setting.device), "gamma": 0.0}
    td = torch.tensor([0.4, 3.0, -2.0, 0.2], device=setting.device)
    arguments["q"].zero_()
    arguments["rewards"] = -td
    w = torch.tensor([1.0, 0.25, 0.5, 1.0], device=setting.device)
    grad = fused_dqn_loss_and_grad(**arguments, weights=w, loss="huber", backend=setting.backend)[1]
    slopes = 4 * grad.gather(1, arguments["actions"][:, None]).squeeze(1)
    # Weights and the number of samples are powers of two, by which nothing is rounded.
    assert torch.equal(slopes.cpu(), torch.tensor([0.4, 0.25, -0.5, 0.2]))


@pytest.mark.parametrize("name", ["double-mask", "soft-mask", "munchausen-cql-masks-weights-huber"])
def test_leading_dimensions_that_merge_in_different_pairs(setting: Setting, name: str) -> None:
    """Of three, the first two of one matrix and the last two of another merge: a mask failed with backend "torch"."""
    arguments = variant(name, (2, 3, 4, 5))
    first = {k: torch.cat([x, x], 2)[:, :, :4] for k, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 4}
    last = {k: torch.cat([x, x], 1)[:, :3] for k, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 4}
    for changed in (first, last):
        check(setting, arguments | changed)
    for masks, others in ((first, last), (last, first)):
        check(setting, arguments | others | {k: x for k, x in masks.items() if "mask" in k})
        check(setting, arguments | others | {k: x for k, x in masks.items() if k in ("q", "next_q")})
