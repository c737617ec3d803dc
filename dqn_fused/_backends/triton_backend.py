"""Triton: allocates the outputs, chooses the launch and runs the kernels on the tensors' device and stream."""

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused._backends import capturing, triton_ops
from dqn_fused._backends.triton_sweep import auto_sweep, sweep
from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.autograd import Saved, loss_gradient
from dqn_fused.kernels import launch
from dqn_fused.kernels.mask import count_kernel
from dqn_fused.kernels.rows import row_fwd_kernel
from dqn_fused.kernels.td_loss import sum_kernel, td_loss_fwd_kernel
from dqn_fused.kernels.td_loss_bwd import td_loss_bwd_kernel
from dqn_fused.reference import loss_of_td_error

__all__ = ["auto_sweep", "sweep"]

INTERPRETED = not isinstance(td_loss_fwd_kernel, triton.runtime.JITFunction)
OLDEST = (3, 6)
# Of every kernel. A product and a sum that are fused in one lane and not in the one that holds a copy of the same row
# differ in the last bit, and both lanes store: which of them comes last is not said. It costs 4 and 9 registers in two
# of 67 kernels on sm_90, none on sm_80 and gfx942.
OPTIONS = {"enable_fp_fusion": False}
CHECKS_CPU = False
COUNTS_MASK = True
NODE = False
PARTLY = ""


def unavailable() -> str | None:
    """Say why Triton cannot run here."""
    version = tuple(int(x) for x in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if INTERPRETED:
        return None
    if torch.cuda.is_available():
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # of many types: no C compiler for its launcher, no Python headers, an old driver
            return f"triton's driver does not start: {error}"
        return refuses(torch.device("cuda", torch.cuda.current_device()))
    return "no CUDA or ROCm device (TRITON_INTERPRET=1, set before the first import, runs them on the CPU, slowly)"


def refuses(device: torch.device) -> str | None:
    """Serve CUDA tensors, and CPU tensors in the interpreter."""
    expected = "cpu" if INTERPRETED else "cuda"
    if device.type != expected:
        return f"expected tensors on {expected}, got {device}"
    return None if INTERPRETED else _fails(device)


def _fails(device: torch.device) -> str | None:
    """Say why no kernel can be compiled and launched there; not during a capture, where that would be recorded."""
    if not torch.cuda.is_available() or capturing():
        return None
    return _probe(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))


