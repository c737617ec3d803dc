"""Every error of the quantile loss, with its message; and nothing that broadcasts."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Setting
from quantile_data import every_setting, make
from torch import Tensor

import dqn_fused
from dqn_fused import BackendUnavailableError, FusedQuantileLoss, fused_quantile_loss, fused_quantile_loss_and_grad
from dqn_fused.quantile_reference import quantile_loss

n, A, K = 6, 4, 5
INT, BOOL = torch.int64, torch.bool


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


COMPACT = {"terminated": None, "non_final_mask": torch.arange(n) < 2}
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": (
        {"quantiles": zeros(5)},
        "quantiles: expected shape (*N, A, K) with at least one action and K > 0, got (5,)",
    ),
    "no action": (
        {"quantiles": zeros(n, 0, K)},
        "quantiles: expected shape (*N, A, K) with at least one action and K > 0, got (6, 0, 5)",
    ),
    "no quantile": (
        {"quantiles": zeros(n, A, 0)},
        "quantiles: expected shape (*N, A, K) with at least one action and K > 0, got (6, 4, 0)",
    ),
    "actions": ({"actions": zeros(1, n, dtype=INT)}, "actions: expected shape (6,) or (6, 1), got (1, 6)"),
    "rewards": ({"rewards": zeros(n, K)}, "rewards: expected shape (6,) or (6, 1), got (6, 5)"),
    "next, other actions": (
        {"next_quantiles": zeros(n, 3, K)},
        "next_quantiles: expected shape (6, 4, K) with K > 0, as quantiles, got (6, 3, 5)",
    ),
    "next, one row": (
        {"next_quantiles": zeros(1, A, K)},
        "next_quantiles: expected shape (6, 4, K) with K > 0, as quantiles, got (1, 4, 5)",
    ),
    "next, of the action": (
        {"next_quantiles": zeros(n, K)},
        "next_quantiles: expected shape (6, 4, K) with K > 0, as quantiles, got (6, 5)",
    ),
    "next, empty": (
        {"next_quantiles": zeros(n, A, 0)},
        "next_quantiles: expected shape (6, 4, K) with K > 0, as quantiles, got (6, 4, 0)",
    ),
    "next, compacted": (
        {**COMPACT, "next_quantiles": zeros(7, A, K)},
        "next_quantiles: expected shape (M, 4, K) with non_final_mask, M being the number of its true entries, at most "
        "6, got (7, 4, 5)",
    ),
    "next, compacted, other actions": (
        {**COMPACT, "next_quantiles": zeros(2, 3, K)},
        "next_quantiles: expected shape (2, 4, K) with K > 0, as quantiles, got (2, 3, 5)",
    ),
    "online": (
        {"next_quantiles_online": zeros(n, 3)},
        "next_quantiles_online: expected shape (6, 4), as next_quantiles, got (6, 3)",
    ),
    "online, quantiles": (
        {"next_quantiles_online": zeros(n, 3, K)},
        "next_quantiles_online: expected shape (6, 4, K) with K > 0, as next_quantiles, got (6, 3, 5)",
    ),
    "next mask": (
        {"next_action_mask": zeros(n, A, K, dtype=BOOL)},
        "next_action_mask: expected shape (6, 4), as next_quantiles, got (6, 4, 5)",
    ),
    "taus, targets'": (
        {"taus": zeros(7)},
        "taus: expected shape (5,) or (6, 5), a fraction for each of the quantiles, got (7,)",
    ),
    "taus, column": (
        {"taus": zeros(n, 1)},
        "taus: expected shape (5,) or (6, 5), a fraction for each of the quantiles, got (6, 1)",
    ),
    "taus, one row": (
        {"taus": zeros(1, K)},
        "taus: expected shape (5,) or (6, 5), a fraction for each of the quantiles, got (1, 5)",
    ),
    "weights": ({"weights": zeros(n, K)}, "weights: expected shape (6,) or (6, 1), got (6, 5)"),
    "gamma": ({"gamma": zeros(1)}, "gamma: expected shape (6,) or (6, 1), got (1,)"),
    "mask and terminated": (
        {"non_final_mask": zeros(n, dtype=BOOL)},
        "terminated: expected None beside non_final_mask, which says the same; give one of them",
    ),
    "kappa": ({"kappa": -1.0}, "kappa: expected a finite number of at least 0, got -1.0"),
    "kappa inf": ({"kappa": float("inf")}, "kappa: expected a finite number of at least 0, got inf"),
    "kappa nan": ({"kappa": float("nan")}, "kappa: expected a finite number of at least 0, got nan"),
    "quantile_reduction": (
        {"quantile_reduction": "none"},
        "quantile_reduction: expected one of 'sum', 'mean', got 'none'",
    ),
    "reduction": (
        {"reduction": "max"},
        "reduction: expected one of 'mean', 'sum', 'none', 'weighted_mean', got 'max'",
    ),
    "device": (
        {"taus": torch.zeros(K, device="meta")},
        "taus: expected device cpu, as quantiles, got meta",
    ),
    "device of next": (
        {"next_quantiles": torch.zeros(n, A, K, device="meta")},
        "next_quantiles: expected device cpu, as quantiles, got meta",
    ),
}  # fmt: skip
TYPE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "quantiles": ({"quantiles": zeros(n, A, K, dtype=INT)}, "quantiles: expected a floating dtype, got torch.int64"),
    "actions": ({"actions": zeros(n)}, "actions: expected an integer dtype, got torch.float32; actions.long() is one"),
    "next": ({"next_quantiles": None}, "next_quantiles: expected a torch.Tensor, got NoneType"),
    "next dtype": (
        {"next_quantiles": zeros(n, A, K, dtype=torch.complex64)},
        "next_quantiles: expected a floating dtype, got torch.complex64",
    ),
    "taus": ({"taus": 0.5}, "taus: expected a torch.Tensor, got float"),
    "taus dtype": ({"taus": zeros(K, dtype=INT)}, "taus: expected a floating dtype, got torch.int64"),
    "mask dtype": (
        {"next_action_mask": zeros(n, A)},
        "next_action_mask: expected the bool dtype, got torch.float32",
    ),
    "online": (
        {"next_quantiles_online": [1.0]},
        "next_quantiles_online: expected a torch.Tensor, got list; torch.tensor(next_quantiles_online) is one, "
        "torch.stack(next_quantiles_online) of tensors",
    ),
    "kappa": ({"kappa": torch.tensor(1.0)}, "kappa: expected a number, got Tensor"),
    "gamma": ({"gamma": "0.9"}, "gamma: expected a number or a torch.Tensor, got str"),
}


def broken(more: dict[str, Any]) -> dict[str, Any]:
    return {**make((n, A, K), seed=60), **more}


@every_setting
@pytest.mark.parametrize("function", [fused_quantile_loss, fused_quantile_loss_and_grad])
@pytest.mark.parametrize("name", ERRORS)
def test_values(backend: Setting, name: str, function: Any) -> None:
    more, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**broken(more), backend=backend.backend)


@every_setting
@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_types(backend: Setting, name: str) -> None:
    more, message = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fused_quantile_loss(**broken(more), backend=backend.backend)


@every_setting
def test_illegal_actions(backend: Setting) -> None:
    for action in (-1, A):
        arguments = broken({"actions": torch.tensor([0, 1, 2, action, 0, 0])})
        with pytest.raises(IndexError) as error:
            fused_quantile_loss(**arguments, backend=backend.backend)
        assert str(error.value) == f"actions: expected values in [0, 4), got {action} in row 3"


@every_setting
def test_a_mask_that_does_not_fit(backend: Setting) -> None:
    arguments = broken({**COMPACT, "next_quantiles": zeros(3, A, K)})
    with pytest.raises(IndexError) as error:
        fused_quantile_loss(**arguments, backend=backend.backend)
    assert str(error.value) == (
        "non_final_mask: expected as many true entries as next_quantiles has rows, 3, got 2 of 6"
    )


@pytest.mark.parametrize("name", ERRORS)
def test_the_reference_says_the_same(name: str) -> None:
    more, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantile_loss(**broken(more))


def test_the_reference_is_pytorch() -> None:
    with pytest.raises(ValueError, match="expected 'auto' or 'torch', got 'compiled'"):
        quantile_loss(**broken({}), backend="compiled")


def test_backends_by_name() -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'compiled', 'triton', 'torch', got 'numpy'"):
        fused_quantile_loss(**broken({}), backend="numpy")
    meta = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in broken({}).items()}
    with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot serve: it has no quantile loss for ten"):
        fused_quantile_loss(**meta, backend="triton")


def test_one_signature() -> None:
    """The function, the one with the gradient, the reference and the module have the same arguments and defaults."""

    def named(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
        found = inspect.signature(function).parameters
        return {k: v for k, v in found.items() if k != "self" and v.kind is not v.VAR_KEYWORD}

    parameters = named(fused_quantile_loss)
    for function in (fused_quantile_loss_and_grad, quantile_loss):
        assert named(function) == parameters
    module = named(FusedQuantileLoss) | named(FusedQuantileLoss.forward)
    assert module.keys() == parameters.keys()
    options = ("kappa", "quantile_reduction", "reduction", "return_td_error", "backend")
    assert all(module[name].default == parameters[name].default for name in options)
    assert "fused_quantile_loss" in dqn_fused.__all__
