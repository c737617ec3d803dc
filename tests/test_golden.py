"""Hand-worked and published values: the sources are named in golden/td_loss.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import assert_agree, assert_close
from conftest import Setting
from oracle import oracle

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
    """In float64 the values themselves; in float32, to which the inputs are rounded, those of the oracle."""
    arguments = arguments_of(case["inputs"], dtype, setting.device)
    q = arguments["q"].requires_grad_()

    loss, td_error = fused_dqn_loss(**arguments, return_td_error=True, backend=setting.backend)
    (grad,) = torch.autograd.grad(loss, q)
    per_sample = fused_dqn_loss(**arguments, reduction="none", backend=setting.backend)
    found = [x.detach().cpu() for x in (loss, td_error, per_sample, grad)]
    if dtype is torch.float64:
        expected = {k: torch.tensor(v, dtype=dtype) for k, v in case["expected"].items()}
        assert_agree(found, [expected[name] for name in ("mean_loss", "td_error", "elementwise_loss", "grad_q")])
        check_published(case["published"], arguments, *found[1:])
    exact, each = oracle(**arguments), oracle(**arguments, reduction="none").loss
    for name, x, known in zip(
        ("loss", "td_error", "loss of each", "grad_q"),
        found,
        (exact.loss, exact.td_error, each, exact.grad_q),
        strict=True,
    ):
        assert_close(name, x, known)


def check_published(
    published: dict[str, Any], arguments: dict[str, Any], td: torch.Tensor, per_sample: torch.Tensor, grad: torch.Tensor
) -> None:
    """The figures the sources print, in the sources' own terms, to as many digits."""
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
    assert_agree((loss.detach(), td_error, grad), [expected[name] for name in ("mean_loss", "td_error", "grad_q")])
