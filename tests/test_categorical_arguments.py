"""Every error of the categorical losses, with its message; the modules."""

import math
from typing import Any

import pytest
import torch
from categorical_data import every_setting, make, ready
from conftest import Setting
from torch import Tensor

from dqn_fused import (
    BackendUnavailableError,
    FusedCategoricalLoss,
    FusedCategoricalTDLoss,
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
)
from dqn_fused.categorical_reference import categorical_loss, categorical_td_loss

N, A, K = 6, 4, 5
FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool


def zeros(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


MASK = torch.arange(N) < 2
ENDS = "support: expected v_min < v_max, both finite, got"
VALUE_ERRORS = {
    "logits without atoms": ({"logits": zeros(N, A, 0)}, "logits: expected shape (*N, A, K) with at least one action"),
    "logits of one atom": (
        {"logits": zeros(N, A, 1), "next_logits": zeros(N, A, 1)},
        "logits: expected at least two atoms, got (6, 4, 1)",
    ),
    "logits 1-d": ({"logits": zeros(K)}, "logits: expected shape (*N, A, K) with at least one action"),
    "actions long": ({"actions": zeros(7, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (7,)"),
    "rewards square": ({"rewards": zeros(N, N)}, "rewards: expected shape (6,) or (6, 1), got (6, 6)"),
    "rewards of each atom": ({"rewards": zeros(N, K)}, "rewards: expected shape (6,) or (6, 1), got (6, 5)"),
    "terminated": ({"terminated": zeros(N, A)}, "terminated: expected shape (6,) or (6, 1), got (6, 4)"),
    "gamma": ({"gamma": zeros(1)}, "gamma: expected shape (6,) or (6, 1), got (1,)"),
    "weights": ({"weights": zeros(1, N)}, "weights: expected shape (6,) or (6, 1), got (1, 6)"),
    "other atoms": ({"next_logits": zeros(N, A, 6)}, "next_logits: expected shape (6, 4, 5), as logits, got (6, 4, 6)"),
    "chosen already": ({"next_logits": zeros(N, K)}, "next_logits: expected shape (6, 4, 5), as logits, got (6, 5)"),
    "online": ({"next_logits_online": zeros(N, 3, K)}, "next_logits_online: expected shape (6, 4, 5), as next_logits"),
    "online values": ({"next_logits_online": zeros(N, 3)}, "next_logits_online: expected shape (6, 4), as next_logits"),
    "mask of atoms": (
        {"next_action_mask": zeros(N, A, K, dtype=BOOL)},
        "next_action_mask: expected shape (6, 4), as next_logits, got (6, 4, 5)",
    ),
    "mask and terminated": ({"non_final_mask": MASK}, "terminated: expected None beside non_final_mask"),
    "compacted": (
        {"non_final_mask": MASK, "terminated": None, "next_logits": zeros(7, A, K)},
        "next_logits: expected shape (M, 4, 5) with non_final_mask, M being the number of its true entries, at most 6",
    ),
    "reduction": ({"reduction": "max"}, "reduction: expected one of 'mean', 'sum', 'none', 'weighted_mean', got"),
    "backend": ({"backend": "c"}, "backend: expected one of 'auto', 'compiled', 'triton', 'torch', got 'c'"),
    "support the wrong way": ({"support": (1.0, -1.0)}, f"{ENDS} (1.0, -1.0)"),
    "support of nothing": ({"support": (1.0, 1.0)}, f"{ENDS} (1.0, 1.0)"),
    "support without an end": ({"support": (0, math.inf)}, f"{ENDS} (0.0, inf)"),
    "support NaN": ({"support": (math.nan, 1.0)}, f"{ENDS} (nan, 1.0)"),
    "support of one float32": (
        {"support": (1.0, 1.0 + 1e-12)},
        "support: expected 5 atoms that are finite and differ in torch.float32, got (1.0, 1.000000000001)",
    ),
    "support of one float32, atoms": (
        {"support": torch.linspace(1, 1 + 1e-12, K, dtype=torch.float64)},
        "support: expected 5 atoms that are finite and differ in torch.float32, got (1.0, 1.000000000001)",
    ),
    "support too wide": (
        {"support": (-3e38, 3e38)},
        "support: expected 5 atoms that are finite and differ in torch.float32, got (-3e+38, 3e+38)",
    ),
    "support too narrow to divide by": (
        {"support": (0.0, 1e-45)},
        "support: expected 5 atoms that are finite and differ in torch.float32, got (0.0, 1e-45)",
    ),
    "support of a number": (
        {"support": torch.tensor(1.0)},
        "support: expected two numbers or shape (5,), an atom for each logit, got ()",
    ),
    "support of no atoms": (
        {"support": zeros(0)},
        "support: expected two numbers or shape (5,), an atom for each logit, got (0,)",
    ),
    "support of other atoms": (
        {"support": zeros(6)},
        "support: expected two numbers or shape (5,), an atom for each logit, got (6,)",
    ),
    "support for each": (
        {"support": zeros(N, K)},
        "support: expected two numbers or shape (5,), an atom for each logit, got (6, 5)",
    ),
    "support uneven": (
        {"support": torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])},
        "support: expected atoms that increase by the same step, got [0.0, 1.0, 2.0, 4.0, 8.0]",
    ),
    "support falling": (
        {"support": torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])},
        "support: expected atoms that increase by the same step, got [2.0, 1.0, 0.0, -1.0, -2.0]",
    ),
    "support with NaN": (
        {"support": torch.tensor([0.0, 1.0, math.nan, 3.0, 4.0])},
        "support: expected atoms that increase by the same step, got [0.0, 1.0, nan, 3.0, 4.0]",
    ),
}  # fmt: skip
TYPE_ERRORS = {
    "logits": ({"logits": zeros(N, A, K, dtype=INT)}, "logits: expected a floating dtype, got torch.int64"),
    "no next_logits": (
        {"next_logits": None},
        "next_logits: expected a torch.Tensor, got NoneType; for a ready target there is fused_categorical_td_loss",
    ),
    "next_logits": ({"next_logits": zeros(N, A, K, dtype=INT)}, "next_logits: expected a floating dtype"),
    "actions": ({"actions": zeros(N)}, "actions: expected an integer dtype, got torch.float32; actions.long() is one"),
    "support of one number": ({"support": 1.0}, "support: expected (v_min, v_max) or a torch.Tensor of evenly spaced"),
    "support of three": ({"support": (0, 1, 2)}, "support: expected (v_min, v_max) or a torch.Tensor of evenly spaced"),
    "support of words": ({"support": ("0", "1")}, "support: expected two numbers, got str"),
    "support of integers": (
        {"support": torch.arange(5)},
        "support: expected a floating dtype, got torch.int64",
    ),
    "mask": ({"next_action_mask": zeros(N, A)}, "next_action_mask: expected the bool dtype, got torch.float32"),
}


