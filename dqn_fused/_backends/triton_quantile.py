"""Triton: the quantile loss. Allocates the outputs, chooses the launches and makes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqn_fused._backends import torch_backend, triton_launch
from dqn_fused._backends.triton_launch import ACC, run_program
from dqn_fused._backends.triton_program import Build, Program
from dqn_fused._backends.triton_rows import Samples, builders
from dqn_fused.arguments import Batch, accumulation_dtype
from dqn_fused.kernels import distributions_launch, launch
from dqn_fused.kernels.quantile import quantile_fwd_kernel
from dqn_fused.quantile_arguments import QuantileSpec
from dqn_fused.quantile_reference import kappa_in


def quantile_loss(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, td_error, slopes) in two launches, or three where the next action is chosen in one of its own."""
    if batch.actions.numel() == 0:
        return torch_backend.quantile_loss(batch, spec)
    return _run(_forward, batch, spec)


def quantile_loss_and_grad(batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient, td_error) in one launch more."""
    if batch.actions.numel() == 0:
        return torch_backend.quantile_loss_and_grad(batch, spec)
    return _run(_loss_and_grad, batch, spec)


def _run(build: Build, batch: Batch, spec: QuantileSpec) -> tuple[Tensor, Tensor, Tensor]:
    taus, options = spec.taus, spec if spec.taus is None else spec._replace(taus=None)
    first, second, third = run_program(build, _NAMES, (*batch, taus), options, batch.q.device)
    return first, second, third


_NAMES = (*Batch._fields, "taus")


def _store_loss(program: Program, given: Sequence[Any], spec: QuantileSpec) -> tuple[str, str, str]:
    """Loss, TD errors and slopes."""
    batch, taus = Batch(*given[:-1]), given[-1]
    q, next_q = batch.q, batch.next_q
    assert next_q is not None
    dtype, (n, A, K), next_K = accumulation_dtype(q), q.shape, next_q.shape[2]
    plan = distributions_launch.pairs(n, K, next_K, dtype.itemsize, triton_launch.sms(q.device))
    samples = Samples(program, batch)
    at, choice = samples.names, samples.choice(plan.rows, plan.splits)
    td_error = program.empty("td_error", batch.shape, dtype)
    slopes = program.empty("slopes", (n, K), dtype)
    loss, partial = samples.loss(spec.reduction, plan.programs, plan.splits)
    kappa = kappa_in(dtype, spec)
    numbers: tuple[float | str | None, ...] = (None, None)
    if kappa > 0:
        largest = torch.finfo(dtype).max
        numbers = program.number(min(1 / kappa, largest), dtype), program.number(kappa / 2, dtype)
    parts = next_K * (K if spec.quantile_reduction == "mean" else 1)
    program.launch(
        quantile_fwd_kernel, plan.programs,
        partial, td_error, slopes, at.q, at.actions, at.rewards, at.weights,
        at.next_q, choice.name, at.next_action_mask, at.terminated, at.non_final_mask, samples.counts(), at.checked,
        None if taus is None else "taus",
        samples.gamma, *numbers, program.number(1 / parts, dtype),
        n, next_q.shape[0], A, K, next_K, choice.K, plan.splits,
        *q.stride(), *next_q.stride(), *choice.strides, *samples.mask_strides, *_tau_strides(taus),
        n if spec.reduction == "mean" else 1,
        GAMMA=samples.gamma_kind, PLAIN=kappa == 0, PER_ROW=spec.reduction == "none",
        ROWS=plan.rows, BLOCK=plan.block, TARGETS=plan.targets, EVEN=next_K % plan.targets == 0,
        MEAN_BLOCK=plan.averaged,
        VALUES=choice.K == 1, ACTIONS=choice.actions, COLUMNS=choice.columns, VEC=choice.vec,
        COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * distributions_launch.WARPS,
        ACC=ACC[dtype], CHOICE_ACC=ACC[choice.dtype], num_warps=distributions_launch.WARPS,
    )  # fmt: skip
    samples.store_sum(loss, partial, spec.reduction, plan.programs, plan.splits)
    return loss, td_error, slopes


_forward, _loss_and_grad = builders(_store_loss)


def _tau_strides(taus: Tensor | None) -> tuple[int | None, int | None]:
    if taus is None:
        return None, None
    return (0, taus.stride(0)) if taus.dim() == 1 else (taus.stride(0), taus.stride(1))
