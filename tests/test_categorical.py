"""The categorical losses of every backend against the oracle, hand-worked values, and the guarantees of the family."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import AGREEMENT, Values, assert_agree, assert_close
from categorical_data import SUPPORT, check, clear_winner, compact, every_setting, make, ready
from categorical_oracle import categorical_oracle, eager
from conftest import Setting
from data import source
from torch import Tensor

from dqn_fused import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
)
from dqn_fused.categorical_reference import add_at, compare_and_add

SHAPES = [
    (1, 1, 2), (0, 3, 4), (5, 1, 7), (7, 3, 5), (33, 4, 16), (6, 18, 51), (4, 2, 101), (2, 3, 257), (2, 2, 1030),
    (2, 3, 2, 6), (2, 2, 3, 4, 17), (4, 51),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
REDUCTIONS = ["mean", "sum", "none", "weighted_mean"]


def name_of(x: Any) -> str:
    return "x".join(map(str, x)) if isinstance(x, tuple) else str(x).removeprefix("torch.")


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shapes_and_dtypes(backend: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(backend, make(shape, dtype))


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("projection", ["two_hot", "hl_gauss"])
def test_a_ready_target(backend: Setting, projection: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(backend, {**ready(shape, dtype), "projection": projection})


@every_setting
@pytest.mark.parametrize("sigma", [1e-300, 1e-6, 0.1, 0.75, 2.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_widths_of_hl_gauss(backend: Setting, dtype: torch.dtype, sigma: float) -> None:
    arguments = ready((9, 2, 16), dtype, seed=1)
    check(backend, {**arguments, "projection": "hl_gauss", "sigma": sigma})


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("sigma", [1e10, 1e30, 1e300])
def test_a_width_far_beyond_the_support(backend: Setting, sigma: float, dtype: torch.dtype) -> None:
    """All bins have the same mass, as the softmax of equal logits has, and there is no gradient.

    A mass is the difference of two values of the error function in parts of a third, each within 4 units of roundoff of
    itself and at most K / 2 bins from 0.
    """
    K = 21
    arguments = ready((7, 3, K), dtype, seed=2) | {"logits": torch.zeros(7, 3, K, dtype=dtype)}
    arguments = {k: x.to(backend.device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    options = {"projection": "hl_gauss", "sigma": sigma, "reduction": "sum", "backend": backend.backend}
    _, gradient = fused_categorical_td_loss_and_grad(**arguments, **options)
    assert gradient.abs().max() <= (16 * K + 64) * torch.finfo(dtype).eps / 2 / K


@every_setting
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [make, ready])
def test_reductions_with_an_upstream_gradient(backend: Setting, function: Any, reduction: str) -> None:
    arguments, g = function((2, 5, 3, 12), seed=3), source(4)
    arguments |= {"weights": torch.rand(2, 5, generator=g) + 0.1, "reduction": reduction}
    upstream = torch.randn((2, 5) if reduction == "none" else (), generator=g)
    check(backend, arguments, upstream)


@every_setting
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_many_samples(backend: Setting, reduction: str) -> None:
    check(backend, {**make((700, 2, 11), seed=5), "reduction": reduction})


def some(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """A mask with at least one legal action in each row."""
    mask = torch.rand(shape, generator=g) < 0.5
    return mask.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=g), True)


def options(shape: tuple[int, ...], names: set[str], dtype: torch.dtype = torch.float32, seed: int = 6) -> Any:
    arguments, g = make(shape, dtype, seed), source(seed + 1)
    *N, A, _ = shape
    if "mask" in names:
        arguments["next_action_mask"] = some((*N, A), g)
        arguments["next_logits"] = clear_winner(arguments["next_logits"], arguments["next_action_mask"])
    if "online" in names:
        online = 2 * torch.randn(shape, generator=g).to(dtype)
        arguments["next_logits_online"] = clear_winner(online, arguments.get("next_action_mask"))
    if "values" in names:
        arguments["next_logits_online"] = torch.randn((*N, A), generator=g).to(dtype)
    if "gammas" in names:
        arguments["gamma"] = torch.rand(N, generator=g)
    if "weights" in names:
        arguments["weights"] = torch.rand(N, generator=g)
    return compact(arguments) if "compacted" in names else arguments


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    "names",
    ["mask", "online", "values", "gammas", "weights", "compacted", "online mask", "values mask compacted",
     "online mask gammas weights compacted"],
)  # fmt: skip
def test_options(backend: Setting, names: str, dtype: torch.dtype) -> None:
    check(backend, options((12, 5, 21), set(names.split()), dtype))


@every_setting
def test_every_dtype_may_be_mixed(backend: Setting) -> None:
    for i, dtype in enumerate(DTYPES):
        arguments = make((6, 3, 9), dtype, seed=8)
        others = DTYPES[i + 1 :] + DTYPES[:i]
        arguments["next_logits"] = clear_winner(arguments["next_logits"].to(others[0]))
        arguments["next_logits_online"] = clear_winner(torch.randn(6, 3, 9).to(others[1]))
        arguments["rewards"] = arguments["rewards"].to(others[2])
        check(backend, {**arguments, "actions": arguments["actions"].to(torch.uint8), "gamma": torch.tensor(0.9)})


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_support_of_atoms(backend: Setting, dtype: torch.dtype) -> None:
    """Its atoms count as they are, rounded or not; from end to end they are evenly spaced."""
    check(backend, {**make((6, 3, 51), torch.float64, seed=9), "support": torch.linspace(-5, 10, 51).to(dtype)})
    check(backend, {**make((6, 3, 51), seed=9), "support": torch.linspace(-5, 10, 51).to(dtype)[:]})


ATOMS = 5  # at -2, -1, 0, 1, 2


@every_setting
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("K", [2, ATOMS])
def test_targets_on_atoms_at_the_ends_and_beyond(backend: Setting, K: int, gamma: float) -> None:
    rewards = torch.tensor([-math.inf, -1e30, -3.0, -2.0, -1.5, -1.0, 0.0, 0.5, 1.0, 2.0, 2.5, 1e30, math.inf])
    n = len(rewards)
    arguments = make((n, 2, K), torch.float64, seed=10)
    arguments |= {"rewards": rewards, "gamma": gamma, "support": (-2.0, 2.0)}
    for terminated in (None, torch.ones(n)):
        expected = check(backend, {**arguments, "terminated": terminated})
        assert expected.loss.value.shape == ()
    for dtype in (torch.float32, torch.float64):
        target = {"target": rewards, "actions": arguments["actions"], "support": (-2.0, 2.0)}
        check(backend, {**target, "logits": arguments["logits"].to(dtype)})
        check(backend, {**target, "logits": arguments["logits"].to(dtype), "projection": "hl_gauss"})


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_mass_is_lost_on_an_atom(backend: Setting, dtype: torch.dtype) -> None:
    """Where l == u, (u - b) p and (b - l) p are both zero: the mass is gone, and the loss is silently too small."""
    logits = torch.zeros(ATOMS, 1, ATOMS, dtype=dtype)
    next_logits = torch.full((ATOMS, 1, ATOMS), -math.inf, dtype=dtype)
    next_logits[torch.arange(ATOMS), 0, torch.arange(ATOMS)] = 0  # all of it on one atom
    arguments = {"logits": logits, "next_logits": next_logits, "support": (-2.0, 2.0), "gamma": 1.0}
    arguments |= {"actions": torch.zeros(ATOMS, dtype=torch.int64), "reduction": "none"}
    for reward in (-1, 0, 1):
        expected = check(backend, {**arguments, "rewards": torch.full((ATOMS,), reward)})
        np.testing.assert_allclose(expected.loss.value, math.log(ATOMS), rtol=AGREEMENT)
        one_hot = F.one_hot((torch.arange(ATOMS) + reward).clamp(0, ATOMS - 1), ATOMS)
        np.testing.assert_allclose(expected.gradient.value[:, 0], 1 / ATOMS - one_hot.numpy(), rtol=AGREEMENT)


WORKED = {
    # p = (0.2, 0.3, 0.5) at 0.5, 1 and 1.5, the first and the last shared by halves
    "between atoms": ([0.2, 0.3, 0.5], 0.5, 0.5, False, [0.1, 0.65, 0.25]),
    "on atoms": ([0.2, 0.3, 0.5], 1.0, 1.0, False, [0.0, 0.2, 0.8]),  # 3 is moved to 2
    "below": ([0.2, 0.3, 0.5], -1.0, 1.0, False, [0.5, 0.5, 0.0]),
    "all beyond": ([0.2, 0.3, 0.5], 7.0, 1.0, False, [0.0, 0.0, 1.0]),
    "all at one place": ([0.2, 0.3, 0.5], 0.75, 0.0, False, [0.25, 0.75, 0.0]),
    "terminated": ([0.2, 0.3, 0.5], 1.25, 0.9, True, [0.0, 0.75, 0.25]),
    "terminated on the last atom": ([0.2, 0.3, 0.5], 2.0, 0.9, True, [0.0, 0.0, 1.0]),
}


@every_setting
@pytest.mark.parametrize("case", WORKED)
def test_worked_by_hand(backend: Setting, case: str) -> None:
    """Algorithm 1 of Bellemare et al. (2017) on the atoms 0, 1 and 2."""
    p, reward, gamma, terminated, m = WORKED[case]
    predicted = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    target = torch.tensor(m, dtype=torch.float64)
    other = torch.tensor([1.0, 0.0, -100.0], dtype=torch.float64)  # of expectation 0.27: not chosen
    logits = torch.stack((other, predicted.log()))[None].requires_grad_()
    loss, td_error = fused_categorical_loss(
        logits, torch.tensor([1]), torch.tensor([reward]),
        torch.stack((other, torch.tensor(p, dtype=torch.float64).log()))[None],
        torch.tensor([terminated]), gamma, support=(0.0, 2.0), return_td_error=True, backend=backend.backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_agree(loss, -(target * predicted.log()).sum())
    assert_agree(td_error, torch.tensor([1 - m[1] - 2 * m[2]], dtype=torch.float64), 1.0)
    assert_agree(gradient, torch.stack((torch.zeros(3).double(), predicted - target))[None])


@every_setting
def test_hl_gauss_by_the_tables(backend: Setting) -> None:
    """Of the normal distribution's tables: Phi(2/3) = 0.747507 and Phi(2) = 0.977250, for sigma = 0.75."""
    logits = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    loss = fused_categorical_td_loss(
        logits, torch.tensor([0]), torch.tensor([1]), support=(0.0, 2.0), projection="hl_gauss", backend=backend.backend
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    whole = 2 * 0.977250 - 1
    middle, side = (2 * 0.747507 - 1) / whole, (0.977250 - 0.747507) / whole
    expected = 1 / 3 - torch.tensor([[[side, middle, side]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6)  # in float64, of tables with six digits


@every_setting
def test_a_target_on_an_atom_is_a_label(backend: Setting) -> None:
    """Then the loss is torch.nn.functional.cross_entropy."""
    arguments = ready((20, 3, ATOMS), torch.float64, seed=12)
    labels = torch.randint(ATOMS, (20,), generator=source(13))
    loss = fused_categorical_td_loss(
        arguments["logits"], arguments["actions"], labels - 2, support=(-2.0, 2.0), backend=backend.backend
    )
    taken = arguments["logits"][torch.arange(20), arguments["actions"]]
    assert_agree(loss, F.cross_entropy(taken, labels))


@every_setting
def test_equal_distributions_have_no_gradient(backend: Setting) -> None:
    arguments = make((8, 1, 33), torch.float64, seed=14)
    arguments |= {"next_logits": arguments["logits"], "rewards": torch.zeros(8), "gamma": 1.0, "terminated": None}
    arguments["actions"] = torch.zeros(8, dtype=torch.int64)
    loss, gradient, td_error = fused_categorical_loss_and_grad(
        **arguments, reduction="none", return_td_error=True, backend=backend.backend
    )
    log_p = torch.log_softmax(arguments["logits"][:, 0], 1)
    assert_agree(loss, -(log_p.exp() * log_p).sum(1))
    assert_agree(gradient, torch.zeros_like(gradient), 1.0)
    assert_agree(td_error, torch.zeros_like(td_error), max(map(abs, SUPPORT)))


@every_setting
def test_within_twice_the_error_of_eager_code(backend: Setting) -> None:
    arguments = make((64, 6, 51), seed=15)
    expected = categorical_oracle(**arguments)
    x = arguments["logits"].clone().requires_grad_()
    loss = eager(**{**arguments, "logits": x, "terminated": arguments["terminated"].float()})
    (gradient,) = torch.autograd.grad(loss, x)
    got, got_gradient = fused_categorical_loss_and_grad(**arguments, backend=backend.backend)
    assert_close("loss", got, expected.loss, loss)
    assert_close("gradient", got_gradient, expected.gradient, gradient)


@every_setting
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_chosen_is_not_read(backend: Setting, bad: float) -> None:
    """Next states of terminated samples, illegal and unchosen actions, logits of actions that were not taken."""
    arguments = options((12, 4, 9), {"online", "mask"}, seed=16)
    expected = fused_categorical_loss_and_grad(**arguments, return_td_error=True, backend=backend.backend)
    values = (torch.softmax(arguments["next_logits_online"], 2) * torch.arange(9)).sum(2)
    best = values.where(arguments["next_action_mask"], -math.inf).argmax(1)
    ended = arguments["terminated"]
    arguments = {k: x.clone() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    arguments["next_logits"][ended] = bad
    arguments["next_logits_online"][ended] = bad
    arguments["next_logits_online"][~arguments["next_action_mask"]] = bad
    arguments["next_action_mask"][ended] = False
    for i in range(12):
        for a in range(4):
            if a != best[i]:
                arguments["next_logits"][i, a] = bad
            if a != arguments["actions"][i]:
                arguments["logits"][i, a] = bad
    got = fused_categorical_loss_and_grad(**arguments, return_td_error=True, backend=backend.backend)
    # What is read is the same, at the same places, so there is nothing to round.
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_a_live_row_is_nan_in_its_loss_alone(backend: Setting, bad: float, dtype: torch.dtype) -> None:
    g = source(18)
    places: dict[str, tuple[Any, ...]] = {"logits": (1, 5), "next_logits": (0, 5), "next_logits_online": (2, 5)}
    for name, (action, atom) in places.items():
        arguments = make((3, 4, 9), dtype, seed=17) | {"terminated": None, "actions": torch.tensor([1, 1, 1])}
        arguments["next_logits_online"] = clear_winner(torch.randn(3, 4, 9, generator=g).to(dtype))
        if name == "next_logits":
            del arguments["next_logits_online"]
        arguments[name][1, action, atom] = bad
        expected = check(backend, {**arguments, "reduction": "none"})
        assert expected.loss.value[1] != expected.loss.value[1]
    for name in ("rewards", "gamma", "weights"):
        arguments = make((3, 4, 9), dtype, seed=17) | {"terminated": None}
        arguments[name] = torch.tensor([0.5, math.nan, 0.5])
        loss = fused_categorical_loss(**arguments, reduction="none", backend=backend.backend)
        assert loss.isnan().tolist() == [False, True, False]
    arguments = ready((3, 4, 9), dtype, seed=17) | {"target": torch.tensor([0.5, math.nan, math.inf])}
    for projection in ("two_hot", "hl_gauss"):
        loss = fused_categorical_td_loss(**arguments, projection=projection, reduction="none", backend=backend.backend)
        assert loss.isnan().tolist() == [False, True, False]


@every_setting
def test_infinity_times_an_atom_at_zero(backend: Setting) -> None:
    arguments = make((3, 2, ATOMS), seed=19) | {"terminated": None, "support": (-2.0, 2.0)}
    arguments |= {"gamma": torch.tensor([0.5, math.inf, -math.inf])}
    loss = fused_categorical_loss(**arguments, reduction="none", backend=backend.backend)
    assert loss.isnan().tolist() == [False, True, True]
    loss = fused_categorical_loss(**{**arguments, "support": (-1.0, 2.0)}, reduction="none", backend=backend.backend)
    assert loss.isfinite().all()


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_an_atom_without_target_may_have_no_probability(backend: Setting, dtype: torch.dtype) -> None:
    """0 * -inf is NaN; users rule out atoms by -inf."""
    arguments = ready((2, 1, 4), dtype, seed=20) | {"support": (0.0, 3.0), "target": torch.tensor([0.5, 2.5])}
    arguments["logits"][0, 0, 3] = arguments["logits"][1, 0, 0] = -math.inf
    expected = check(backend, arguments)
    assert math.isfinite(expected.loss.value)
    arguments["logits"][0, 0, 1] = -math.inf
    loss = fused_categorical_td_loss(**arguments, reduction="none", backend=backend.backend)
    assert loss.isinf().tolist() == [True, False]


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_target_at_an_end_is_nowhere_else(backend: Setting, dtype: torch.dtype) -> None:
    """(v_max - v_min) / step may round below K - 1: a share for the atom before the last, that -inf has ruled out."""
    ends = [(low / 7, high / 11) for low in range(-20, 0, 3) for high in range(1, 30, 3)]
    for support in ends:
        for K in (3, 7, 51):
            logits = torch.full((4, 1, K), -math.inf, dtype=dtype)
            logits[:2, 0, -1] = logits[2:, 0, 0] = 0
            loss = fused_categorical_td_loss(
                logits, torch.zeros(4, dtype=torch.int64), torch.tensor([support[1], 99, support[0], -99], dtype=dtype),
                support=support, reduction="none", backend=backend.backend,
            )  # fmt: skip
            assert not loss.any()


@every_setting
def test_a_live_row_without_a_legal_action_is_nan(backend: Setting) -> None:
    for names in ({"mask"}, {"mask", "online"}, {"mask", "values"}):
        arguments = options((3, 4, 9), names, seed=21) | {"terminated": torch.tensor([False, False, True])}
        arguments["next_action_mask"] = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
        loss = fused_categorical_loss(**arguments, reduction="none", backend=backend.backend)
        assert loss.isnan().tolist() == [False, True, False]
    arguments["next_action_mask"][1] = True
    arguments["next_logits_online"][1] = -math.inf  # Q-values: beside a mask -inf counts as illegal
    loss = fused_categorical_loss(**arguments, reduction="none", backend=backend.backend)
    assert loss.isnan().tolist() == [False, True, False]


@every_setting
def test_of_equal_expectations_the_first_counts(backend: Setting) -> None:
    """Equal however they are computed: half of the probability on each of two atoms, all of them multiples of 1.25."""
    arguments = make((4, 6, 13), seed=22) | {"terminated": None}
    row = torch.full((13,), -math.inf)
    row[torch.randperm(13, generator=source(23))[:2]] = 0
    arguments["next_logits_online"] = row.expand(4, 6, 13)
    check(backend, arguments)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, :2] = False
    check(backend, arguments | {"next_action_mask": mask})


@every_setting
def test_strides(backend: Setting) -> None:
    """Transposed, sliced and expanded tensors; none of them is contiguous."""
    plain = options((6, 4, 9), {"online", "mask", "weights"}, seed=24)
    for layout in ("transposed", "sliced", "reversed atoms"):
        arguments = dict(plain)
        for name, x in plain.items():
            if not isinstance(x, Tensor):
                continue
            if layout == "transposed":
                arguments[name] = x.movedim(0, -1).contiguous().movedim(-1, 0)
            elif layout == "sliced":
                arguments[name] = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
            elif x.dim() == 3:
                arguments[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        check(backend, arguments)
    expanded = plain | {"next_logits": plain["next_logits"][:1].expand(6, 4, 9)}
    check(backend, expanded)


@every_setting
def test_a_column_is_a_row(backend: Setting) -> None:
    """(N, 1) is what a replay buffer holds, and never broadcast against (N,)."""
    arguments = options((6, 3, 9), {"weights", "gammas"}, seed=25)
    columns = {k: x[:, None] if isinstance(x, Tensor) and x.dim() == 1 else x for k, x in arguments.items()}
    plain, other = (fused_categorical_loss(**a, backend=backend.backend) for a in (arguments, columns))
    assert torch.equal(plain, other), "the backend is given the same"


@every_setting
def test_a_permuted_batch_has_permuted_losses(backend: Setting) -> None:
    arguments = options((40, 3, 21), {"online", "mask", "weights", "gammas"}, torch.float64, seed=26)
    order = torch.randperm(40, generator=source(27))
    permuted = {k: x[order] if isinstance(x, Tensor) else x for k, x in arguments.items()}
    one, other = (
        fused_categorical_loss_and_grad(**a, reduction="none", backend=backend.backend) for a in (arguments, permuted)
    )
    assert_agree([x[order] for x in one], other)


@every_setting
def test_the_same_bits_at_any_number_of_threads(backend: Setting) -> None:
    arguments = make((600, 18, 51), seed=28)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(fused_categorical_loss_and_grad(**arguments, backend=backend.backend))
    finally:
        torch.set_num_threads(threads)
    if backend.backend != "torch":  # whose operations are shared out by PyTorch
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@every_setting
def test_ready_targets_are_what_terminated_samples_have(backend: Setting) -> None:
    arguments = make((30, 3, 21), seed=29) | {"terminated": torch.ones(30)}
    ended = check(backend, arguments)
    for name in ("next_logits", "terminated"):
        del arguments[name]
    arguments["target"] = arguments.pop("rewards")
    assert_close("loss", fused_categorical_td_loss(**arguments, reduction="mean", backend=backend.backend), ended.loss)


def test_sums_by_comparison_are_those_by_index() -> None:
    """What a GPU takes, where sums by index are atomic."""
    g = source(30)
    index = torch.randint(7, (5, 11), generator=g)
    values = torch.randint(-9, 9, (5, 11), generator=g).double()  # exact in any order
    assert torch.equal(compare_and_add(index, values, 7), add_at(index, values, 7))
    nan = values.clone()
    nan[2, 3] = math.nan
    found = compare_and_add(index, nan, 7)
    assert found.isnan().nonzero().tolist() == [[2, int(index[2, 3])]]


@every_setting
def test_what_is_kept_for_the_backward(backend: Setting) -> None:
    """(n, K) slopes and (n,) values, nothing of the size of the logits."""
    arguments = make((16, 10, 21), seed=31) | {"weights": torch.rand(16)}
    arguments["logits"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        fused_categorical_loss(**arguments, backend=backend.backend)
    assert sum(kept) == 16 * 21 + 2 * 16


@every_setting
@pytest.mark.parametrize("shift", [0.0, 39.0, -39.0])
def test_the_support_is_scale_free(backend: Setting, shift: float) -> None:
    """Rewards and atoms times a power of two: the same bits, whatever the logits: exp(39) * 2.0**100 is no float32."""
    arguments = make((10, 3, 17), seed=32)
    arguments["next_logits"] += shift
    losses = []
    for scale in (1.0, 1024.0, 2.0**100, 2.0**-100):
        scaled = {"rewards": arguments["rewards"] * scale, "support": tuple(scale * x for x in SUPPORT)}
        losses.append(fused_categorical_loss(**{**arguments, **scaled}, backend=backend.backend))
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@every_setting
@pytest.mark.parametrize("where", ["everywhere", "in one action"])
@pytest.mark.parametrize("shift", [-1000.0, -86.0, -39.0, 39.0, 88.0, 1000.0])
def test_logits_of_any_size(backend: Setting, shift: float, where: str) -> None:
    """A softmax knows their differences only; their exponentials overflow above 88, and are lost below -87."""
    arguments = make((12, 5, 21), seed=34)
    if where == "everywhere":
        arguments["next_logits"] += shift
    else:
        arguments["next_logits"][:, 2] += shift
    check(backend, arguments)


@every_setting
def test_the_discount_of_a_terminated_row_is_not_used(backend: Setting) -> None:
    """A kernel that reads no logits for such a row would still multiply its atoms by the discount."""
    arguments = make((5, 3, 9), seed=97)
    arguments["terminated"] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    clean = arguments | {"gamma": torch.rand(5)}
    dirty = arguments | {"gamma": torch.where(arguments["terminated"] == 1, torch.nan, clean["gamma"])}
    results = []
    for given in (clean, dirty):
        on_device = {k: x.to(backend.device) if isinstance(x, Tensor) else x for k, x in given.items()}
        results.append(fused_categorical_loss_and_grad(**on_device, return_td_error=True, backend=backend.backend))
    assert all(map(torch.equal, *results))


def test_the_oracle_knows_a_lost_mass() -> None:
    """The trap, l == u, on the oracle's own bounds: they are narrow enough to see it."""
    arguments = make((5, 1, ATOMS), seed=33) | {"support": (-2.0, 2.0), "rewards": torch.zeros(5), "gamma": 1.0}
    arguments["terminated"] = torch.ones(5)
    expected = categorical_oracle(**arguments)
    with pytest.raises(AssertionError, match="loss: error"):
        assert_close("loss", torch.tensor(0.0), Values(expected.loss.value, expected.loss.error))