@every_setting
@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_errors(backend: Setting, case: str) -> None:
    changed, message = VALUE_ERRORS[case]
    for function in (fused_categorical_loss, fused_categorical_loss_and_grad):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            function(**{"backend": backend.backend, **make((N, A, K)), **changed})
        assert str(error.value).startswith(message)
    if "backend" not in changed:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            categorical_loss(**{**make((N, A, K)), **changed})
        assert str(error.value).startswith(message)


@every_setting
@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_errors(backend: Setting, case: str) -> None:
    changed, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError) as error:
        fused_categorical_loss(**{**make((N, A, K)), **changed}, backend=backend.backend)
    assert str(error.value).startswith(message)


READY_ERRORS = {
    "target": ({"target": zeros(N, K)}, "target: expected shape (6,) or (6, 1), got (6, 5)"),
    "projection": ({"projection": "gauss"}, "projection: expected one of 'two_hot', 'hl_gauss', got 'gauss'"),
    "sigma of nothing": (
        {"sigma": 0.75},
        "sigma: expected None with projection 'two_hot': only 'hl_gauss' has a width",
    ),
    "sigma 0": ({"projection": "hl_gauss", "sigma": 0}, "sigma: expected a finite number above 0, got 0.0"),
    "sigma NaN": ({"projection": "hl_gauss", "sigma": math.nan}, "sigma: expected a finite number above 0, got nan"),
}


@every_setting
@pytest.mark.parametrize("case", READY_ERRORS)
def test_errors_of_a_ready_target(backend: Setting, case: str) -> None:
    changed, message = READY_ERRORS[case]
    for function in (fused_categorical_td_loss, categorical_td_loss):
        name = {"backend": backend.backend} if function is fused_categorical_td_loss else {}
        with pytest.raises(ValueError) as error:  # noqa: PT011
            function(**{**ready((N, A, K)), **changed}, **name)
        assert str(error.value).startswith(message)
    with pytest.raises(TypeError, match="sigma: expected a number, got Tensor"):
        fused_categorical_td_loss(**ready((N, A, K)), projection="hl_gauss", sigma=torch.tensor(1.0))


