"""Triton: the categorical losses. Allocates the outputs, chooses the launches and makes them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused._backends.triton_launch import ACC, count_mask, launch_sum, run_program
from dqn_fused._backends.triton_program import Program
from dqn_fused.arguments import Batch, accumulation_dtype
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.distributional import reduced
from dqn_fused.kernels import distributional_launch, launch
from dqn_fused.kernels.categorical import categorical_fwd_kernel


class Options(NamedTuple):
    """A CategoricalSpec without tensors."""

    ends: tuple[float, float] | None  # of the support; None where its atoms are given
    sigma: float
    reduction: str


def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes): one launch, and another one for the sum of the losses."""
    q, dtype = batch.q, accumulation_dtype(batch.q)
    if q.shape[0] == 0:
        values = torch.empty((2, *batch.shape), dtype=dtype, device=q.device)
        loss = reduced(values[0].reshape(-1), batch, spec.reduction)
        return loss, values, torch.empty((0, q.shape[2]), dtype=dtype, device=q.device)
    options, given = _options(batch, spec)
    loss, values, slopes = run_program(_forward, NAMES, given, options, q.device)
    return loss, values, slopes


NAMES = (*Batch._fields, "support")


def _options(batch: Batch, spec: CategoricalSpec) -> tuple[Options, tuple[Any, ...]]:
    """Options, and what is given by tensors."""
    support, sigma, reduction = spec
    if isinstance(support, Tensor):
        return Options(None, sigma, reduction), (*batch, support)
    return Options(support, sigma, reduction), (*batch, None)


def _forward(program: Program, given: tuple[Any, ...], options: Options) -> None:
    """Build what categorical_loss launches."""
    *fields, support = given
    program.returns(*_store_loss(program, Batch(*fields), support, options))


def _store_loss(program: Program, batch: Batch, support: Tensor | None, options: Options) -> tuple[str, str, str]:
    """Loss, values and slopes."""
    q, next_q, online, mask = batch.q, batch.next_q, batch.next_q_online, batch.next_action_mask
    (n, A, K), dtype = q.shape, accumulation_dtype(q)
    at = Batch(*(name if isinstance(x, Tensor) else x for name, x in zip(Batch._fields, batch, strict=True)))
    choice = None if next_q is None else "value" if online is not None and online.dim() == 2 else "expectation"
    gamma, gamma_kind = at.gamma, "scalar"
    if not isinstance(batch.gamma, Tensor):
        gamma, gamma_kind = program.number(batch.gamma, dtype), "number"
    elif batch.gamma.dim() != 0:
        gamma_kind = "per_sample"
    atoms: tuple[Any, ...] = (None, None, None)
    if options.ends is not None:
        low, high = options.ends
        atoms = tuple(program.number(x, dtype) for x in (low, high, (high - low) / (K - 1)))
    scale = None
    if options.sigma:
        scale = program.number(min(1 / (options.sigma * math.sqrt(2)), torch.finfo(dtype).max), dtype)
    per_row = options.reduction == "none"
    plan = distributional_launch.categorical(n, A, K, dtype.itemsize, choice)
    counts = None if batch.non_final_mask is None else count_mask(program, n, plan)
    values = program.empty("values", (2, *batch.shape), dtype)
    slopes = program.empty("slopes", (n, K), dtype)
    loss = program.empty("loss", batch.shape if per_row else (), dtype)
    summed = not per_row and plan.programs > 1
    program.launch(
        categorical_fwd_kernel, plan.programs,
        program.empty("partial", (plan.programs,), dtype) if summed else loss, values, slopes,
        at.q, at.actions, at.rewards, at.weights,
        at.next_q, at.next_q_online, at.next_action_mask, at.terminated, at.non_final_mask, counts, at.checked,
        gamma, None if support is None else "support", *atoms, scale,
        n, 0 if next_q is None else next_q.shape[0], A, K,
        *_strides(q, 3), *_strides(next_q, 3), *_strides(online, 3), *_strides(mask, 2), *_strides(support, 1),
        n if options.reduction == "mean" else 1,
        CHOICE=choice, GAMMA=gamma_kind, PER_ROW=per_row,
        TILES=plan.tiles, ACTIONS=plan.actions, ATOMS=plan.atoms, CHUNK=plan.chunk,
        COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * plan.num_warps,
        ACC=ACC[dtype], CHOICE_ACC=ACC[accumulation_dtype(q if choice != "value" else online)],
        num_warps=plan.num_warps,
    )  # fmt: skip
    if summed:
        launch_sum(program.launch, loss, "partial", plan.programs, dtype)
    return loss, values, slopes


def _strides(x: Tensor | None, dimensions: int) -> tuple[int | None, ...]:
    """Strides of a tensor; None for dimensions that it has not."""
    strides = () if x is None else x.stride()
    return *strides, *(None,) * (dimensions - len(strides))
