"""Triton: the categorical losses. Allocates the outputs, chooses the launches and makes them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused._backends import torch_backend, triton_launch
from dqn_fused._backends.triton_launch import ACC, run_program
from dqn_fused._backends.triton_program import Build, Program
from dqn_fused._backends.triton_rows import Samples, Support, builders
from dqn_fused.arguments import Batch, accumulation_dtype
from dqn_fused.categorical_arguments import CategoricalSpec
from dqn_fused.kernels import distributions_launch, launch
from dqn_fused.kernels.categorical import categorical_fwd_kernel


class Options(NamedTuple):
    """A CategoricalSpec without tensors."""

    ends: tuple[float, float] | None  # of the support; None where its atoms are given
    sigma: float
    reduction: str


def categorical_loss(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, values, slopes) in two launches, or three where the next action is chosen in one of its own."""
    if batch.actions.numel() == 0:
        return torch_backend.categorical_loss(batch, spec)
    return _run(_forward, batch, spec)


def categorical_loss_and_grad(batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, values) in one launch more."""
    if batch.actions.numel() == 0:
        return torch_backend.categorical_loss_and_grad(batch, spec)
    return _run(_loss_and_grad, batch, spec)


def _run(build: Build, batch: Batch, spec: CategoricalSpec) -> tuple[Tensor, Tensor, Tensor]:
    support, sigma, reduction = spec
    atoms, ends = (support, None) if isinstance(support, Tensor) else (None, support)
    given, options = (*batch, atoms), Options(ends, sigma, reduction)
    first, second, third = run_program(build, _NAMES, given, options, batch.q.device)
    return first, second, third


_NAMES = (*Batch._fields, "support")


def _store_loss(program: Program, given: Sequence[Any], options: Options) -> tuple[str, str, str]:
    """Loss, values and slopes."""
    batch, atoms = Batch(*given[:-1]), given[-1]
    q, next_q = batch.q, batch.next_q
    dtype, (n, A, K) = accumulation_dtype(q), q.shape
    by_logits = next_q is not None and (batch.next_q_online is None or batch.next_q_online.dim() == 3)
    sms = triton_launch.sms(q.device)
    plan = distributions_launch.projection(n, A if by_logits else 1, K, dtype.itemsize, sms)
    support = _support(program, atoms, options.ends, K, dtype)
    samples = Samples(program, batch)
    at, choice = samples.names, None if next_q is None else samples.choice(plan.rows, 1, support, plan.num_warps)
    values = program.empty("values", (2, *batch.shape), dtype)
    slopes = program.empty("slopes", (n, K), dtype)
    loss, partial = samples.loss(options.reduction, plan.programs, 1)
    scale = None
    if options.sigma:
        scale = program.number(min(1 / (options.sigma * math.sqrt(2)), torch.finfo(dtype).max), dtype)
    program.launch(
        categorical_fwd_kernel, plan.programs,
        partial, values, slopes, at.q, at.actions, at.rewards, at.weights,
        at.next_q, choice and choice.name, at.next_action_mask,
        at.terminated, at.non_final_mask, samples.counts(), at.checked,
        *support[:4], None if next_q is None else samples.gamma, scale,
        n, 0 if next_q is None else next_q.shape[0], A, K,
        *q.stride(), *(_NO_STRIDES if next_q is None else next_q.stride()),
        *(choice.strides if choice else _NO_STRIDES), *samples.mask_strides, support.stride,
        n if options.reduction == "mean" else 1,
        GAMMA=samples.gamma_kind, PER_ROW=options.reduction == "none",
        ROWS=plan.rows, ATOMS=plan.atoms, CHUNK=plan.chunk,
        VALUES=choice and choice.K == 1, ACTIONS=choice and choice.actions, VEC=choice and choice.vec,
        COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * plan.num_warps,
        ACC=ACC[dtype], CHOICE_ACC=ACC[choice.dtype if choice else dtype], num_warps=plan.num_warps,
    )  # fmt: skip
    samples.store_sum(loss, partial, options.reduction, plan.programs, 1)
    return loss, values, slopes


_forward, _loss_and_grad = builders(_store_loss)


_NO_STRIDES = (None, None, None)


def _support(
    program: Program, atoms: Tensor | None, ends: tuple[float, float] | None, K: int, dtype: torch.dtype
) -> Support:
    """The support as kernels take it: a tensor, or its ends and the distance of two atoms."""
    if ends is None:
        assert atoms is not None
        return Support("support", None, None, None, atoms.stride(0))
    low, high, step = (program.number(x, dtype) for x in (*ends, (ends[1] - ends[0]) / (K - 1)))
    return Support(None, low, high, step, None)
