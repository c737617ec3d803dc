"""Triton: the loss of Q-values. Allocates the outputs, chooses the launches and makes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused._backends import triton_launch
from dqn_fused._backends.triton_launch import (
    ACC,
    count_mask,
    launch_sum,
    named,
    row_strides,
    run_program,
    strides_unless_flat,
)
from dqn_fused._backends.triton_program import Program, check_sizes
from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.autograd import Saved, loss_gradient
from dqn_fused.kernels import launch
from dqn_fused.kernels.rows import row_fwd_kernel
from dqn_fused.kernels.td_loss import td_loss_fwd_kernel
from dqn_fused.kernels.td_loss_bwd import td_loss_bwd_kernel
from dqn_fused.reference import loss_of_td_error


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser).

    Up to 64 actions: one launch for a small batch, a second one where several programs share the work. Above, the rows
    of each matrix whose every action counts are reduced first, in a launch of their own.
    """
    if batch.actions.numel() == 0:
        return _of_nothing(batch, spec)
    loss, td_error, normaliser = run_program(_forward, Batch._fields, batch, spec, batch.q.device)
    return loss, td_error, normaliser


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q in one launch."""
    if torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # of is_grads_batched=True: it has no address
        return loss_gradient(grad_loss, saved, spec)
    device = saved.td_error.device
    if saved.actions.numel() == 0:
        return torch.empty(saved.q_shape, dtype=saved.q_dtype, device=device)
    (grad_q,) = run_program(_backward, _SAVED, (grad_loss, *saved), spec, device)
    return grad_q


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser): up to 64 actions in the forward launch, above in one more."""
    q = batch.q
    if batch.actions.numel() == 0:
        grad_q = torch.empty((*batch.shape, q.shape[-1]), dtype=q.dtype, device=q.device)
        loss, td_error, normaliser = _of_nothing(batch, spec)
    else:
        loss, grad_q, td_error, normaliser = run_program(_loss_and_grad, Batch._fields, batch, spec, q.device)
    return loss, grad_q, td_error, normaliser


