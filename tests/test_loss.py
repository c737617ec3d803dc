"""One suite for every backend: loss, TD errors and gradient against the oracle, within the bounds of arithmetic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounds import assert_agree, assert_close
from conftest import INTERPRETED, Setting
from data import source
from eager import eager
from oracle import oracle
from torch import Tensor

from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad

SHAPES = [(1, 1), (0, 4), (1, 5), (7, 3), (33, 19), (128, 2), (5, 1000), (3, 257), (2, 3, 5), (2, 3, 70), (4,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Arguments of the loss: q (*N, A) and so on, a third of the samples terminated."""
    g = source(seed)
    N = shape[:-1]
    arguments = {
        "q": torch.randn(shape, generator=g).to(dtype),
        "actions": torch.randint(shape[-1], N, generator=g),
        "rewards": torch.randn(N, generator=g),
        "next_q": torch.randn(shape, generator=g).to(dtype),
        "terminated": torch.rand(N, generator=g) < 0.3,
    }
    return {name: x.to(device) for name, x in arguments.items()}


def compact(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same batch with non_final_mask and the next_q of the non-final samples only."""
    arguments = dict(arguments)
    mask = ~arguments.pop("terminated")
    return {**arguments, "next_q": arguments["next_q"][mask], "non_final_mask": mask}


def to_device(x: Any, device: str) -> Any:
    """Move a tensor with its strides and offset; Tensor.to makes slices and expanded tensors contiguous."""
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    end = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + x.storage_offset() + 1
    flat = x.detach().as_strided((end if x.numel() else 0,), (1,), 0).to(device)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)


def check(
    setting: Setting,
    arguments: dict[str, Any],
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
    call: Callable[..., Any] = fused_dqn_loss,
) -> Tensor:
    """Run a setting forward and backward and compare everything with the oracle. Returns grad_q."""
    arguments = {k: to_device(x, setting.device) for k, x in arguments.items()}
    q = arguments["q"].detach().requires_grad_()
    arguments["q"] = q
    loss, td_error = call(**arguments, reduction=reduction, return_td_error=True, backend=setting.backend)
    if grad_loss is None:
        grad_loss = torch.ones_like(loss)
    (grad_q,) = torch.autograd.grad(loss, q, grad_loss)

    eager_loss, eager_td = eager(**arguments, reduction=reduction)
    (eager_grad,) = torch.autograd.grad(eager_loss, q, grad_loss.to(eager_loss.dtype))
    expected = oracle(**arguments, reduction=reduction, grad_loss=grad_loss)

    accumulation = torch.float64 if q.dtype is torch.float64 else torch.float32
    assert loss.dtype == td_error.dtype == accumulation
    assert grad_q.dtype == q.dtype
    assert grad_q.is_contiguous()
    assert loss.device == td_error.device == grad_q.device == q.device
    assert not td_error.requires_grad
    assert_close("td_error", td_error, expected.td_error, eager_td)
    assert_close("loss", loss, expected.loss, eager_loss)
    assert_close("grad_q", grad_q, expected.grad_q, eager_grad)
    return grad_q


def same_oracle(arguments: dict[str, Any], others: dict[str, Any]) -> None:
    """Check that two forms of a batch are the same to the oracle, number by number."""
    for x, y in zip(oracle(**arguments), oracle(**others), strict=True):
        np.testing.assert_array_equal(x.value, y.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(setting, make(shape, dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5), (3, 1500), (0, 4), (520, 40), (2, 9001)], ids=shape_id)
def test_reductions_with_an_upstream_gradient(setting: Setting, shape: tuple[int, ...], reduction: str) -> None:
    upstream = torch.randn(shape[:-1] if reduction == "none" else (), device=setting.device)
    check(setting, make(shape), reduction, upstream)


OTHER_DTYPES = {
    "terminated": [
        torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    ],
    "actions": [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    ],
    "rewards": [torch.float64, torch.bfloat16, torch.int64, torch.uint8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype_id(dtype)}")
        for name, dtypes in OTHER_DTYPES.items()
        for dtype in dtypes
    ],
)
def test_per_sample_inputs_of_any_dtype(setting: Setting, name: str, dtype: torch.dtype) -> None:
    arguments = make((9, 4))
    if name == "rewards":
        arguments[name] = (2 * arguments[name]).abs()  # what an integer can hold
    check(setting, {**arguments, name: arguments[name].to(dtype)})


def test_terminated_left_out(setting: Setting) -> None:
    arguments = make((9, 4))
    check(setting, {**arguments, "terminated": None})


@pytest.mark.parametrize("q_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("next_dtype", DTYPES, ids=dtype_id)
def test_next_q_of_another_dtype(setting: Setting, q_dtype: torch.dtype, next_dtype: torch.dtype) -> None:
    arguments = make((9, 4), q_dtype)
    check(setting, {**arguments, "next_q": arguments["next_q"].to(next_dtype)})


@pytest.mark.parametrize("shape", [(9, 4), (2, 3, 4)], ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("kind", ["zero", "int", "scalar", "per_sample", "column"])
def test_gamma(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    """gamma = 0.3 has no exact float32: a number that passed a kernel as float32 would show in float64."""
    N = shape[:-1]
    gamma = {
        "zero": 0.0,
        "int": 1,
        "scalar": torch.tensor(0.3, dtype=dtype),
        "per_sample": torch.rand(N, dtype=dtype),
        "column": torch.rand((*N, 1), dtype=dtype),
    }[kind]
    check(setting, {**make(shape, dtype), "gamma": gamma})


def test_gamma_number_keeps_its_precision_in_float64(setting: Setting) -> None:
    check(setting, {**make((9, 4), torch.float64), "gamma": 0.3})


@pytest.mark.parametrize("column", ["actions", "rewards", "terminated"])
@pytest.mark.parametrize("shape", [(9, 4), (1, 4), (2, 3, 4), (4,)], ids=shape_id)
def test_columns_equal_vectors(setting: Setting, shape: tuple[int, ...], column: str) -> None:
    arguments = make(shape, device=setting.device)
    expected = fused_dqn_loss(**arguments, backend=setting.backend)
    arguments[column] = arguments[column].unsqueeze(-1)
    got = fused_dqn_loss(**arguments, backend=setting.backend)
    assert torch.equal(got, expected), "the backend is given the same"
    check(setting, arguments)


@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5), (33, 19), (3, 1500), (6, 200)], ids=shape_id)
def test_non_final_mask(setting: Setting, shape: tuple[int, ...]) -> None:
    arguments = make(shape)
    compacted = compact(arguments)
    same_oracle(arguments, compacted)
    check(setting, arguments)
    grad = check(setting, compacted)
    compacted["non_final_mask"] = compacted["non_final_mask"].unsqueeze(-1)
    assert torch.equal(check(setting, compacted), grad), "the backend is given the same"


@pytest.mark.parametrize("shape", [(5, 3), (5, 100)], ids=shape_id)
@pytest.mark.parametrize("final", [True, False])
def test_non_final_mask_of_all_or_none(setting: Setting, shape: tuple[int, ...], final: bool) -> None:
    """Zero rows of next_q: the tutorial's own lines fail there."""
    arguments = make(shape)
    check(setting, compact({**arguments, "terminated": torch.full((5,), final)}))


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every_other_column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every_other_row": lambda x: torch.repeat_interleave(x, 2, 0)[::2],
    "offset": lambda x: torch.cat([x.new_zeros(len(x), 1), x], 1)[:, 1:],
    "flipped_expand": lambda x: x[:1].expand_as(x),
    "expanded_columns": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 1000), (40, 67)], ids=shape_id)
