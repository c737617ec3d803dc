"""Every error of the contract, with its message, on every setting; nothing broadcasts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Setting
from test_loss import compact, make

from dqn_fused import FusedDQNLoss, Munchausen, Soft, fused_dqn_loss, fused_td_loss
from dqn_fused.reference import dqn_loss

B, A = 6, 4
COMPLEX, FLOAT, INT, BOOL = torch.complex64, torch.float32, torch.int64, torch.bool


def zeros(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


MASK = torch.arange(B) < 2
COMPACTED = "next_q: expected shape (M, 4) with non_final_mask, M being the number of its true entries, at most 6, got"

SHAPE_ERRORS = {
    "q without actions": ({"q": zeros(B, 0)}, "q: expected shape (*N, A) with at least one action, got (6, 0)"),
    "q 0-d": ({"q": zeros()}, "q: expected shape (*N, A) with at least one action, got ()"),
    "actions long": ({"actions": zeros(7, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (7,)"),
    "actions row": ({"actions": zeros(1, B, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (1, 6)"),
    "actions one-hot": (
        {"actions": zeros(B, A, dtype=INT)},
        "actions: expected shape (6,) or (6, 1), got (6, 4); q is of all actions, not gathered, and one-hot actions "
        "are given as their argmax(-1)",
    ),
    "next_q of one action": (
        {"next_q": zeros(B)},
        "next_q: expected shape (6, 4), as q, got (6,); give the values of all actions: "
        "the choice among them is made here",
    ),
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
    "loss": ({"loss": "l1"}, "loss: expected one of 'mse', 'huber', 'smooth_l1', got 'l1'"),
    "reduction": (
        {"reduction": "max"},
        "reduction: expected one of 'mean', 'sum', 'none', 'weighted_mean', got 'max'",
    ),
    "online narrow": ({"next_q_online": zeros(B, 3)}, "next_q_online: expected shape (6, 4), as q, got (6, 3)"),
    "online 3-d": ({"next_q_online": zeros(2, 3, A)}, "next_q_online: expected shape (6, 4), as q, got (2, 3, 4)"),
    "online beside a mask": (
        {"non_final_mask": MASK, "terminated": None, "next_q": zeros(2, A), "next_q_online": zeros(B, A)},
        "next_q_online: expected shape (2, 4), as next_q, got (6, 4)",
    ),
    "online and soft": (
        {"next_q_online": zeros(B, A), "target": "soft"},
        "next_q_online: expected None with target 'soft': double DQN chooses one action, the soft value averages over "
        "all of them",
    ),
    "next mask narrow": (
        {"next_action_mask": zeros(B, 3, dtype=BOOL)},
        "next_action_mask: expected shape (6, 4), as q, got (6, 3)",
    ),
    "next mask of one row": (
        {"next_action_mask": zeros(A, dtype=BOOL)},
        "next_action_mask: expected shape (6, 4), as q, got (4,)",
    ),
    "next mask beside a mask": (
        {
            "non_final_mask": MASK,
            "terminated": None,
            "next_q": zeros(2, A),
            "next_action_mask": zeros(B, A, dtype=BOOL),
        },
        "next_action_mask: expected shape (2, 4), as next_q, got (6, 4)",
    ),
    "weights square": ({"weights": zeros(B, B)}, "weights: expected shape (6,) or (6, 1), got (6, 6)"),
    "weights 0-d": ({"weights": zeros()}, "weights: expected shape (6,) or (6, 1), got ()"),
    "weights row": ({"weights": zeros(1, B)}, "weights: expected shape (6,) or (6, 1), got (1, 6)"),
    "munchausen without target_q": (
        {"target": "munchausen"},
        "target_q: expected the target network's Q(s, .) with target 'munchausen', got None",
    ),
    "target_q narrow": (
        {"target": "munchausen", "target_q": zeros(B, 3)},
        "target_q: expected shape (6, 4), as q, got (6, 3)",
    ),
    "target_q without munchausen": (
        {"target_q": zeros(B, A)},
        "target_q: expected None with target 'max': only Munchausen reads it",
    ),
    "action_mask without a sum": (
        {"action_mask": zeros(B, A, dtype=BOOL)},
        "action_mask: expected None: without target='munchausen' or cql_alpha no sum over the actions of s is taken; "
        "legal actions of the next state are next_action_mask",
    ),
    "action_mask narrow": (
        {"action_mask": zeros(B, 3, dtype=BOOL), "cql_alpha": 1.0},
        "action_mask: expected shape (6, 4), as q, got (6, 3)",
    ),
    "target": ({"target": "double"}, "target: expected one of 'max', 'soft', 'munchausen', got 'double'"),
    "delta zero": ({"loss": "huber", "delta": 0.0}, "delta: expected a finite number above 0, got 0.0"),
    "delta below zero": ({"loss": "smooth_l1", "delta": -1}, "delta: expected a finite number above 0, got -1.0"),
    "delta infinite": ({"loss": "huber", "delta": math.inf}, "delta: expected a finite number above 0, got inf"),
    "delta nan": ({"loss": "huber", "delta": math.nan}, "delta: expected a finite number above 0, got nan"),
    "cql_alpha": ({"cql_alpha": math.nan}, "cql_alpha: expected a finite number, got nan"),
    "backend": ({"backend": "gpu"}, "backend: expected one of 'auto', "),
}
TYPE_ERRORS = {
    "q list": (
        {"q": [[1.0]]},
        "q: expected a torch.Tensor, got list; torch.tensor(q) is one, torch.stack(q) of tensors",
    ),
    "q bool": ({"q": zeros(B, A, dtype=BOOL)}, "q: expected a floating dtype, got torch.bool"),
    "q int": ({"q": zeros(B, A, dtype=INT)}, "q: expected a floating dtype, got torch.int64"),
    "q complex": ({"q": zeros(B, A, dtype=COMPLEX)}, "q: expected a floating dtype, got torch.complex64"),
    "actions float": (
        {"actions": zeros(B)},
        "actions: expected an integer dtype, got torch.float32; actions.long() is one",
    ),
    "actions bool": (
        {"actions": zeros(B, dtype=BOOL)},
        "actions: expected an integer dtype, got torch.bool; actions.long() is one",
    ),
    "actions numpy": (
        {"actions": zeros(B, dtype=INT).numpy()},
        "actions: expected a torch.Tensor, got ndarray; torch.from_numpy(actions) is one",
    ),
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
    "next_q missing": (
        {"next_q": None},
        "next_q: expected a torch.Tensor, got NoneType; for a ready target there is fused_td_loss",
    ),
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
    "online list": (
        {"next_q_online": [[1.0]]},
        "next_q_online: expected a torch.Tensor, got list; torch.tensor(next_q_online) is one, "
        "torch.stack(next_q_online) of tensors",
    ),
    "online int": (
        {"next_q_online": zeros(B, A, dtype=INT)},
        "next_q_online: expected a floating dtype, got torch.int64",
    ),
    "next mask float": (
        {"next_action_mask": zeros(B, A)},
        "next_action_mask: expected the bool dtype, got torch.float32",
    ),
    "next mask uint8": (
        {"next_action_mask": zeros(B, A, dtype=torch.uint8)},
        "next_action_mask: expected the bool dtype, got torch.uint8",
    ),
    "action_mask int": (
        {"action_mask": zeros(B, A, dtype=INT), "cql_alpha": 1.0},
        "action_mask: expected the bool dtype, got torch.int64",
    ),
    "weights int": ({"weights": zeros(B, dtype=INT)}, "weights: expected a floating dtype, got torch.int64"),
    "weights bool": ({"weights": zeros(B, dtype=BOOL)}, "weights: expected a floating dtype, got torch.bool"),
    "weights number": ({"weights": 1.0}, "weights: expected a torch.Tensor, got float"),
    "target_q bool": (
        {"target": "munchausen", "target_q": zeros(B, A, dtype=BOOL)},
        "target_q: expected a floating dtype, got torch.bool",
    ),
    "target number": ({"target": 0.5}, "target: expected a name, Soft or Munchausen, got float"),
    "target tensor": ({"target": zeros(B)}, "target: expected a name, Soft or Munchausen, got Tensor"),
    "delta tensor": ({"delta": zeros()}, "delta: expected a number, got Tensor"),
    "cql_alpha tensor": ({"cql_alpha": zeros()}, "cql_alpha: expected a number, got Tensor"),
    "sparse": ({"next_q": zeros(B, A).to_sparse()}, "next_q: expected a dense tensor, got layout torch.sparse_coo"),
}


def call(function: Any, changes: dict[str, Any], setting: Setting) -> Any:
    arguments = {**make((B, A)), "backend": setting.backend, **changes}
    return function(**{k: x.to(setting.device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()})


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_value_errors(setting: Setting, case: str) -> None:
    changes, message = SHAPE_ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(fused_dqn_loss, changes, setting)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_errors(setting: Setting, case: str) -> None:
    changes, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError) as error:
        call(fused_dqn_loss, changes, setting)
    assert str(error.value) == message


def test_the_reference_raises_the_same() -> None:
    setting = Setting("auto", "cpu")
    for case, (changes, message) in (SHAPE_ERRORS | TYPE_ERRORS).items():
        if case != "backend":
            with pytest.raises((ValueError, TypeError)) as error:
                call(dqn_loss, changes, setting)
            assert str(error.value) == message
    with pytest.raises(ValueError, match="the reference is PyTorch"):
        call(dqn_loss, {"backend": "triton"}, setting)


EVERY = [
    "actions", "rewards", "next_q", "terminated", "gamma", "non_final_mask",
    "next_q_online", "next_action_mask", "weights", "target_q", "action_mask",
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_another_device(setting: Setting, name: str) -> None:
    """meta is a device that exists everywhere."""
    arguments = make((B, A), device=setting.device)
    arguments["gamma"] = torch.rand(B, device=setting.device)
    if name in ("target_q", "action_mask"):
        arguments |= {"target": "munchausen", "target_q": zeros(B, A).to(setting.device)}
    if name not in arguments and name != "non_final_mask":
        shape, dtype = ((B,) if name == "weights" else (B, A)), (BOOL if "mask" in name else FLOAT)
        arguments[name] = zeros(*shape, dtype=dtype)
    if name == "non_final_mask":
        arguments = compact(arguments)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected device {setting.device}.*, as q, got meta"):
        fused_dqn_loss(**arguments, backend=setting.backend)


@pytest.mark.parametrize("action", [-1, A, 2**40, -(2**63)])
@pytest.mark.parametrize("shape", [(B, A), (2, 3, A)])
def test_action_out_of_range(
    setting: Setting, shape: tuple[int, ...], action: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """17179869185 has been seen in the wild: two int32 actions read as one int64."""
    monkeypatch.setenv("DQN_FUSED_CHECK", "1")
    arguments = make(shape, device=setting.device)
    arguments["actions"].view(-1)[4] = action
    row = "4" if len(shape) == 2 else r"\(1, 1\)"
    with pytest.raises(IndexError, match=rf"actions: expected values in \[0, 4\), got {action} in row {row}$"):
        fused_dqn_loss(**arguments, backend=setting.backend)


@pytest.mark.parametrize("count", [2, 4])
def test_mask_count(setting: Setting, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQN_FUSED_CHECK", "1")
    arguments = {**make((B, A)), "terminated": None, "non_final_mask": torch.arange(B) < count}
    message = f"non_final_mask: expected as many true entries as next_q has rows, 3, got {count} of 6"
    with pytest.raises(IndexError, match=message):
        call(fused_dqn_loss, {**arguments, "next_q": zeros(3, A)}, setting)


def test_the_first_illegal_action_is_named() -> None:
    arguments = make((B, A))
    arguments["actions"][[1, 3]] = torch.tensor([9, -9])
    with pytest.raises(IndexError, match=r"got 9 in row 1$"):
        fused_dqn_loss(**arguments)


def test_an_illegal_action_is_named_where_the_number_of_actions_does_not_fit_its_dtype() -> None:
    """300 as an int8 is 44: compared in that dtype, the legal action 50 of row 0 would be the one that is named."""
    arguments = make((2, 300)) | {"actions": torch.tensor([50, -3], dtype=torch.int8)}
    with pytest.raises(IndexError, match=r"got -3 in row 1$"):
        fused_dqn_loss(**arguments)


def test_wrong_choices_are_refused_by_the_module() -> None:
    with pytest.raises(ValueError, match="loss: expected one of"):
        FusedDQNLoss(loss="l3")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        FusedDQNLoss(reduction="product")
    with pytest.raises(ValueError, match="delta: expected"):
        FusedDQNLoss(loss="huber", delta=0.0)
    with pytest.raises(ValueError, match="target: expected one of"):
        FusedDQNLoss(target="double")
    with pytest.raises(TypeError, match="cql_alpha: expected a number"):
        FusedDQNLoss(cql_alpha="1")


@pytest.mark.parametrize("name", ["loss", "reduction", "value_transform"])
@pytest.mark.parametrize("wrong", [["mse"], None, torch.nn.functional.mse_loss], ids=["list", "none", "function"])
def test_a_choice_that_is_no_name_is_named(name: str, wrong: Any) -> None:
    """A list cannot be hashed, and was a TypeError that named no argument."""
    with pytest.raises(ValueError, match=f"{name}: expected one of"):
        fused_dqn_loss(**make((B, A)), **{name: wrong})


@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, math.nan])
def test_wrong_temperatures(wrong: float) -> None:
    for target in (Soft, Munchausen):
        with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
            target(wrong)


def test_wrong_constants_of_munchausen() -> None:
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        Munchausen(alpha=math.inf)
    for clip in (0.1, math.nan):
        with pytest.raises(ValueError, match="clip: expected a number of at most 0"):
            Munchausen(clip=clip)
    with pytest.raises(TypeError, match="temperature: expected a number, got str"):
        Soft("0.1")
    with pytest.raises(TypeError, match="alpha: expected a number, got Tensor"):
        Munchausen(alpha=zeros())


def test_the_target_of_fused_td_loss_is_named() -> None:
    """What it compares with is the user's target, not a reward."""
    with pytest.raises(ValueError, match=r"^target: expected shape \(6,\) or \(6, 1\), got \(6, 6\)$"):
        fused_td_loss(zeros(B, A), zeros(B, dtype=INT), zeros(B, B))
    with pytest.raises(TypeError, match=r"^target: expected a floating or integer dtype, got torch\.bool$"):
        fused_td_loss(zeros(B, A), zeros(B, dtype=INT), zeros(B, dtype=BOOL))
    with pytest.raises(ValueError, match=r"^action_mask: expected None"):
        fused_td_loss(zeros(B, A), zeros(B, dtype=INT), zeros(B), action_mask=zeros(B, A, dtype=BOOL))


def test_no_broadcast_is_ever_possible(setting: Setting) -> None:
    """(B,) against (B, 1) gives a (B, B) loss in eager code, with no more than a warning; here the two are equal."""
    arguments = make((B, A), device=setting.device)
    per_sample = fused_dqn_loss(**arguments, reduction="none", backend=setting.backend)
    for name in ("actions", "rewards", "terminated"):
        arguments[name] = arguments[name].unsqueeze(1)
    assert torch.equal(fused_dqn_loss(**arguments, reduction="none", backend=setting.backend), per_sample)
    assert per_sample.shape == (B,)
