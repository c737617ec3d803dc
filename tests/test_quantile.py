"""The quantile loss of every backend against the oracle, hand-worked values, and the guarantees of the family."""

from typing import Any

import numpy as np
import pytest
import torch
from bounds import assert_agree
from conftest import Setting
from data import source
from quantile_data import check, check_against_eager, clear_winner, compact, every_setting, make
from torch import Tensor

from dqn_fused import fused_quantile_loss, fused_quantile_loss_and_grad

SHAPES = [
    ((1, 1, 1), 1), ((0, 3, 4), 4), ((5, 2, 1), 7), ((5, 1, 7), 1), ((7, 3, 5), 11), ((33, 4, 8), 8), ((6, 18, 32), 33),
    ((4, 2, 200), 200), ((2, 3, 130), 64), ((2, 3, 2, 5), 4), ((2, 2, 3, 4, 17), 9), ((4, 51), 51),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KAPPAS = [1.0, 0.0, 0.3, 5.0]


def dtype_id(x: Any) -> str:
    return str(x).removeprefix("torch.")


def shape_id(x: Any) -> str:
    return "x".join(map(str, x)) if isinstance(x, tuple) else str(x)


@every_setting
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "K2"), SHAPES, ids=shape_id)
def test_shapes_and_dtypes(backend: Setting, shape: tuple[int, ...], K2: int, dtype: torch.dtype) -> None:
    check(backend, make(shape, K2, dtype))