def test_layouts(setting: Setting, shape: tuple[int, ...], layout: str) -> None:
    arguments = make(shape)
    change = LAYOUTS[layout]
    check(setting, {**arguments, "q": change(arguments["q"])})
    check(setting, {**arguments, "next_q": change(arguments["next_q"])})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_survive_the_way_to_a_device(setting: Setting, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(7, 5))
    moved = to_device(x, setting.device)
    assert (moved.stride(), moved.storage_offset()) == (x.stride(), x.storage_offset())
    assert torch.equal(moved.cpu(), x)


def test_per_sample_inputs_of_any_stride(setting: Setting) -> None:
    arguments = make((7, 5))
    for name in ("actions", "rewards", "terminated"):
        x = arguments[name]
        check(setting, {**arguments, name: torch.stack([x, x], 1)[:, 1]})
        check(setting, {**arguments, name: x[:1].expand(7)})


@pytest.mark.parametrize("A", [5, 130])
def test_time_slices_of_one_sequence(setting: Setting, A: int) -> None:
    """q[:, :-1] against q[:, 1:] of one (B, T, A) tensor, as in token-level Q-learning: no single row stride exists."""
    q = torch.randn(3, 5, A)
    arguments = make((3, 4, A))
    check(setting, {**arguments, "q": q[:, :-1], "next_q": torch.randn(3, 5, A)[:, 1:]})


