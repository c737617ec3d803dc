"""Several target networks: the minimum or the mean of each action counts, on every backend and with every option."""

from typing import Any

import numpy as np
import pytest
import torch
from bounds import Arithmetic, assert_agree, assert_close
from conftest import Setting
from data import source
from oracle import oracle
from test_family import compacted, on, variant
from test_loss import shape_id
from torch import Tensor

from dqn_fused import FusedDQNLoss, fused_dqn_loss, fused_dqn_loss_and_grad, fused_linear_dqn_loss
from dqn_fused.arguments import accumulation_dtype
from dqn_fused.reference import dqn_loss

ENSEMBLES = pytest.mark.parametrize("ensemble", ["min", "mean"])
NAMES = ["mask", "double-mask-weights-huber", "soft-mask", "munchausen-cql-masks-weights-huber", "transform"]


def networks(name: str, shape: tuple[int, ...], count: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = source(7)
    arguments = variant(name, shape, dtype)
    more = [torch.randn(shape, generator=g).to(dtype) for _ in range(count - 1)]
    return arguments | {"next_q": [arguments["next_q"], *more]}


def combined(next_q: list[Tensor], ensemble: str) -> Tensor:
    """By the definition, in float64."""
    stacked = np.stack([x.double().numpy() for x in next_q])
    return torch.from_numpy(stacked.min(0) if ensemble == "min" else stacked.mean(0))


def errors(arguments: dict[str, Any], ensemble: str) -> dict[str, np.ndarray]:
    """Of the mean: as many roundings as networks, of sums of their absolute values."""
    if ensemble == "min":
        return {}
    stacked = np.stack([np.abs(x.double().numpy()) for x in arguments["next_q"]])
    unit = Arithmetic(accumulation_dtype(arguments["q"])).unit
    return {"next_q": unit * (len(stacked) + 1) * stacked.mean(0)}


def assert_right(setting: Setting, arguments: dict[str, Any], ensemble: str) -> None:
    one = {**arguments, "next_q": combined(arguments["next_q"], ensemble)}
    expected = oracle(**one, errors=errors(arguments, ensemble))
    given = on(setting, {k: x for k, x in arguments.items() if k != "next_q"})
    q = given["q"].requires_grad_()
    next_q = tuple(x.to(setting.device) for x in arguments["next_q"])
    loss, td_error = fused_dqn_loss(
        **given, next_q=next_q, ensemble=ensemble, return_td_error=True, backend=setting.backend
    )
    (grad,) = torch.autograd.grad(loss, q)
    for name, got in (("loss", loss), ("td_error", td_error), ("grad_q", grad)):
        assert_close(name, got, getattr(expected, name))
    both = fused_dqn_loss_and_grad(**given, next_q=list(next_q), ensemble=ensemble, backend=setting.backend)
    assert_close("loss", both[0], expected.loss)
    assert_close("grad_q", both[1], expected.grad_q)


@ENSEMBLES
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5), (3, 130), (0, 4)], ids=shape_id)
@pytest.mark.parametrize("name", NAMES)
def test_ensembles(setting: Setting, name: str, shape: tuple[int, ...], ensemble: str) -> None:
    assert_right(setting, networks(name, shape), ensemble)


@ENSEMBLES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(setting: Setting, dtype: torch.dtype, ensemble: str) -> None:
    """The mean of half precision is not rounded to it."""
    arguments = networks("double-mask", (9, 5), dtype=dtype)
    assert_right(setting, arguments, ensemble)
    arguments["next_q"][1] = arguments["next_q"][1].float()
    assert_right(setting, arguments, ensemble)


@ENSEMBLES
def test_non_final_mask(setting: Setting, ensemble: str) -> None:
    arguments = networks("double-mask", (9, 5))
    rows = ~arguments["terminated"]
    next_q = [x[rows] for x in arguments["next_q"]]
    assert_right(setting, compacted({**arguments, "next_q": arguments["next_q"][0]}) | {"next_q": next_q}, ensemble)


