"""Every error the contract names, with its message, on every road; and nothing that broadcasts."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Road
from test_loss import compact, make

from dqn_fused import FusedDQNLoss, fused_dqn_loss
from dqn_fused.reference import dqn_loss

B, A = 6, 4
COMPLEX, FLOAT, INT, BOOL = torch.complex64, torch.float32, torch.int64, torch.bool


def zeros(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


COMPACTED = "next_q: expected shape (M, 4) with non_final_mask, M being the number of its true entries, at most 6, got"

SHAPE_ERRORS = {
    "q without actions": ({"q": zeros(B, 0)}, "q: expected shape (*N, A) with at least one action, got (6, 0)"),
    "q 0-d": ({"q": zeros()}, "q: expected shape (*N, A) with at least one action, got ()"),
    "actions long": ({"actions": zeros(7, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (7,)"),
    "actions row": ({"actions": zeros(1, B, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (1, 6)"),
    "actions one-hot": ({"actions": zeros(B, A, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (6, 4)"),
    "actions one for all": ({"actions": zeros(1, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (1,)"),
    "actions 0-d": ({"actions": zeros(dtype=INT)}, "actions: expected shape (6,) or (6, 1), got ()"),
    "rewards square": ({"rewards": zeros(B, B)}, "rewards: expected shape (6,) or (6, 1), got (6, 6)"),
    "rewards 0-d": ({"rewards": zeros()}, "rewards: expected shape (6,) or (6, 1), got ()"),
    "rewards 3-d": ({"rewards": zeros(B, 1, 1)}, "rewards: expected shape (6,) or (6, 1), got (6, 1, 1)"),
    "next_q narrow": ({"next_q": zeros(B, 3)}, "next_q: expected shape (6, 4), as q, got (6, 3)"),
    "next_q one row": ({"next_q": zeros(1, A)}, "next_q: expected shape (6, 4), as q, got (1, 4)"),
    "terminated": ({"terminated": zeros(5)}, "terminated: expected shape (6,) or (6, 1), got (5,)"),
    "gamma": ({"gamma": zeros(5)}, "gamma: expected shape (6,) or (6, 1), got (5,)"),
    "gamma one": ({"gamma": zeros(1)}, "gamma: expected shape (6,) or (6, 1), got (1,)"),
    "mask and terminated": (
        {"non_final_mask": zeros(B, dtype=BOOL)},
        "terminated: expected None beside non_final_mask, which says the same; give one of them",
    ),
    "mask shape": (
        {"non_final_mask": zeros(5, dtype=BOOL), "terminated": None},
        "non_final_mask: expected shape (6,) or (6, 1), got (5,)",
    ),
    "compacted next_q too long": (
        {"non_final_mask": zeros(B, dtype=BOOL), "terminated": None, "next_q": zeros(7, A)},
        f"{COMPACTED} (7, 4)",
    ),
    "compacted next_q 3-d": (
        {"non_final_mask": zeros(B, dtype=BOOL), "terminated": None, "next_q": zeros(1, 2, A)},
        f"{COMPACTED} (1, 2, 4)",
    ),
    "loss": ({"loss": "l1"}, "loss: expected one of 'mse', got 'l1'"),
    "reduction": ({"reduction": "max"}, "reduction: expected one of 'mean', 'sum', 'none', got 'max'"),
    "backend": ({"backend": "gpu"}, "backend: expected one of 'auto', "),
}
TYPE_ERRORS = {
    "q list": ({"q": [[1.0]]}, "q: expected a torch.Tensor, got list"),
    "q bool": ({"q": zeros(B, A, dtype=BOOL)}, "q: expected a floating dtype, got torch.bool"),
    "q int": ({"q": zeros(B, A, dtype=INT)}, "q: expected a floating dtype, got torch.int64"),
    "q complex": ({"q": zeros(B, A, dtype=COMPLEX)}, "q: expected a floating dtype, got torch.complex64"),
    "actions float": ({"actions": zeros(B)}, "actions: expected an integer dtype, got torch.float32"),
    "actions bool": ({"actions": zeros(B, dtype=BOOL)}, "actions: expected an integer dtype, got torch.bool"),
    "actions numpy": ({"actions": zeros(B, dtype=INT).numpy()}, "actions: expected a torch.Tensor, got ndarray"),
    "rewards bool": (
        {"rewards": zeros(B, dtype=BOOL)},
        "rewards: expected a floating or integer dtype, got torch.bool",
    ),
    "rewards complex": (
        {"rewards": zeros(B, dtype=COMPLEX)},
        "rewards: expected a floating or integer dtype, got torch.complex64",
    ),
    "rewards number": ({"rewards": 1.0}, "rewards: expected a torch.Tensor, got float"),
    "next_q int": ({"next_q": zeros(B, A, dtype=INT)}, "next_q: expected a floating dtype, got torch.int64"),
    "terminated complex": (
        {"terminated": zeros(B, dtype=COMPLEX)},
        "terminated: expected a bool, integer or floating dtype, got torch.complex64",
    ),
    "gamma text": ({"gamma": "0.9"}, "gamma: expected a number or a torch.Tensor, got str"),
    "gamma array": ({"gamma": np.array(0.9)}, "gamma: expected a number or a torch.Tensor, got ndarray"),
    "gamma int": ({"gamma": zeros(B, dtype=INT)}, "gamma: expected a floating dtype, got torch.int64"),
    "mask int": (
        {"non_final_mask": zeros(B, dtype=INT), "terminated": None},
        "non_final_mask: expected the bool dtype, got torch.int64",
    ),
    "sparse": ({"next_q": zeros(B, A).to_sparse()}, "next_q: expected a dense tensor, got layout torch.sparse_coo"),
}


def call(function: Any, changes: dict[str, Any], road: Road) -> Any:
    arguments = {**make((B, A)), "backend": road.backend, **changes}
    return function(**{k: x.to(road.device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()})


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_value_errors(road: Road, case: str) -> None:
    changes, message = SHAPE_ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(fused_dqn_loss, changes, road)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_errors(road: Road, case: str) -> None:
    changes, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError) as error:
        call(fused_dqn_loss, changes, road)
    assert str(error.value) == message


def test_the_reference_raises_the_same() -> None:
    road = Road("auto", "cpu")
    for case, (changes, message) in (SHAPE_ERRORS | TYPE_ERRORS).items():
        if case != "backend":
            with pytest.raises((ValueError, TypeError)) as error:
                call(dqn_loss, changes, road)
            assert str(error.value) == message
    with pytest.raises(ValueError, match="the reference is PyTorch"):
        call(dqn_loss, {"backend": "triton"}, road)


@pytest.mark.parametrize("name", ["actions", "rewards", "next_q", "terminated", "gamma", "non_final_mask"])
def test_another_device(road: Road, name: str) -> None:
    """meta is a device that exists everywhere."""
    arguments = make((B, A), device=road.device)
    arguments["gamma"] = torch.rand(B, device=road.device)
    if name == "non_final_mask":
        arguments = compact(arguments)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected device {road.device}.*, as q, got meta"):
        fused_dqn_loss(**arguments, backend=road.backend)


@pytest.mark.parametrize("action", [-1, A, 2**40, -(2**63)])
@pytest.mark.parametrize("shape", [(B, A), (2, 3, A)])
def test_action_out_of_range(road: Road, shape: tuple[int, ...], action: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """17179869185 has been seen in the wild: two int32 actions read as one int64."""
    monkeypatch.setenv("DQN_FUSED_CHECK", "1")
    arguments = make(shape, device=road.device)
    arguments["actions"].view(-1)[4] = action
    row = "4" if len(shape) == 2 else r"\(1, 1\)"
    with pytest.raises(IndexError, match=rf"actions: expected values in \[0, 4\), got {action} in row {row}$"):
        fused_dqn_loss(**arguments, backend=road.backend)


@pytest.mark.parametrize("count", [2, 4])
def test_mask_count(road: Road, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQN_FUSED_CHECK", "1")
    arguments = {**make((B, A)), "terminated": None, "non_final_mask": torch.arange(B) < count}
    message = f"non_final_mask: expected as many true entries as next_q has rows, 3, got {count} of 6"
    with pytest.raises(IndexError, match=message):
        call(fused_dqn_loss, {**arguments, "next_q": zeros(3, A)}, road)


def test_the_first_illegal_action_is_named() -> None:
    arguments = make((B, A))
    arguments["actions"][[1, 3]] = torch.tensor([9, -9])
    with pytest.raises(IndexError, match=r"got 9 in row 1$"):
        fused_dqn_loss(**arguments)


def test_wrong_choices_are_refused_by_the_module() -> None:
    with pytest.raises(ValueError, match="loss: expected one of"):
        FusedDQNLoss(loss="l3")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        FusedDQNLoss(reduction="product")


def test_no_broadcast_is_ever_possible(road: Road) -> None:
    """(B,) against (B, 1) gives a (B, B) loss in eager code, with no more than a warning; here the two are equal."""
    arguments = make((B, A), device=road.device)
    per_sample = fused_dqn_loss(**arguments, reduction="none", backend=road.backend)
    for name in ("actions", "rewards", "terminated"):
        arguments[name] = arguments[name].unsqueeze(1)
    assert torch.equal(fused_dqn_loss(**arguments, reduction="none", backend=road.backend), per_sample)
    assert per_sample.shape == (B,)