@pytest.mark.parametrize("permutation", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_permuted_leading_dimensions(setting: Setting, permutation: tuple[int, int, int]) -> None:
    shape = (2, 3, 5)
    inverse = sorted(range(3), key=permutation.__getitem__)
    arguments = make(shape)
    for name in ("q", "next_q"):
        strided = arguments[name].permute(permutation).contiguous().permute(inverse)
        assert not strided.is_contiguous()
        check(setting, {**arguments, name: strided})


def test_four_dimensions(setting: Setting) -> None:
    arguments = make((2, 3, 4, 5))
    check(setting, arguments)
    check(setting, {**arguments, "q": arguments["q"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)})


def test_constants_may_require_grad(setting: Setting) -> None:
    arguments = make((7, 5))
    arguments["rewards"].requires_grad_()
    arguments["next_q"].requires_grad_()
    arguments["gamma"] = torch.full((7,), 0.5, requires_grad=True)
    arguments = {k: x.detach().to(setting.device).requires_grad_(x.requires_grad) for k, x in arguments.items()}
    q = arguments["q"].requires_grad_()
    fused_dqn_loss(**arguments, backend=setting.backend).backward()
    assert q.grad is not None
    assert all(arguments[name].grad is None for name in ("rewards", "next_q", "gamma"))


def test_nan_and_inf_in_a_terminated_row_are_not_used(setting: Setting) -> None:
    for form in (dict, compact):
        for A in (4, 100, 1500):
            arguments = make((6, A))
            arguments["terminated"] = torch.tensor([True, False] * 3)
            clean = {**arguments, "next_q": arguments["next_q"].clone()}
            arguments["next_q"][0] = torch.nan
            arguments["next_q"][2] = torch.inf
            arguments["next_q"][4] = -torch.inf
            # What is selected is the same, at the same places, so there is nothing to round.
            assert torch.equal(check(setting, form(arguments)), check(setting, form(clean)))


@pytest.mark.parametrize("A", [1, 4, 65, 1000, 1501])
def test_nan_in_a_live_row_is_nan_in_the_loss(setting: Setting, A: int) -> None:
    """tl.max and std::max drop NaN; each position is tried, since a reduction tree can drop it on one side only."""
    for column in {0, A // 2, A - 1}:
        arguments = make((3, A))
        arguments["terminated"] = None
        arguments["next_q"][1, column] = torch.nan
        check(setting, arguments)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_next_values(setting: Setting, value: float) -> None:
    arguments = make((3, 4))
    arguments["terminated"] = None
    arguments["next_q"][1, :] = value
    check(setting, arguments)


def test_nan_in_q_taken_and_not_taken(setting: Setting) -> None:
    arguments = make((3, 4))
    arguments["actions"][:] = 2
    arguments["q"][0, 1] = torch.nan
    check(setting, arguments)
    arguments["q"][0, 2] = torch.nan
    check(setting, arguments)


@pytest.mark.parametrize("A", [3, 65, 70, 1000, 5003])
def test_rows_without_a_positive_value(setting: Setting, A: int) -> None:
    """What is read beyond the end of a row must be -inf: zero would be the maximum of negative numbers."""
    arguments = make((3, A))
    check(setting, {**arguments, "next_q": -arguments["next_q"].abs() - 1})


@pytest.mark.parametrize("flags", [[2, 0, 255], [0.5, 0.0, -1.0]])
def test_any_nonzero_flag_is_terminated(setting: Setting, flags: list[float]) -> None:
    check(setting, {**make((3, 4)), "terminated": torch.tensor(flags)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", [(5, 300), (2, 5003)], ids=shape_id)
def test_wide_next_q_of_another_dtype(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = make(shape)
    check(setting, {**arguments, "next_q": arguments["next_q"].to(dtype)})


def test_a_lazy_minus_sign_is_seen(setting: Setting) -> None:
    """conj().imag is a view that negates when it is read; its memory holds the values of the other sign."""
    lazy = torch.randn(3, 4, dtype=torch.complex64, device=setting.device).conj().imag
    assert lazy.is_neg()
    arguments = make((3, 4), device=setting.device)
    for name, x in (("q", lazy), ("next_q", lazy), ("rewards", lazy[:, 0])):
        got = fused_dqn_loss(**{**arguments, name: x}, backend=setting.backend)
        assert torch.equal(got, fused_dqn_loss(**{**arguments, name: x.clone()}, backend=setting.backend))


def test_identities(setting: Setting) -> None:
    a = make((33, 19), torch.float64, setting.device)

    def loss(**changes: Any) -> Tensor:
        result = fused_dqn_loss(**{**a, **changes}, return_td_error=True, backend=setting.backend)
        return result[1]

    ends = torch.ones(33, dtype=torch.bool, device=setting.device)
    taken = a["q"].gather(1, a["actions"][:, None]).squeeze(1)
    assert_agree(loss(gamma=0.0), taken - a["rewards"])
    assert_agree(loss(terminated=ends), taken - a["rewards"])
    order = torch.randperm(33, device=setting.device)
    shuffled = loss(**{name: x[order] for name, x in a.items()})
    assert_agree(shuffled, loss()[order])
    same = loss(next_q=a["next_q"][:, torch.randperm(19, device=setting.device)])
    assert_agree(same, loss())
    one_action = fused_dqn_loss(
        a["q"][:, :1], torch.zeros_like(a["actions"]), a["rewards"], a["next_q"][:, :1], ends, backend=setting.backend
    )
    assert_agree(one_action, (a["q"][:, 0] - a["rewards"]).square().mean())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is sequential")
def test_the_same_bits_every_time(setting: Setting) -> None:
    for shape in ((520, 40), (2, 5000)):
        arguments = make(shape, device=setting.device)
        first = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
        for _ in range(2):
            again = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_only_the_action_taken_has_a_gradient(setting: Setting) -> None:
    arguments = make((33, 19))
    grad = check(setting, arguments)
    assert ((grad != 0).sum(1) == 1).all()
    assert torch.equal((grad != 0).int().argmax(1).cpu(), arguments["actions"])