# Asked while torch.compile traces, not traced itself.
_fails._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _probe(device: torch.device) -> str | None:
    try:
        with _on(device):
            loss, partial = torch.zeros((), device=device), torch.zeros(1, device=device)
            _sum(loss, partial)
    except Exception as error:  # of many types: a device that this Triton does not know, no ptxas, a full disk
        return f"triton cannot run a kernel on {device}: {type(error).__name__}: {error}"
    return None


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, td_error, normaliser).

    Up to 64 actions: one launch for a small batch, a second one where several programs share the work. Above, the rows
    of each matrix whose every action counts are reduced first, in a launch of their own.
    """
    if torch.compiler.is_compiling():
        return triton_ops.forward(batch, spec)
    return _forward(batch, spec, None)


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q in one launch."""
    if torch.compiler.is_compiling():
        return triton_ops.backward(grad_loss, saved, spec)
    if torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # of is_grads_batched=True: it has no address
        return loss_gradient(grad_loss, saved, spec)
    grad_q = torch.empty(saved.q_shape, dtype=saved.q_dtype, device=saved.td_error.device)
    _store_gradient(grad_q, grad_loss, saved, spec)
    return grad_q


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser): up to 64 actions in the forward launch, above in one more."""
    if torch.compiler.is_compiling():
        return triton_ops.loss_and_grad(batch, spec)
    q = batch.q
    A = q.shape[-1]
    grad_q = torch.empty((*batch.shape, A), dtype=q.dtype, device=q.device)
    narrow = A <= launch.NARROW
    loss, td_error, normaliser = _forward(batch, spec, grad_q if narrow else None)
    if not narrow:
        _store_gradient(grad_q, None, Saved.of(batch, spec, td_error, normaliser), spec)
    return loss, grad_q, td_error, normaliser


class Partial(NamedTuple):
    """What row_fwd_kernel has left of the rows of a matrix."""

    best: Tensor | None = None  # (splits, m)
    aux: Tensor | None = None
    splits: int = 1


def _forward(batch: Batch, spec: LossSpec, grad_q: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, TD errors and normaliser of the conservative term; grad_q is filled if given."""
    # A pointer does not carry the lazy minus sign of conj().imag; per-sample tensors lost it when made contiguous.
    q, next_q, online, target_q = (
        None if x is None else x.resolve_neg() for x in (batch.q, batch.next_q, batch.next_q_online, batch.target_q)
    )
    assert q is not None
    device, dtype = q.device, accumulation_dtype(q)
    n, A = batch.actions.numel(), q.shape[-1]
    td_error = torch.empty(batch.shape, dtype=dtype, device=device)
    normaliser = torch.empty((2, *batch.shape), dtype=dtype, device=device) if spec.cql else None
    if n == 0:
        return loss_of_td_error(td_error, normaliser, batch, spec), td_error, normaliser
    m = 0 if next_q is None else next_q.shape[:-1].numel()
    next_mask, mask = batch.next_action_mask, batch.action_mask
    final, non_final = batch.terminated, batch.non_final_mask
    value, choice, choice_dtype = "max" if spec.target == "max" else "sum_exp", next_q, dtype
    if online is not None:
        value, choice = "argmax", online
        choice_dtype = accumulation_dtype(online)  # rounded, values that differ would be equals

    with _on(device):
        gamma, gamma_kind = batch.gamma, "scalar"
        if not isinstance(gamma, Tensor):
            gamma, gamma_kind = _number(gamma, dtype, device), "number"
        elif gamma.dim() != 0:
            gamma_kind = "per_sample"
        temperature = inverse = alpha = clip = None
        if spec.target != "max":
            temperature = _number(spec.temperature, dtype, device)
            inverse = _number(min(1 / spec.temperature, torch.finfo(dtype).max), dtype, device)
        if spec.target == "munchausen":
            alpha, clip = _number(spec.alpha, dtype, device), _number(spec.clip, dtype, device)

        narrow = A <= launch.NARROW
        next_partial = policy_partial = q_partial = Partial()
        if not narrow:
            if choice is not None:
                next_partial = _reduce_rows(choice, next_mask, final, value, inverse, choice_dtype)
            if target_q is not None:
                policy_partial = _reduce_rows(target_q, mask, None, "sum_exp", inverse, dtype)
            if spec.cql:
                q_partial = _reduce_rows(q, mask, None, "sum_exp", _number(1.0, dtype, device), dtype)
        per_row = spec.reduction == "none"
        splits = [partial.splits for partial in (next_partial, policy_partial, q_partial)]
        doubles = any(x is not None and x.element_size() > 4 for x in (q, choice, target_q))
        more = grad_q is not None or value != "max" or spec.cql or next_mask is not None
        plan = launch.forward(n, A if narrow else max(splits), (2 if doubles else 1) * (2 if more else 1), not per_row)
        counts = None if non_final is None else _counts(non_final, plan)
        loss = torch.empty(
            batch.shape if per_row else () if plan.programs == 1 else plan.programs, dtype=dtype, device=device
        )
        run(
            td_loss_fwd_kernel, plan.programs,
            loss, td_error, normaliser, grad_q,
            q, batch.actions, batch.rewards, batch.weights,
            next_q, online, next_mask, final, non_final, counts, batch.checked, target_q, mask,
            next_partial.best, next_partial.aux, policy_partial.best, policy_partial.aux, q_partial.best, q_partial.aux,
            gamma, *_numbers(spec, dtype, device), temperature, inverse, alpha, clip,
            n, m, A, *splits,
            *_row_strides(q), *_row_strides(next_q), *_row_strides(online), *_row_strides(next_mask),
            *_row_strides(target_q), *_row_strides(mask),
            _count(n, spec),
            LOSS=spec.loss, VALUE=None if next_q is None else value, GAMMA=gamma_kind,
            PER_ROW=per_row, NARROW=narrow,
            TILES=plan.tiles, ROWS=plan.rows, BLOCK=plan.block,
            COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * plan.num_warps,
            ACC=_ACC[dtype], CHOICE_ACC=_ACC[choice_dtype], num_warps=plan.num_warps,
        )  # fmt: skip
        if not per_row and plan.programs > 1:
            partial, loss = loss, torch.empty((), dtype=dtype, device=device)
            _sum(loss, partial)
    return loss, td_error, normaliser


def _sum(loss: Tensor, partial: Tensor) -> None:
    """Sum of the partial sums."""
    run(
        sum_kernel, 1, loss, partial, partial.numel(),
        BLOCK=launch.MAX_PROGRAMS, ACC=_ACC[loss.dtype], num_warps=launch.SUM_WARPS,
    )  # fmt: skip


def _counts(non_final: Tensor, plan: launch.Forward) -> Tensor | None:
    """True entries of each part of a mask, where the launch that follows does not count all of them itself."""
    n = non_final.shape[0]
    programs = launch.counts(n, plan)
    if programs == 0:
        return None
    counts = torch.empty(programs, dtype=torch.int32, device=non_final.device)
    run(
        count_kernel, programs, counts, non_final, n,
        COUNTED=launch.COUNTED, BLOCK=launch.COUNTED_A_WARP * 4, num_warps=4,
    )  # fmt: skip
    return counts