def test_nan_of_any_network_is_nan_unless_it_is_not_read(setting: Setting) -> None:
    arguments = networks("mask", (4, 3))
    arguments["terminated"] = torch.tensor([False, False, True, False])
    arguments["next_action_mask"][:] = True
    arguments["next_action_mask"][1, 2] = False
    for network in range(3):
        changed = [x.clone() for x in arguments["next_q"]]
        for row in (0, 1, 2):
            changed[network][row, 2] = torch.nan
        given = on(setting, arguments) | {"next_q": [x.to(setting.device) for x in changed]}
        for ensemble in ("min", "mean"):
            losses = fused_dqn_loss(**given, ensemble=ensemble, reduction="none", backend=setting.backend)
            assert losses.isnan().tolist() == [True, False, False, False]


def test_one_network_is_itself() -> None:
    arguments = networks("double", (5, 4), count=1, dtype=torch.float64)
    expected = fused_dqn_loss(**{**arguments, "next_q": arguments["next_q"][0]})
    for ensemble in ("min", "mean"):
        for call in (fused_dqn_loss, dqn_loss):
            assert_agree(call(**arguments, ensemble=ensemble), expected)
        assert_agree(FusedDQNLoss(ensemble=ensemble)(**arguments), expected)


def test_no_network_receives_a_gradient() -> None:
    arguments = networks("double", (5, 4))
    arguments["q"].requires_grad_()
    for x in arguments["next_q"]:
        x.requires_grad_()
    for call in (fused_dqn_loss, dqn_loss):
        call(**arguments).backward()
        assert all(x.grad is None for x in arguments["next_q"])
    arguments["q"] = arguments["q"].detach()
    with pytest.warns(UserWarning, match="are they swapped"):
        fused_dqn_loss(**arguments)


ERRORS = {
    "none": ({"next_q": []}, ValueError, "next_q: expected the Q-values of at least one target network, got none"),
    "shapes": (
        {"next_q": [torch.zeros(5, 4), torch.zeros(5, 3)]},
        ValueError,
        "next_q[1]: expected shape (5, 4), as next_q[0], got (5, 3)",
    ),
    "of another shape than q": (
        {"next_q": [torch.zeros(5, 3), torch.zeros(5, 3)]},
        ValueError,
        "next_q: expected shape (5, 4), as q, got (5, 3)",
    ),
    "dtype": (
        {"next_q": [torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.int64)]},
        TypeError,
        "next_q[1]: expected a floating dtype, got torch.int64",
    ),
    "no tensor": (
        {"next_q": [torch.zeros(5, 4), np.zeros((5, 4))]},
        TypeError,
        "next_q[1]: expected a torch.Tensor, got ndarray; torch.from_numpy(next_q[1]) is one",
    ),
    "devices": (
        {"next_q": [torch.zeros(5, 4), torch.zeros(5, 4, device="meta")]},
        ValueError,
        "next_q[1]: expected device cpu, as next_q[0], got meta",
    ),
    "name": (
        {"next_q": [torch.zeros(5, 4)], "ensemble": "max"},
        ValueError,
        "ensemble: expected one of 'min', 'mean', got 'max'",
    ),
    "mean of one": (
        {"ensemble": "mean"},
        ValueError,
        "ensemble: expected 'min' with one next_q, got 'mean'; several target networks are given as a list",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    changed, kind, message = ERRORS[case]
    arguments = variant("double", (5, 4)) | changed
    for call in (fused_dqn_loss, fused_dqn_loss_and_grad, dqn_loss, FusedDQNLoss()):
        if call.__class__ is FusedDQNLoss and "ensemble" in changed:
            continue
        with pytest.raises(kind) as error:
            call(**arguments)
        assert str(error.value) == message


def test_the_linear_head_has_one_target_network() -> None:
    hidden, weight = torch.zeros(5, 3), torch.zeros(4, 3)
    batch = (torch.zeros(5, dtype=torch.int64), torch.zeros(5))
    message = "next_hidden: expected a torch.Tensor, got list; only fused_dqn_loss takes several target networks"
    with pytest.raises(TypeError, match=message):
        fused_linear_dqn_loss(hidden, weight, *batch, [hidden, hidden], weight)  # type: ignore[arg-type]


def test_in_a_graph() -> None:
    torch.compiler.reset()
    arguments = networks("double-mask", (5, 4), dtype=torch.float64)

    def loss(next_q: list[Tensor], ensemble: str) -> Any:
        return fused_dqn_loss(**{**arguments, "next_q": next_q}, ensemble=ensemble)

    for ensemble in ("min", "mean"):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert_agree(compiled(arguments["next_q"], ensemble), loss(arguments["next_q"], ensemble))
