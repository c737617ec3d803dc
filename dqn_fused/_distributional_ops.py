"""Schemas and fakes of the compiled ops of the distributional losses, as _ops.py has those of the others."""

import torch
from torch import Tensor
from torch.library import Library

from dqn_fused._ops import ARGUMENTS, loss_like, on_one_device
from dqn_fused.arguments import NOT_DISTRIBUTIONAL, accumulation_dtype

DISTRIBUTIONS = ", ".join(ARGUMENTS[: -len(NOT_DISTRIBUTIONAL)])
CATEGORICAL = "Tensor? support, float v_min, float v_max, float sigma, int reduction, bool check"
QUANTILE = "Tensor? taus, float kappa, bool mean, int reduction, bool check"

_library = Library("dqn_fused", "FRAGMENT")
# The Triton ops are for torch.compile, as in _ops.py, and check no values.
# slopes is (n, K), values (2, n): the TD errors and the expectations of the actions taken.
for _kind in ("", "triton_"):
    _library.define(
        f"{_kind}categorical_loss({DISTRIBUTIONS}, {CATEGORICAL}) -> (Tensor loss, Tensor values, Tensor slopes)"
    )
    _library.define(
        f"{_kind}categorical_loss_and_grad({DISTRIBUTIONS}, {CATEGORICAL}) "
        "-> (Tensor loss, Tensor grad_q, Tensor values)"
    )
    _library.define(
        f"{_kind}quantile_loss({DISTRIBUTIONS}, {QUANTILE}) -> (Tensor loss, Tensor td_error, Tensor slopes)"
    )
    _library.define(
        f"{_kind}quantile_loss_and_grad({DISTRIBUTIONS}, {QUANTILE}) -> (Tensor loss, Tensor grad_q, Tensor td_error)"
    )
    _library.define(
        f"{_kind}rows_backward(Tensor grad_loss, Tensor slopes, Tensor actions, Tensor? weights, int A, "
        "ScalarType dtype, int reduction) -> Tensor grad_q"
    )
LOSSES = ("categorical_loss", "categorical_loss_and_grad", "quantile_loss", "quantile_loss_and_grad", "rows_backward")
NAMES = tuple(kind + name for kind in ("", "triton_") for name in LOSSES)
for _name in NAMES:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("dqn_fused::categorical_loss", lib=_library)
@torch.library.register_fake("dqn_fused::triton_categorical_loss", lib=_library)
def _categorical_loss(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    loss, values = _forward(q, actions, *rest)
    return loss, values, values.new_empty((q.shape[0], q.shape[2]))


@torch.library.register_fake("dqn_fused::categorical_loss_and_grad", lib=_library)
@torch.library.register_fake("dqn_fused::triton_categorical_loss_and_grad", lib=_library)
def _categorical_loss_and_grad(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    loss, values = _forward(q, actions, *rest)
    return loss, q.new_empty(q.shape), values


@torch.library.register_fake("dqn_fused::quantile_loss", lib=_library)
@torch.library.register_fake("dqn_fused::triton_quantile_loss", lib=_library)
def _quantile_loss(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    loss, values = _forward(q, actions, *rest)
    return loss, values.new_empty(q.shape[:1]), values.new_empty((q.shape[0], q.shape[2]))


@torch.library.register_fake("dqn_fused::quantile_loss_and_grad", lib=_library)
@torch.library.register_fake("dqn_fused::triton_quantile_loss_and_grad", lib=_library)
def _quantile_loss_and_grad(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    loss, values = _forward(q, actions, *rest)
    return loss, q.new_empty(q.shape), values.new_empty(q.shape[:1])


@torch.library.register_fake("dqn_fused::rows_backward", lib=_library)
@torch.library.register_fake("dqn_fused::triton_rows_backward", lib=_library)
def _rows_backward(
    grad_loss: Tensor,
    slopes: Tensor,
    actions: Tensor,
    weights: Tensor | None,
    A: int,
    dtype: torch.dtype,
    *rest: object,
) -> Tensor:
    return slopes.new_empty((slopes.shape[0], A, slopes.shape[1]), dtype=dtype)


def _forward(q: Tensor, actions: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    on_one_device(q, actions, *rest)
    *_, reduction, _ = rest
    return loss_like(q, actions, reduction), q.new_empty((2, q.shape[0]), dtype=accumulation_dtype(q))


categorical_loss = torch.ops.dqn_fused.categorical_loss.default
categorical_loss_and_grad = torch.ops.dqn_fused.categorical_loss_and_grad.default
quantile_loss = torch.ops.dqn_fused.quantile_loss.default
quantile_loss_and_grad = torch.ops.dqn_fused.quantile_loss_and_grad.default
rows_backward = torch.ops.dqn_fused.rows_backward.default
triton_categorical_loss = torch.ops.dqn_fused.triton_categorical_loss.default
triton_categorical_loss_and_grad = torch.ops.dqn_fused.triton_categorical_loss_and_grad.default
triton_quantile_loss = torch.ops.dqn_fused.triton_quantile_loss.default
triton_quantile_loss_and_grad = torch.ops.dqn_fused.triton_quantile_loss_and_grad.default
triton_rows_backward = torch.ops.dqn_fused.triton_rows_backward.default