def _store_gradient(grad_q: Tensor, grad_loss: Tensor | None, saved: Saved, spec: LossSpec) -> None:
    """Write grad_q; grad_loss None stands for ones."""
    n, A, td_error = saved.actions.numel(), saved.q_shape[-1], saved.td_error
    if n == 0:
        return
    q = None if saved.q is None else saved.q.resolve_neg()
    block, run_length = launch.backward(A, grad_q.element_size(), dense=q is not None)
    far = n * A > 2**31 - 1 - block
    with _on(td_error.device):
        run(
            td_loss_bwd_kernel, launch.cdiv(n * A, block),
            grad_q, grad_loss, td_error, saved.actions, saved.weights, saved.normaliser, q, saved.action_mask,
            *_numbers(spec, td_error.dtype, td_error.device),
            n, A, _count(n, spec), *_strides_unless_flat(q), *_strides_unless_flat(saved.action_mask),
            LOSS=spec.loss, PER_ROW=spec.reduction == "none", FAR=far, RUN=run_length, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _count(n: int, spec: LossSpec) -> int:
    return n if spec.reduction == "mean" else 1


def _number(x: float, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A number as a kernel takes it: a float argument arrives as float32, so for float64 arithmetic it is in memory."""
    return torch.full((), x, dtype=dtype, device=device) if dtype is torch.float64 else x


def _numbers(
    spec: LossSpec, dtype: torch.dtype, device: torch.device
) -> tuple[float | Tensor | None, float | Tensor | None]:
    """(delta, cql_alpha), None where they mean nothing."""
    delta = None if spec.loss == "mse" else _number(spec.delta, dtype, device)
    return delta, _number(spec.cql_alpha, dtype, device) if spec.dense_gradient else None


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launch a kernel on a one-dimensional grid: grid.y ends at 65,535."""
    kernel[(programs,)](*args, **OPTIONS, **meta)


def _reduce_rows(
    x: Tensor, mask: Tensor | None, terminated: Tensor | None, kind: str, inverse: Any, dtype: torch.dtype
) -> Partial:
    """Reduce the rows of x that are not terminated over the actions that are legal."""
    m, A = x.shape[:-1].numel(), x.shape[-1]
    x, mask, shift, wide = _from_boundary(x, mask)
    plan = launch.rows(m, A, x.element_size(), wide, _sms(x.device))
    best = torch.empty((plan.splits, m), dtype=dtype, device=x.device)
    aux = None
    if kind != "max":
        aux = torch.empty_like(best, dtype=torch.int32 if kind == "argmax" else dtype)
    if m:
        run(
            row_fwd_kernel, plan.programs,
            best, aux, x, mask, terminated, inverse,
            m, A, *_row_strides(x), shift, *_row_strides(None if wide else mask), plan.splits, plan.chunk,
            KIND=kind, WIDE=wide, VEC=16 // x.element_size(), ROWS=plan.rows, BLOCK=plan.block, ACC=_ACC[dtype],
            num_warps=4,
        )  # fmt: skip
    return Partial(best, aux, plan.splits)


def _from_boundary(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int, bool]:
    """Views of x and its mask that start at the 16-byte boundary at or before x's first element, how many elements
    that is before, and whether they can be read 16 bytes at a time: the mask must lie as x does.

    A kernel is compiled for 16-byte loads only where its pointer is a multiple of 16: x[:, 1:] is not.
    """
    if x.stride(-1) != 1 or (mask is not None and mask.stride() != x.stride()):
        return x, mask, 0, False
    shift = x.data_ptr() % 16 // x.element_size()
    if shift == 0 or any(y is not None and y.storage_offset() < shift for y in (x, mask)):
        return x, mask, 0, True
    return _moved_back(x, shift), None if mask is None else _moved_back(mask, shift), shift, True


def _moved_back(x: Tensor, shift: int) -> Tensor:
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - shift)


Strides = tuple[int | None, int | None, int | None, int | None]


def _row_strides(x: Tensor | None) -> Strides:
    """(inner, stride_outer, stride_inner, stride_action) of an (n, A) or (outer, inner, A) tensor."""
    if x is None:
        return None, None, None, None
    if x.dim() == 2:
        return None, None, x.stride(0), x.stride(1)
    return x.shape[1], x.stride(0), x.stride(1), x.stride(2)


def _strides_unless_flat(x: Tensor | None) -> Strides:
    return _row_strides(None if x is None or x.is_contiguous() else x)


@cache
def _sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: small enough that small test shapes are split too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device current; asking first is cheaper than switching always."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