@every_setting
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("quantile_reduction", ["sum", "mean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "weighted_mean"])
def test_options_with_an_upstream_gradient(
    backend: Setting, reduction: str, quantile_reduction: str, kappa: float
) -> None:
    arguments = make((2, 5, 3, 12), 7, seed=3)
    g = source(4)
    arguments |= {"weights": torch.rand(2, 5, generator=g) + 0.1, "gamma": torch.rand(2, 5, generator=g)}
    upstream = torch.randn((2, 5) if reduction == "none" else (), generator=g)
    options = {"kappa": kappa, "quantile_reduction": quantile_reduction, "reduction": reduction}
    check(backend, {**arguments, **options}, upstream)
    del arguments["weights"]
    check(backend, {**arguments, **options}, upstream)


@every_setting
@pytest.mark.parametrize("kappa", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("each", [False, True], ids=["K", "NxK"])
def test_taus(backend: Setting, each: bool, dtype: torch.dtype, kappa: float) -> None:
    arguments = make((3, 4, 2, 9), 6, seed=5)
    taus = torch.rand((3, 4, 9) if each else (9,), generator=source(6)).to(dtype)
    check(backend, {**arguments, "taus": taus, "kappa": kappa})
    if not each:
        check(backend, {**arguments, "taus": taus.expand(3, 4, 9), "kappa": kappa})


@every_setting
@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_taus_beyond_0_and_1(backend: Setting, kappa: float) -> None:
    """Nobody looks at their values: every backend takes |tau - 1| and |tau| of them."""
    check(backend, {**make((7, 2, 4), 6, seed=8), "taus": torch.tensor([-0.5, 0.0, 1.0, 1.5]), "kappa": kappa})


@every_setting
def test_taus_of_the_midpoints_are_the_default(backend: Setting) -> None:
    arguments = make((6, 3, 8), dtype=torch.float64, seed=7)
    assert_agree(
        *(
            fused_quantile_loss(**arguments, taus=x, backend=backend.backend)
            for x in (None, (torch.arange(8) + 0.5) / 8)
        )
    )


@every_setting
@pytest.mark.parametrize("values", [False, True], ids=["quantiles", "q-values"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("compacted", [False, True], ids=["", "compacted"])
def test_double(backend: Setting, values: bool, masked: bool, compacted: bool) -> None:
    arguments = make((17, 5, 6), 4, seed=8)
    g = source(9)
    chooser = clear_winner(torch.randn((17, 5, 3), generator=g), g)
    arguments["next_quantiles_online"] = chooser.mean(2) if values else chooser
    if masked:
        # The winner and another one: the rest of the means differ by less, but not by a rounding.
        mask = torch.rand((17, 5), generator=g) < 0.5
        arguments["next_action_mask"] = mask | (chooser.mean(2) == chooser.mean(2).max(1, keepdim=True).values)
    check(backend, compact(arguments) if compacted else arguments)


@every_setting
@pytest.mark.parametrize("compacted", [False, True], ids=["", "compacted"])
def test_an_illegal_action_is_never_chosen_nor_read(backend: Setting, compacted: bool) -> None:
    """Illegal actions hold the largest values, NaN and inf; without them the batch is that of the legal ones alone."""
    arguments = make((12, 3, 5), 4, seed=10)
    huge = torch.tensor([1e4, torch.nan, torch.inf]).repeat(4)[:, None, None].expand(12, 1, 4)
    following = torch.cat([huge, arguments["next_quantiles"], huge], 1)
    padding = torch.zeros(12, 1, 5)
    legal = torch.tensor([False, True, True, True, False]).expand(12, 5)
    wide = {
        **arguments,
        "quantiles": torch.cat([padding, arguments["quantiles"], padding], 1),
        "actions": arguments["actions"] + 1,
        "next_quantiles": following,
        "next_action_mask": legal,
    }
    plain, wide = (compact(arguments), compact(wide)) if compacted else (arguments, wide)
    of_plain, of_wide = check(backend, plain), check(backend, wide)
    assert of_plain.loss.value == of_wide.loss.value
    np.testing.assert_array_equal(of_plain.gradient.value, of_wide.gradient.value[:, 1:4])


@every_setting
def test_a_row_without_a_legal_action_is_nan_unless_terminated(backend: Setting) -> None:
    arguments = make((4, 3, 5), seed=11)
    arguments["terminated"] = torch.tensor([False, True, False, False])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:2] = False
    loss, td_error = fused_quantile_loss(
        **arguments, next_action_mask=mask, reduction="none", return_td_error=True, backend=backend.backend
    )
    assert loss.isnan().tolist() == td_error.isnan().tolist() == [True, False, False, False]
    online = torch.full((4, 3), -torch.inf)
    loss = fused_quantile_loss(
        **arguments, next_quantiles_online=online, next_action_mask=~mask | True, reduction="none",
        backend=backend.backend,
    )  # fmt: skip
    assert loss.isnan().tolist() == [True, False, True, True]


@every_setting
def test_hand_worked(backend: Setting) -> None:
    """theta (0, 2), t (1, 3): u is (1, 3) and (-1, 1), tau 1/4 and 3/4.

    |tau - 1{u<0}| huber: 1/4 (0.5 + 2.5) / 2 = 0.375, and (1/4 0.5 + 3/4 0.5) / 2 = 0.25. Slopes by theta: -1/4 twice,
    (1/4 - 3/4) / 2.
    """
    quantiles = torch.tensor([[[0.0, 2.0]]], requires_grad=True)
    arguments = (torch.tensor([0]), torch.tensor([1.0]), torch.tensor([[[0.0, 4.0]]]), None, 0.5)
    loss, td_error = fused_quantile_loss(quantiles, *arguments, return_td_error=True, backend=backend.backend)
    loss.backward()
    assert loss.item() == 0.625
    assert td_error.tolist() == [-1.0]
    assert quantiles.grad.tolist() == [[[-0.25, -0.25]]]
    loss = fused_quantile_loss(quantiles, *arguments, quantile_reduction="mean", backend=backend.backend)
    assert loss.item() == 0.3125


@every_setting
def test_hand_worked_at_the_edges(backend: Setting) -> None:
    """|u| = kappa is 1/2 kappa either way, and u = 0 is nothing: theta (1, 3), t (1, 5), kappa 2, tau 1/4 and 3/4.

    u is (0, 4) and (-2, 2); huber / kappa (0, 3) and (1, 1); times |tau - 1{u<0}|: (0, 3/4) and (1/4, 3/4). Slopes by
    theta: -(0 + 1/4) / 2, (1/4 - 3/4) / 2. With kappa 0, |u| for huber: (0, 1) and (1/2, 3/2), the slopes the same.
    """
    quantiles = torch.tensor([[[1.0, 3.0]]])
    arguments = (torch.tensor([0]), torch.tensor([1.0]), torch.tensor([[[0.0, 8.0]]]), None, 0.5)
    for kappa, value in ((2.0, 0.875), (0.0, 1.5)):
        loss, gradient = fused_quantile_loss_and_grad(quantiles, *arguments, kappa=kappa, backend=backend.backend)
        assert loss.item() == value
        assert gradient.tolist() == [[[-0.125, -0.25]]]


@every_setting
def test_the_weights_go_with_the_predictions(backend: Setting) -> None:
    """In public code tau has been broadcast along the targets; of one prediction at tau = 7/8 only u's sign counts."""
    arguments = (torch.tensor([0]), torch.tensor([0.0]), torch.tensor([[[1.0, -1.0, -1.0, -1.0]]]), None, 1.0)
    taus = torch.tensor([0.875])
    loss = fused_quantile_loss(torch.zeros(1, 1, 1), *arguments, taus=taus, kappa=0.0, backend=backend.backend)
    assert loss.item() == (0.875 + 3 * 0.125) / 4


@every_setting
@pytest.mark.parametrize("kappa", KAPPAS)
def test_ties(backend: Setting, kappa: float) -> None:
    """Quantiles, targets and means on a grid of halves: u = 0, |u| = kappa, equal means, of which the first wins."""
    g = source(12)
    arguments = make((40, 4, 8), 8, seed=12)
    arguments["quantiles"] = torch.randint(-3, 4, (40, 4, 8), generator=g) / 2
    arguments["next_quantiles"] = torch.randint(-1, 2, (40, 4, 8), generator=g) / 2
    arguments["rewards"] = torch.randint(-1, 2, (40,), generator=g) / 2
    check(backend, {**arguments, "gamma": 1.0, "kappa": kappa})
    check(backend, {**arguments, "gamma": 1.0, "kappa": kappa, "next_quantiles_online": torch.zeros(40, 4)})


@every_setting
def test_equal_rows_the_first_action_wins(backend: Setting) -> None:
    """Sums of small integers are the same in any order."""
    arguments = make((6, 5, 3), 37, seed=13)
    same = (4 * arguments["next_quantiles"][:, :1]).round().expand(6, 5, 37)
    marked = same + torch.arange(5)[:, None] * 100.0
    check(backend, {**arguments, "next_quantiles": marked, "next_quantiles_online": same})


@every_setting
@pytest.mark.parametrize("form", ["terminated", "mask"])
def test_all_terminated(backend: Setting, form: str) -> None:
    arguments = make((6, 3, 4), 5, seed=14)
    arguments["terminated"] = torch.ones(6, dtype=torch.bool)
    if form == "terminated":
        arguments["next_quantiles"] = torch.full((6, 3, 5), torch.nan)
    check(backend, compact(arguments) if form == "mask" else arguments)


@every_setting
def test_no_sample(backend: Setting) -> None:
    arguments = make((0, 3, 4), seed=15)
    assert fused_quantile_loss(**arguments, backend=backend.backend).isnan()
    assert fused_quantile_loss(**arguments, reduction="sum", backend=backend.backend) == 0
    assert fused_quantile_loss(**arguments, reduction="weighted_mean", backend=backend.backend).isnan()


@every_setting
def test_nan_and_inf_in_a_terminated_row_are_not_used(backend: Setting) -> None:
    arguments = make((8, 3, 4), seed=16)
    arguments["terminated"] = torch.arange(8) % 2 == 0
    clean = fused_quantile_loss_and_grad(**arguments, backend=backend.backend)
    dirty = arguments["next_quantiles"].clone()
    dirty[::4], dirty[2::4] = torch.nan, torch.inf
    again = fused_quantile_loss_and_grad(**{**arguments, "next_quantiles": dirty}, backend=backend.backend)
    assert all(map(torch.equal, clean, again))


@every_setting
@pytest.mark.parametrize("where", ["next, chosen", "next, not chosen", "reward", "taken", "not taken", "tau", "online"])
@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_nan_in_a_live_row_is_nan_in_the_loss(backend: Setting, where: str, kappa: float) -> None:
    arguments = make((3, 2, 40), 33, seed=17)
    arguments |= {"terminated": torch.zeros(3), "actions": torch.zeros(3, dtype=torch.int64)}
    arguments["taus"] = torch.full((3, 40), 0.3)
    arguments["next_quantiles_online"] = torch.tensor([[1.0, 0.0]] * 3)
    if where in ("next, not chosen", "not taken"):  # what is not read does not count
        arguments["next_quantiles" if "next" in where else "quantiles"][1, 1, 7] = torch.nan
        wrong = []
    else:
        name, index = {
            "next, chosen": ("next_quantiles", (1, 0, 5)),
            "reward": ("rewards", (1,)),
            "taken": ("quantiles", (1, 0, 39)),
            "tau": ("taus", (1, 2)),
            "online": ("next_quantiles_online", (1, 1)),
        }[where]
        arguments[name][index] = torch.nan
        wrong = [1]
    loss, gradient = fused_quantile_loss_and_grad(**arguments, reduction="none", kappa=kappa, backend=backend.backend)
    assert loss.isnan().nonzero().flatten().tolist() == wrong
    assert gradient.isnan().any(2).any(1).nonzero().flatten().tolist() == wrong
    assert not gradient[:, 1].any()


@every_setting
def test_a_nan_mean_is_the_largest(backend: Setting) -> None:
    """As in torch.argmax; std::max and a comparison drop it. -inf and inf in one row have no mean either."""
    arguments = make((3, 3, 4), seed=18)
    arguments["terminated"] = torch.zeros(3)
    arguments["next_quantiles"][0, 2, 1] = torch.nan
    arguments["next_quantiles"][1, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    loss = fused_quantile_loss(**arguments, reduction="none", backend=backend.backend)
    assert loss.isnan().tolist() == [True, True, False]


@every_setting
@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_infinite_targets(backend: Setting, kappa: float) -> None:
    """The loss is infinite, its slope is not: -tau below, 1 - tau above."""
    arguments = make((2, 1, 4), seed=19)
    arguments["terminated"] = torch.zeros(2)
    arguments["next_quantiles"] = torch.tensor([[[torch.inf]], [[-torch.inf]]])
    loss, gradient = fused_quantile_loss_and_grad(**arguments, reduction="none", kappa=kappa, backend=backend.backend)
    assert loss.tolist() == [torch.inf, torch.inf]
    taus = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(gradient[:, 0], torch.stack([-taus, 1 - taus]))


@every_setting
@pytest.mark.parametrize("kappa", [1e-300, 1e-30, 1e-6, 1e30, 1e300])
def test_extreme_kappa(backend: Setting, kappa: float) -> None:
    check(backend, {**make((5, 2, 4), 3, seed=20), "kappa": kappa})


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    _, A, K = x.shape
    return {
        "actions last": x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        "samples last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "slice": torch.cat([x, x], 2)[:, :, ::2].clone().copy_(x) if K == 1 else x.repeat_interleave(2, 2)[:, :, ::2],
        "offset": torch.cat([x[:1], x])[1:],
        "wider": torch.cat([x, x], 1)[:, :A],
    }


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["actions last", "samples last", "slice", "offset", "wider"])
def test_layouts(backend: Setting, layout: str, dtype: torch.dtype) -> None:
    arguments = make((9, 3, 35), 20, dtype, seed=21)
    g = source(22)
    arguments["next_quantiles_online"] = clear_winner(torch.randn((9, 3, 18), generator=g), g)
    arguments["taus"] = torch.rand((9, 35), generator=g)
    for name in ("quantiles", "next_quantiles", "next_quantiles_online"):
        arguments[name] = layouts(arguments[name])[layout]
    arguments["taus"] = arguments["taus"].t().contiguous().t()
    check(backend, arguments)


@every_setting
def test_expanded_quantiles_and_strided_samples(backend: Setting) -> None:
    arguments = make((6, 3, 5), 4, seed=23)
    for name in ("actions", "rewards", "terminated"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    arguments["quantiles"] = arguments["quantiles"][:1].expand(6, 3, 5)
    arguments["next_quantiles"] = arguments["next_quantiles"][:, :, :1].expand(6, 3, 4)
    check(backend, arguments)


@every_setting
def test_time_slices_of_one_sequence(backend: Setting) -> None:
    """(B, T + 1, A, K), of which q and next_q are the first and the last T: their leading dimensions do not merge."""
    g = source(24)
    sequence = clear_winner(torch.randn((12, 3, 5), generator=g), g).view(3, 4, 3, 5)
    arguments = make((3, 3, 3, 5), seed=24) | {"quantiles": sequence[:, :-1], "next_quantiles": sequence[:, 1:]}
    check(backend, arguments)


@every_setting
@pytest.mark.parametrize("name", ["next_quantiles", "next_quantiles_online", "rewards", "gamma", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dtypes_that_differ(backend: Setting, name: str, dtype: torch.dtype) -> None:
    arguments = make((6, 3, 5), 4, seed=25)
    g = source(26)
    arguments["next_quantiles_online"] = clear_winner(torch.randn((6, 3, 4), generator=g), g)
    arguments |= {"gamma": torch.rand(6, generator=g), "weights": torch.rand(6, generator=g)}
    arguments[name] = arguments[name].to(dtype)
    check(backend, arguments)


@every_setting
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_actions_of_any_integer_dtype(backend: Setting, dtype: torch.dtype) -> None:
    arguments = make((6, 3, 5), seed=27)
    check(backend, {**arguments, "actions": arguments["actions"].to(dtype)})


@every_setting
def test_columns_equal_vectors(backend: Setting) -> None:
    arguments = make((2, 3, 3, 5), seed=28) | {"weights": torch.rand(2, 3), "gamma": torch.rand(2, 3)}
    columns = {
        k: x.unsqueeze(-1) if k in ("actions", "rewards", "terminated", "weights", "gamma") else x
        for k, x in arguments.items()
    }
    for reduction in ("mean", "none"):
        a, b = (
            fused_quantile_loss_and_grad(**x, reduction=reduction, backend=backend.backend)
            for x in (arguments, columns)
        )
        assert all(map(torch.equal, a, b)), "the backend is given the same"


@every_setting
@pytest.mark.parametrize(("shape", "K2"), [((4, 18, 200), 200), ((32, 3, 32), 32)], ids=shape_id)
def test_errors_are_not_above_those_of_eager(backend: Setting, shape: tuple[int, ...], K2: int) -> None:
    check_against_eager(backend, make(shape, K2, seed=29))


@every_setting
@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_many_pairs_with_the_same_slope(backend: Setting, kappa: float) -> None:
    """Beyond kappa all have. The roundings of one long sum of equal terms do not cancel, those of random data do."""
    arguments = make((1, 1, 20), 4000, seed=31)
    arguments |= {"next_quantiles": arguments["next_quantiles"] + 100, "terminated": torch.zeros(1), "gamma": 1.0}
    check(backend, {**arguments, "kappa": kappa})


@every_setting
def test_the_same_bits_at_any_number_of_threads(backend: Setting) -> None:
    """A batch that is shared by threads, of one sample and of many."""
    threads = torch.get_num_threads()
    try:
        for shape in ((64, 6, 120), (1, 2, 1500)):
            arguments = make(shape, seed=30)
            results = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                x = arguments["quantiles"].clone().requires_grad_()
                loss, td = fused_quantile_loss(
                    **{**arguments, "quantiles": x}, return_td_error=True, backend=backend.backend
                )
                loss.backward()
                results.append((loss.detach(), td, x.grad))
            if backend.backend != "torch":  # whose sums are PyTorch's
                assert all(all(map(torch.equal, results[0], other)) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@every_setting
def test_identities(backend: Setting) -> None:
    """Permuted samples are permuted losses; equal networks make double DQN plain; weights of one are none."""
    arguments = make((10, 3, 6), dtype=torch.float64, seed=31)

    def run(**more: Any) -> Tensor:
        return fused_quantile_loss(**{**arguments, "reduction": "none", **more}, backend=backend.backend)

    loss = run()
    order = torch.randperm(10, generator=source(32))
    permuted = {k: x[order] for k, x in arguments.items()}
    assert_agree(run(**permuted), loss[order])
    assert_agree(run(next_quantiles_online=arguments["next_quantiles"]), loss)
    assert_agree(run(weights=torch.ones(10)), loss)
    assert_agree(run(next_action_mask=torch.ones(10, 3, dtype=torch.bool)), loss)
    assert_agree(run(quantile_reduction="mean") * 6, loss)


@every_setting
def test_the_discount_of_a_terminated_row_is_not_used(backend: Setting) -> None:
    """A kernel that reads nothing for such a row would still multiply the discount by zero."""
    arguments = make((5, 3, 4), 6, seed=97)
    arguments["terminated"] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    clean = arguments | {"gamma": torch.rand(5)}
    dirty = arguments | {"gamma": torch.where(arguments["terminated"] == 1, torch.nan, clean["gamma"])}
    results = []
    for given in (clean, dirty):
        on_device = {k: x.to(backend.device) for k, x in given.items()}
        results.append(fused_quantile_loss_and_grad(**on_device, return_td_error=True, backend=backend.backend))
    assert all(map(torch.equal, *results))
