"""Hypothesis: any shape, dtype and form against the oracle; any broken input is an error that names its argument."""

from typing import Any

import pytest
import torch
from conftest import INTERPRETED, Setting
from data import source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_family import OPTIONS, compacted
from test_loss import LAYOUTS, REDUCTIONS, check, compact, make, same_oracle

from dqn_fused import fused_dqn_loss

FEW = settings(
    max_examples=20 if INTERPRETED else 60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 4), st.integers(60, 600)),
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 20)),
)


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    shape = draw(shapes)
    arguments = make(
        shape, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), seed=draw(st.integers(0, 99))
    )
    N = shape[:-1]
    if draw(st.booleans()):
        arguments["actions"] = arguments["actions"].to(draw(st.sampled_from([torch.int32, torch.int16])))
    if draw(st.booleans()):
        arguments["terminated"] = arguments["terminated"].to(draw(st.sampled_from([torch.float32, torch.uint8])))
    arguments["gamma"] = draw(st.sampled_from([0.0, 0.99, 1, torch.tensor(0.5), torch.full(N, 0.25)]))
    for name in ("actions", "rewards", "terminated"):
        if draw(st.booleans()):
            arguments[name] = arguments[name].unsqueeze(-1)
    if len(shape) == 2:
        for name in ("q", "next_q"):
            layout = draw(st.sampled_from([None, *LAYOUTS]))
            if layout:
                arguments[name] = LAYOUTS[layout](arguments[name])
    return arguments


@FEW
@given(arguments=batches(), reduction=st.sampled_from(REDUCTIONS))
def test_any_batch(setting: Setting, arguments: dict[str, Any], reduction: str) -> None:
    check(setting, arguments, reduction)


@st.composite
def families(draw: Any) -> dict[str, Any]:
    """Any combination of the options, for any shape and dtype, some matrices with strides of their own."""
    seed = draw(st.integers(0, 99))
    arguments = make(draw(shapes), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), seed=seed)
    g = source(seed)
    for choices in OPTIONS:
        for part in draw(st.sampled_from(choices)):
            arguments |= part(arguments, g)
    if draw(st.booleans()):
        arguments = compacted(arguments)
    for name in ("q", "next_q", "next_q_online", "next_action_mask"):
        if name in arguments and arguments[name].dim() == 2 and len(arguments[name]) and draw(st.booleans()):
            arguments[name] = LAYOUTS[draw(st.sampled_from(["transposed", "offset", "every_other_row"]))](
                arguments[name]
            )
    return arguments


@FEW
@given(arguments=families(), reduction=st.sampled_from([*REDUCTIONS, "weighted_mean"]))
def test_any_member_of_the_family(setting: Setting, arguments: dict[str, Any], reduction: str) -> None:
    check(setting, arguments, reduction)


@FEW
@given(shape=shapes, seed=st.integers(0, 99))
def test_mask_says_the_same_as_terminated(setting: Setting, shape: tuple[int, ...], seed: int) -> None:
    arguments = make(shape, seed=seed)
    same_oracle(arguments, compact(arguments))
    check(setting, arguments)
    check(setting, compact(arguments))


@FEW
@given(data=st.data())
def test_a_wrong_shape_is_an_error_that_names_its_argument(setting: Setting, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    name = data.draw(st.sampled_from(["actions", "rewards", "terminated", "next_q", "gamma"]))
    arguments = make(shape)
    right = [shape] if name == "next_q" else [shape[:1], (*shape[:1], 1)] + ([()] if name == "gamma" else [])
    wrong = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple).filter(lambda s: s not in right))
    dtype = torch.int64 if name == "actions" else torch.float32
    arguments[name] = torch.zeros(wrong, dtype=dtype)
    arguments = {k: x.to(setting.device) for k, x in arguments.items()}
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        fused_dqn_loss(**arguments, backend=setting.backend)


@FEW
@given(data=st.data())
def test_a_wrong_dtype_is_an_error_that_names_its_argument(setting: Setting, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["q", "actions", "rewards", "terminated", "next_q"]))
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    strange = [torch.complex64, torch.complex128]
    wrong = {
        "q": [*integers, torch.bool],
        "actions": [*floats, torch.bool],
        "rewards": [torch.bool],
        "terminated": [],
        "next_q": [*integers, torch.bool],
    }[name] + strange
    arguments = make((3, 2), device=setting.device)
    arguments[name] = arguments[name].to(data.draw(st.sampled_from(wrong)))
    with pytest.raises(TypeError, match=f"^{name}: expected a"):
        fused_dqn_loss(**arguments, backend=setting.backend)