@torch.no_grad()  # TDLoss records it, where anything does
def _of_nothing(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Results of a batch without a sample, which needs no launch."""
    dtype, device = accumulation_dtype(batch.q), batch.q.device
    td_error = torch.empty(batch.shape, dtype=dtype, device=device)
    normaliser = torch.empty((2, *batch.shape), dtype=dtype, device=device) if spec.cql else None
    return loss_of_td_error(td_error, normaliser, batch, spec), td_error, normaliser


class Partial(NamedTuple):
    """What row_fwd_kernel has left of the rows of a matrix."""

    best: str | None = None  # (splits, m)
    aux: str | None = None
    splits: int = 1


def _forward(program: Program, given: Sequence[Any], spec: LossSpec) -> None:
    """Build what forward launches."""
    program.returns(*_store_loss(program, Batch(*given), spec, None))


def _loss_and_grad(program: Program, given: Sequence[Any], spec: LossSpec) -> None:
    """Build what loss_and_grad launches."""
    batch = Batch(*given)
    q = batch.q
    narrow = q.shape[-1] <= launch.NARROW
    grad_q = program.empty("grad_q", (*batch.shape, q.shape[-1]), q.dtype)
    loss, td_error, normaliser = _store_loss(program, batch, spec, grad_q if narrow else None)
    if not narrow:
        at = named(batch)
        _store_gradient(
            program, spec, grad_q, None, td_error, at.saved_actions(), at.weights, normaliser, q, batch.action_mask,
            (batch.actions.numel(), q.shape[-1]), q.dtype,
        )  # fmt: skip
    program.returns(loss, grad_q, td_error, normaliser)


def _backward(program: Program, given: Sequence[Any], spec: LossSpec) -> None:
    """Build what backward launches."""
    saved = Saved(*given[1:])
    _, actions, _, _, q, mask, q_shape, dtype = saved
    at = named(saved)
    grad_q = program.empty("grad_q", q_shape, dtype)
    _store_gradient(
        program, spec, grad_q, "grad_loss", at.td_error, at.actions, at.weights, at.normaliser, q, mask,
        (actions.numel(), q_shape[-1]), dtype,
    )  # fmt: skip
    program.returns(grad_q)


_SAVED = ("grad_loss", *Saved._fields)


def _store_loss(program: Program, batch: Batch, spec: LossSpec, grad_q: str | None) -> tuple[str, str, str | None]:
    """Loss, TD errors and normaliser of the conservative term; grad_q is filled if given."""
    q, next_q, online, target_q = batch.q, batch.next_q, batch.next_q_online, batch.target_q
    next_mask, mask, at = batch.next_action_mask, batch.action_mask, named(batch)
    dtype, n, A = accumulation_dtype(q), batch.actions.numel(), q.shape[-1]
    m = 0 if next_q is None else next_q.shape[:-1].numel()
    check_sizes(n, m, A)
    td_error = program.empty("td_error", batch.shape, dtype)
    normaliser = program.empty("normaliser", (2, *batch.shape), dtype) if spec.cql else None
    value, choice, choice_dtype = "max" if spec.target == "max" else "sum_exp", "next_q", dtype
    if online is not None:
        value, choice = "argmax", "next_q_online"
        choice_dtype = accumulation_dtype(online)  # rounded, values that differ would be equals
    chosen = getattr(batch, choice)

    gamma, gamma_kind = at.gamma, "scalar"
    if not isinstance(batch.gamma, Tensor):
        gamma, gamma_kind = program.number(batch.gamma, dtype), "number"
    elif batch.gamma.dim() != 0:
        gamma_kind = "per_sample"
    temperature = inverse = alpha = clip = None
    if spec.target != "max":
        temperature = program.number(spec.temperature, dtype)
        inverse = program.number(min(1 / spec.temperature, torch.finfo(dtype).max), dtype)
    if spec.target == "munchausen":
        alpha, clip = program.number(spec.alpha, dtype), program.number(spec.clip, dtype)

    narrow = A <= launch.NARROW
    next_partial = policy_partial = q_partial = Partial()
    if not narrow:
        if chosen is not None:
            next_partial = _reduce_rows(
                program, choice, chosen, "next_action_mask", next_mask, at.terminated, value, inverse, choice_dtype
            )
        if target_q is not None:
            policy_partial = _reduce_rows(
                program, "target_q", target_q, "action_mask", mask, None, "sum_exp", inverse, dtype
            )
        if spec.cql:
            one = program.number(1.0, dtype)
            q_partial = _reduce_rows(program, "q", q, "action_mask", mask, None, "sum_exp", one, dtype)
    per_row = spec.reduction == "none"
    splits = [partial.splits for partial in (next_partial, policy_partial, q_partial)]
    doubles = any(x is not None and x.element_size() > 4 for x in (q, chosen, target_q))
    more = grad_q is not None or value != "max" or spec.cql or next_mask is not None
    plan = launch.forward(n, A if narrow else max(splits), (2 if doubles else 1) * (2 if more else 1), not per_row)
    counts = None if batch.non_final_mask is None else count_mask(program, n, plan.num_warps)
    loss = program.empty("loss", batch.shape if per_row else (), dtype)
    summed = not per_row and plan.programs > 1
    program.launch(
        td_loss_fwd_kernel, plan.programs,
        program.empty("partial", (plan.programs,), dtype) if summed else loss, td_error, normaliser, grad_q,
        at.q, at.actions, at.rewards, at.weights,
        at.next_q, at.next_q_online, at.next_action_mask, at.terminated, at.non_final_mask, counts, at.checked,
        at.target_q, at.action_mask,
        next_partial.best, next_partial.aux, policy_partial.best, policy_partial.aux, q_partial.best, q_partial.aux,
        gamma, *_numbers(program, spec, dtype), temperature, inverse, alpha, clip,
        n, m, A, *splits,
        *row_strides(q), *row_strides(next_q), *row_strides(online), *row_strides(next_mask),
        *row_strides(target_q), *row_strides(mask),
        _count(n, spec),
        LOSS=spec.loss, VALUE=None if next_q is None else value, GAMMA=gamma_kind,
        TRANSFORM=spec.value_transform, PER_ROW=per_row, NARROW=narrow,
        TILES=plan.tiles, ROWS=plan.rows, BLOCK=plan.block,
        COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * plan.num_warps,
        ACC=ACC[dtype], CHOICE_ACC=ACC[choice_dtype], num_warps=plan.num_warps,
    )  # fmt: skip
    if summed:
        launch_sum(program.launch, loss, "partial", plan.programs, dtype)
    return loss, td_error, normaliser


def _store_gradient(
    program: Program, spec: LossSpec, grad_q: str, grad_loss: str | None,
    td_error: str, actions: str, weights: str | None, normaliser: str | None, q: Tensor | None, mask: Tensor | None,
    shape: tuple[int, int], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write grad_q, of (n, A) elements; grad_loss None stands for ones."""
    n, A = shape
    if not spec.dense_gradient():
        normaliser = q = mask = None
    block, run_length = launch.backward(A, dtype.itemsize, dense=q is not None)
    program.launch(
        td_loss_bwd_kernel, launch.cdiv(n * A, block),
        grad_q, grad_loss, td_error, actions, weights, normaliser,
        None if q is None else "q", None if mask is None else "action_mask",
        *_numbers(program, spec, torch.float64 if dtype is torch.float64 else torch.float32),
        n, A, _count(n, spec), *strides_unless_flat(q), *strides_unless_flat(mask),
        LOSS=spec.loss, PER_ROW=spec.reduction == "none", FAR=n * A > 2**31 - 1 - block,
        RUN=run_length, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _count(n: int, spec: LossSpec) -> int:
    return n if spec.reduction == "mean" else 1


def _numbers(program: Program, spec: LossSpec, dtype: torch.dtype) -> tuple[float | str | None, float | str | None]:
    """(delta, cql_alpha), None where they mean nothing."""
    delta = None if spec.loss == "mse" else program.number(spec.delta, dtype)
    return delta, program.number(spec.cql_alpha, dtype) if spec.dense_gradient() else None


def _reduce_rows(
    program: Program, name: str, x: Tensor, mask_name: str, mask: Tensor | None, terminated: str | None,
    kind: str, inverse: Any, dtype: torch.dtype,
) -> Partial:  # fmt: skip
    """Reduce the rows of x that are not terminated over the actions that are legal."""
    m, A = x.shape[:-1].numel(), x.shape[-1]
    shift, wide = _from_boundary(x, mask)
    plan = launch.rows(m, A, x.element_size(), wide, triton_launch.sms(x.device))
    best = program.empty(f"{name} best", (plan.splits, m), dtype)
    aux = None
    if kind != "max":
        aux = program.empty(f"{name} aux", (plan.splits, m), torch.int32 if kind == "argmax" else dtype)
    if m:
        program.launch(
            row_fwd_kernel, plan.programs,
            best, aux, program.moved(name, shift), None if mask is None else program.moved(mask_name, shift),
            terminated, inverse,
            m, A, *row_strides(x), shift, *row_strides(None if wide else mask), plan.splits, plan.chunk,
            KIND=kind, WIDE=wide, VEC=16 // x.element_size(), ROWS=plan.rows, BLOCK=plan.block, ACC=ACC[dtype],
            num_warps=4,
        )  # fmt: skip
    return Partial(best, aux, plan.splits)


def _from_boundary(x: Tensor, mask: Tensor | None) -> tuple[int, bool]:
    """How many elements before x's first one, and its mask's, reading starts, at a 16-byte boundary if possible, and
    whether they can be read 16 bytes at a time: the mask must lie as x does.

    A kernel is compiled for 16-byte loads only where its pointer is a multiple of 16: x[:, 1:] is not.
    """
    if x.stride(-1) != 1 or (mask is not None and mask.stride() != x.stride()):
        return 0, False
    shift = x.data_ptr() % 16 // x.element_size()
    if any(y is not None and y.storage_offset() < shift for y in (x, mask)):
        return 0, True
    return shift, True
