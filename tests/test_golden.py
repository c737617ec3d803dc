"""Hand-worked and published values: the sources are named in golden/td_loss.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Setting

from dqn_fused import Munchausen, fused_dqn_loss
from dqn_fused.reference import dqn_loss

CASES = json.loads((Path(__file__).parent / "golden/td_loss.json").read_text())["cases"]


def arguments_of(inputs: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    A = len(inputs["q"][0])
    gamma = inputs["gamma"]
    arguments = {
        "q": torch.tensor(inputs["q"], dtype=dtype),
        "actions": torch.tensor(inputs["a"]),
        "rewards": torch.tensor(inputs["r"], dtype=dtype),
        "next_q": torch.tensor(inputs["nq"], dtype=dtype).view(-1, A),
        "gamma": torch.tensor(gamma, dtype=dtype) if isinstance(gamma, list) else gamma,
    }
    if "term" in inputs:
        arguments["terminated"] = torch.tensor(inputs["term"])
    for name, short in {"next_q_online": "online", "weights": "w", "target_q": "target_q"}.items():
        if short in inputs:
            arguments[name] = torch.tensor(inputs[short], dtype=dtype)
    arguments |= {name: inputs[name] for name in ("loss", "delta", "cql_alpha", "value_transform") if name in inputs}
    if "temperature" in inputs:
        arguments["target"] = Munchausen(inputs["temperature"], inputs["alpha"], inputs["clip_low"])
    if "non_final_mask" in inputs:
        arguments["non_final_mask"] = torch.tensor(inputs["non_final_mask"], dtype=torch.bool)
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}


def test_the_cases_are_all_there() -> None:
    assert len(CASES) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"].replace(" ", "_"))
def test_golden(setting: Setting, case: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = arguments_of(case["inputs"], dtype, setting.device)
    q = arguments["q"].requires_grad_()
    expected = {k: torch.tensor(v, dtype=dtype) for k, v in case["expected"].items()}
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 2e-6, "atol": 1e-6}

    loss, td_error = fused_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)
    (grad,) = torch.autograd.grad(loss, q)
    per_sample = fused_dqn_loss(**arguments, reduction="none", backend=setting.backend)
    torch.testing.assert_close(loss.cpu(), expected["mean_loss"], **close)
    torch.testing.assert_close(td_error.cpu(), expected["td_error"], **close)
    torch.testing.assert_close(per_sample.cpu(), expected["elementwise_loss"], **close)
    torch.testing.assert_close(grad.cpu(), expected["grad_q"], **close)
    check_published(case["published"], arguments, per_sample.detach().cpu(), td_error.cpu(), grad.cpu())


def check_published(
    published: dict[str, Any], arguments: dict[str, Any], per_sample: torch.Tensor, td: torch.Tensor, grad: torch.Tensor
) -> None:
    """The figures the sources print, in the sources' own terms."""
    taken = arguments["q"].detach().gather(1, arguments["actions"][:, None]).squeeze(1).cpu()
    n = len(td)
    ours = {
        "target": taken - td,
        "q_taken": taken,
        "grad_q": grad,
        "td_target_minus_q": -td,
        "half_squared": td.square() / 2,
        "minus_grad_of_half_squared_sum": -grad * n / 2,
        "elementwise_loss": per_sample,
        "unreduced_grad": grad[:, 0] * n,
        "grad_times_B": grad[:, 0] * n,
    }
    atol = published.get("tolerance", 1e-6)
    for name, value in published.items():
        if name != "tolerance":
            torch.testing.assert_close(ours[name], torch.tensor(value, dtype=td.dtype), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"].replace(" ", "_"))
def test_golden_for_the_reference(case: dict[str, Any]) -> None:
    arguments = arguments_of(case["inputs"], torch.float64, "cpu")
    q = arguments["q"].requires_grad_()
    loss, td_error = dqn_loss(**arguments, return_td_error=True)
    (grad,) = torch.autograd.grad(loss, q)
    expected = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["expected"].items()}
    torch.testing.assert_close(loss, expected["mean_loss"])
    torch.testing.assert_close(td_error, expected["td_error"])
    torch.testing.assert_close(grad, expected["grad_q"])