@every_setting
def test_index_errors(backend: Setting) -> None:
    for action, function in ((A, fused_categorical_loss), (-1, fused_categorical_loss_and_grad)):
        arguments = make((2, 3, A, K))
        arguments["actions"][1, 2] = action
        message = rf"actions: expected values in \[0, 4\), got {action} in row \(1, 2\)"
        with pytest.raises(IndexError, match=message):
            function(**arguments, backend=backend.backend)
    arguments = make((N, A, K)) | {"terminated": None, "non_final_mask": MASK, "next_logits": zeros(3, A, K)}
    with pytest.raises(IndexError, match=r"non_final_mask: expected as many true entries as next_logits has rows, 3"):
        fused_categorical_loss(**arguments, backend=backend.backend)


@every_setting
def test_a_narrow_support_in_float64(backend: Setting) -> None:
    """What is one number in float32 has atoms in float64."""
    arguments = make((N, A, K), torch.float64) | {"support": (1.0, 1.0 + 1e-12), "rewards": torch.zeros(N)}
    assert fused_categorical_loss(**arguments, backend=backend.backend).isfinite()


def test_a_support_that_was_even_is_looked_at_again_once_it_changes() -> None:
    support = torch.linspace(-1, 1, K)
    arguments = make((N, A, K)) | {"support": support}
    for _ in range(2):
        fused_categorical_loss(**arguments)
    support[2] = 0.25
    with pytest.raises(ValueError, match="support: expected atoms that increase by the same step"):
        fused_categorical_loss(**arguments)
    with torch.inference_mode():
        support = torch.linspace(-1, 1, K)
        fused_categorical_loss(**{**arguments, "support": support})
        support[2] = 0.25
        with pytest.raises(ValueError, match="support: expected atoms that increase by the same step"):
            fused_categorical_loss(**{**arguments, "support": support})


def test_a_backend_says_that_it_has_none() -> None:
    meta = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in make((N, A, K)).items()}
    message = r"backend 'triton' cannot serve: it has no categorical loss for tensors on meta"
    with pytest.raises(BackendUnavailableError, match=message):
        fused_categorical_loss(**meta, backend="triton")


@pytest.mark.parametrize("support", [(-5.0, 10.0), torch.linspace(-5, 10, K)], ids=["ends", "atoms"])
def test_modules_are_the_functions(support: Any) -> None:
    arguments = make((N, A, K)) | {"support": support, "gamma": 0.9, "weights": torch.rand(N)}
    criterion = FusedCategoricalLoss(support, 0.9, reduction="none", return_td_error=True)
    given = {k: x for k, x in arguments.items() if k not in ("support", "gamma")}
    expected = fused_categorical_loss(**arguments, reduction="none", return_td_error=True)
    assert all(torch.equal(a, b) for a, b in zip(criterion(**given), expected, strict=True))
    other = criterion(**given, gamma=torch.zeros(N))
    expected = fused_categorical_loss(**{**arguments, "gamma": 0.0}, reduction="none", return_td_error=True)
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))

    arguments = ready((N, A, K)) | {"support": support}
    given = {k: x for k, x in arguments.items() if k != "support"}
    wanted = {"projection": "hl_gauss", "sigma": 1.5, "reduction": "sum", "return_expectation": True}
    found = FusedCategoricalTDLoss(support, **wanted)(**given)
    expected = fused_categorical_td_loss(**arguments, **wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_modules_move_and_refuse() -> None:
    criterion = FusedCategoricalLoss(torch.linspace(0, 1, K), torch.tensor(0.5)).double()
    assert [x.dtype for x in criterion.buffers()] == [torch.float64] * 2
    assert repr(criterion) == "FusedCategoricalLoss(support=5 atoms from 0 to 1, gamma=0.5, reduction='mean')"
    criterion(**{k: x for k, x in make((N, A, K), torch.float64).items() if k != "support"})
    with pytest.raises(ValueError, match="support: expected atoms that increase by the same step"):
        FusedCategoricalLoss(torch.tensor([0.0, 1.0, 3.0]))
    with pytest.raises(ValueError, match=r"support: expected two numbers or shape \(K,\), an atom for each"):
        FusedCategoricalLoss(torch.tensor(1.0))
    with pytest.raises(ValueError, match="sigma: expected None"):
        FusedCategoricalTDLoss((0.0, 1.0), sigma=1.0)
