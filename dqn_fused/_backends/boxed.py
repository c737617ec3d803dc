"""A batch and a loss as the flat arguments of an op, and the results of an op as a backend returns them."""

from typing import Any

import torch
from torch import Tensor

from dqn_fused.arguments import NOT_DISTRIBUTIONAL, UNCHECKED, Batch, LossSpec, looks_at_values
from dqn_fused.autograd import Saved
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.options import REDUCTIONS, packed, unpacked
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.row_loss import SavedRows

REDUCTION_OF = {code: name for name, code in REDUCTIONS.items()}


def arguments(batch: Batch, spec: LossSpec) -> tuple[object, ...]:
    """Arguments of a forward op. A batch is unchecked only where the op looks at the values."""
    # Dynamo of torch 2.10 compares no sizes by identity; in a graph every batch is checked.
    unchecked = not torch.compiler.is_compiling() and batch.shape is UNCHECKED
    look = unchecked or looks_at_values(batch.q.device)
    return *batch.flat(), packed(spec), look


def unpack(*given: Any) -> tuple[Batch, LossSpec]:
    """Batch, of one leading dimension, and loss of the arguments of a forward op."""
    *batch, options, _ = given
    return unflat(*batch), unpacked(options)


def unflat(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | None,
    terminated: Tensor | None,
    non_final_mask: Tensor | None,
    gammas: Tensor | None,
    gamma: float,
    *rest: Tensor | None,
) -> Batch:
    """The batch, of one leading dimension, whose fields, or the first of them, are given as Batch.flat returns them."""
    given = gamma if gammas is None else gammas
    batch = Batch(q, actions, rewards, next_q, terminated, given, non_final_mask, *rest)  # type: ignore[arg-type]
    return batch._replace(shape=actions.shape)


def backward_arguments(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> tuple[object, ...]:
    """Arguments of a backward op."""
    *tensors, q_shape, q_dtype = saved
    return grad_loss, *tensors, q_shape[-1], q_dtype, packed(spec)


def unpack_backward(*given: Any) -> tuple[Saved, LossSpec]:
    """What a backward needs, of the arguments of a backward op behind grad_loss."""
    td_error, actions, *more, A, dtype, options = given
    shape = torch.Size((actions.shape[0], A))
    return Saved(td_error, actions, *more, shape, dtype), unpacked(options)  # type: ignore[call-arg]


def shaped_forward(
    loss: Tensor, td_error: Tensor, normaliser: Tensor | None, batch: Batch, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give the results of a forward op the leading dimensions of the batch."""
    shape = batch.shape
    if len(shape) != 1:  # 1 us of comparing shapes
        loss, td_error = shaped(loss, shape if spec.reduction == "none" else loss.shape), shaped(td_error, shape)
        normaliser = None if normaliser is None else shaped(normaliser, (2, *shape))
    return loss, td_error, normaliser


def shaped(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Give an op's result a shape; not as a view, which autograd would not let users change in place."""
    return x if x.shape == shape else torch.ops.aten._unsafe_view.default(x, shape)


def distributional_arguments(batch: Batch) -> tuple[object, ...]:
    """The arguments that the distributional ops share."""
    return batch.flat()[: -len(NOT_DISTRIBUTIONAL)]


def quantile_arguments(batch: Batch, spec: QuantileSpec) -> tuple[object, ...]:
    """Arguments of a quantile op."""
    kappa, quantile_reduction, reduction, taus = spec
    look = looks_at_values(batch.q.device)
    mean = quantile_reduction == "mean"
    return *distributional_arguments(batch), taus, kappa, mean, REDUCTIONS[reduction], look


def categorical_arguments(batch: Batch, spec: CategoricalSpec) -> tuple[object, ...]:
    """Arguments of a categorical op."""
    support, ends = None, (0.0, 0.0)
    if isinstance(spec.support, Tensor):
        support = spec.support
    else:
        ends = spec.support
    look = looks_at_values(batch.q.device)
    return *distributional_arguments(batch), support, *ends, spec.sigma, REDUCTIONS[spec.reduction], look


def unpack_quantile(*given: Any) -> tuple[Batch, QuantileSpec]:
    """Batch and options of the arguments of a quantile op."""
    *shared, taus, kappa, mean, reduction, _ = given
    spec = QuantileSpec(kappa, "mean" if mean else "sum", REDUCTION_OF[reduction], taus)
    return unflat(*shared), spec


def unpack_categorical(*given: Any) -> tuple[Batch, CategoricalSpec]:
    """Batch and options of the arguments of a categorical op."""
    *shared, support, v_min, v_max, sigma, reduction, _ = given
    spec = CategoricalSpec((v_min, v_max) if support is None else support, sigma, REDUCTION_OF[reduction])
    return unflat(*shared), spec


def rows_arguments(saved: SavedRows) -> tuple[object, ...]:
    """Arguments of a backward op of the distributional losses, without the upstream gradient."""
    slopes, actions, weights, shape, dtype, reduction = saved
    return slopes, actions, weights, shape[-2], dtype, REDUCTIONS[reduction]


def unpack_rows(
    slopes: Tensor, actions: Tensor, weights: Tensor | None, A: int, dtype: torch.dtype, reduction: int
) -> SavedRows:
    """What a backward of a distributional loss needs, of the arguments of its op."""
    shape = torch.Size((slopes.shape[0], A, slopes.shape[1]))
    return SavedRows(slopes, actions, weights, shape, dtype, REDUCTION_OF[reduction])


def shaped_values(loss: Tensor, values: Tensor, batch: Batch, reduction: str) -> tuple[Tensor, Tensor]:
    """Give the loss and the values of a distributional op, (n,) or (2, n), the leading dimensions of the batch."""
    shape = batch.shape
    if len(shape) != 1:
        loss = shaped(loss, shape if reduction == "none" else loss.shape)
        values = shaped(values, (*values.shape[:-1], *shape))
    return loss, values
