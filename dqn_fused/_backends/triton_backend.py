"""Triton: allocates the outputs, chooses the launch and runs the kernels on the tensors' device and stream."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused._backends import capturing, triton_ops, triton_program
from dqn_fused._backends.triton_program import OLDEST, VERSION, Program, Run
from dqn_fused._backends.triton_sweep import auto_sweep, sweep
from dqn_fused._backends.triton_sweep_backward import auto_sweep_backward, sweep_backward
from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.autograd import Saved, loss_gradient
from dqn_fused.kernels import launch
from dqn_fused.kernels.mask import count_kernel
from dqn_fused.kernels.rows import row_fwd_kernel
from dqn_fused.kernels.td_loss import sum_kernel, td_loss_fwd_kernel
from dqn_fused.kernels.td_loss_bwd import td_loss_bwd_kernel
from dqn_fused.reference import loss_of_td_error

__all__ = ["auto_sweep", "auto_sweep_backward", "sweep", "sweep_backward"]

INTERPRETED = not isinstance(td_loss_fwd_kernel, triton.runtime.JITFunction)
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
    if VERSION < OLDEST:
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
            _sum(run, loss, partial, 1, torch.float32)
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
    if batch.actions.numel() == 0:
        return _of_nothing(batch, spec)
    loss, td_error, normaliser = _run(_forward, Batch._fields, _resolved(batch), spec, batch.q.device)
    return loss, td_error, normaliser


def backward(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Return grad_q in one launch."""
    if torch.compiler.is_compiling():
        return triton_ops.backward(grad_loss, saved, spec)
    if torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # of is_grads_batched=True: it has no address
        return loss_gradient(grad_loss, saved, spec)
    q, device = saved.q, saved.td_error.device
    if saved.actions.numel() == 0:
        return torch.empty(saved.q_shape, dtype=saved.q_dtype, device=device)
    if q is not None and q.is_neg():
        saved = saved._replace(q=q.resolve_neg())
    (grad_q,) = _run(_backward, _SAVED, (grad_loss, *saved), spec, device)
    return grad_q


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, grad_q, td_error, normaliser): up to 64 actions in the forward launch, above in one more."""
    if torch.compiler.is_compiling():
        return triton_ops.loss_and_grad(batch, spec)
    q = batch.q
    if batch.actions.numel() == 0:
        grad_q = torch.empty((*batch.shape, q.shape[-1]), dtype=q.dtype, device=q.device)
        loss, td_error, normaliser = _of_nothing(batch, spec)
    else:
        loss, grad_q, td_error, normaliser = _run(_loss_and_grad, Batch._fields, _resolved(batch), spec, q.device)
    return loss, grad_q, td_error, normaliser


def _of_nothing(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Results of a batch without a sample, which needs no launch."""
    dtype, device = accumulation_dtype(batch.q), batch.q.device
    td_error = torch.empty(batch.shape, dtype=dtype, device=device)
    normaliser = torch.empty((2, *batch.shape), dtype=dtype, device=device) if spec.cql else None
    return loss_of_td_error(td_error, normaliser, batch, spec), td_error, normaliser


def _resolved(batch: Batch) -> Batch:
    """A pointer does not carry the lazy minus sign of conj().imag; per-sample tensors lost it when made contiguous."""
    q, _, _, next_q, _, _, _, online, _, _, target_q, *_ = batch
    if (
        q.is_neg()
        or (next_q is not None and next_q.is_neg())
        or (online is not None and online.is_neg())
        or (target_q is not None and target_q.is_neg())
    ):
        next_q, online, target_q = (None if x is None else x.resolve_neg() for x in (next_q, online, target_q))
        return batch._replace(q=q.resolve_neg(), next_q=next_q, next_q_online=online, target_q=target_q)
    return batch


def _run(
    build: triton_program.Build, names: Sequence[str], given: Sequence[Any], spec: LossSpec, device: torch.device
) -> list[Any]:
    """Run a program on the tensors' device; asking which is current is cheaper than switching always."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return triton_program.call(build, names, given, spec, device, run)
    with torch.cuda.device(device):
        return triton_program.call(build, names, given, spec, device, run)


class Partial(NamedTuple):
    """What row_fwd_kernel has left of the rows of a matrix."""

    best: str | None = None  # (splits, m)
    aux: str | None = None
    splits: int = 1


def _forward(program: Program, batch: Batch, spec: LossSpec) -> None:
    """Build what forward launches."""
    program.returns(*_store_loss(program, batch, spec, None))


def _loss_and_grad(program: Program, batch: Batch, spec: LossSpec) -> None:
    """Build what loss_and_grad launches."""
    q = batch.q
    narrow = q.shape[-1] <= launch.NARROW
    grad_q = program.empty("grad_q", (*batch.shape, q.shape[-1]), q.dtype)
    loss, td_error, normaliser = _store_loss(program, batch, spec, grad_q if narrow else None)
    if not narrow:
        at = _named(batch)
        _store_gradient(
            program, spec, grad_q, None, td_error, at.saved_actions, at.weights, normaliser, q, batch.action_mask,
            (batch.actions.numel(), q.shape[-1]), q.dtype,
        )  # fmt: skip
    program.returns(loss, grad_q, td_error, normaliser)


def _backward(program: Program, given: Sequence[Any], spec: LossSpec) -> None:
    """Build what backward launches."""
    saved = Saved(*given[1:])
    _, actions, _, _, q, mask, q_shape, dtype = saved
    at = _named(saved)
    grad_q = program.empty("grad_q", q_shape, dtype)
    _store_gradient(
        program, spec, grad_q, "grad_loss", at.td_error, at.actions, at.weights, at.normaliser, q, mask,
        (actions.numel(), q_shape[-1]), dtype,
    )  # fmt: skip
    program.returns(grad_q)


_SAVED = ("grad_loss", *Saved._fields)


def _named(given: Any) -> Any:
    """A Batch or Saved with names for tensors."""
    return given._make(name if isinstance(x, Tensor) else x for name, x in zip(given._fields, given, strict=True))


def _store_loss(program: Program, batch: Batch, spec: LossSpec, grad_q: str | None) -> tuple[str, str, str | None]:
    """Loss, TD errors and normaliser of the conservative term; grad_q is filled if given."""
    q, next_q, online, target_q = batch.q, batch.next_q, batch.next_q_online, batch.target_q
    next_mask, mask, at = batch.next_action_mask, batch.action_mask, _named(batch)
    dtype, n, A = accumulation_dtype(q), batch.actions.numel(), q.shape[-1]
    m = 0 if next_q is None else next_q.shape[:-1].numel()
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
    counts = None if batch.non_final_mask is None else _count_mask(program, n, plan)
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
        *_row_strides(q), *_row_strides(next_q), *_row_strides(online), *_row_strides(next_mask),
        *_row_strides(target_q), *_row_strides(mask),
        _count(n, spec),
        LOSS=spec.loss, VALUE=None if next_q is None else value, GAMMA=gamma_kind,
        PER_ROW=per_row, NARROW=narrow,
        TILES=plan.tiles, ROWS=plan.rows, BLOCK=plan.block,
        COUNTED=launch.COUNTED, COUNT_BLOCK=launch.COUNTED_A_WARP * plan.num_warps,
        ACC=_ACC[dtype], CHOICE_ACC=_ACC[choice_dtype], num_warps=plan.num_warps,
    )  # fmt: skip
    if summed:
        _sum(program.launch, loss, "partial", plan.programs, dtype)
    return loss, td_error, normaliser


def _sum(run: Run, loss: Tensor | str, partial: Tensor | str, count: int, dtype: torch.dtype) -> None:
    """Sum of the partial sums."""
    run(sum_kernel, 1, loss, partial, count, BLOCK=launch.MAX_PROGRAMS, ACC=_ACC[dtype], num_warps=launch.SUM_WARPS)


def _count_mask(program: Program, n: int, plan: launch.Forward) -> str | None:
    """True entries of each part of a mask, where the launch that follows does not count all of them itself."""
    programs = launch.counts(n, plan)
    if programs == 0:
        return None
    counts = program.empty("counts", (programs,), torch.int32)
    program.launch(
        count_kernel, programs, counts, "non_final_mask", n,
        COUNTED=launch.COUNTED, BLOCK=launch.COUNTED_A_WARP * 4, num_warps=4,
    )  # fmt: skip
    return counts


def _store_gradient(
    program: Program, spec: LossSpec, grad_q: str, grad_loss: str | None,
    td_error: str, actions: str, weights: str | None, normaliser: str | None, q: Tensor | None, mask: Tensor | None,
    shape: tuple[int, int], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write grad_q, of (n, A) elements; grad_loss None stands for ones."""
    n, A = shape
    if not spec.dense_gradient:
        normaliser = q = mask = None
    block, run_length = launch.backward(A, dtype.itemsize, dense=q is not None)
    program.launch(
        td_loss_bwd_kernel, launch.cdiv(n * A, block),
        grad_q, grad_loss, td_error, actions, weights, normaliser,
        None if q is None else "q", None if mask is None else "action_mask",
        *_numbers(program, spec, torch.float64 if dtype is torch.float64 else torch.float32),
        n, A, _count(n, spec), *_strides_unless_flat(q), *_strides_unless_flat(mask),
        LOSS=spec.loss, PER_ROW=spec.reduction == "none", FAR=n * A > 2**31 - 1 - block,
        RUN=run_length, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _count(n: int, spec: LossSpec) -> int:
    return n if spec.reduction == "mean" else 1


def _numbers(program: Program, spec: LossSpec, dtype: torch.dtype) -> tuple[float | str | None, float | str | None]:
    """(delta, cql_alpha), None where they mean nothing."""
    delta = None if spec.loss == "mse" else program.number(spec.delta, dtype)
    return delta, program.number(spec.cql_alpha, dtype) if spec.dense_gradient else None


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> Any:
    """Launch a kernel on a one-dimensional grid: grid.y ends at 65,535. Returns what Triton has compiled."""
    return kernel[(programs,)](*args, **OPTIONS, **meta)


def _reduce_rows(
    program: Program, name: str, x: Tensor, mask_name: str, mask: Tensor | None, terminated: str | None,
    kind: str, inverse: Any, dtype: torch.dtype,
) -> Partial:  # fmt: skip
    """Reduce the rows of x that are not terminated over the actions that are legal."""
    m, A = x.shape[:-1].numel(), x.shape[-1]
    shift, wide = _from_boundary(x, mask)
    plan = launch.rows(m, A, x.element_size(), wide, _sms(x.device))
    best = program.empty(f"{name} best", (plan.splits, m), dtype)
    aux = None
    if kind != "max":
        aux = program.empty(f"{name} aux", (plan.splits, m), torch.int32 if kind == "argmax" else dtype)
    if m:
        program.launch(
            row_fwd_kernel, plan.programs,
            best, aux, program.moved(name, shift), None if mask is None else program.moved(mask_name, shift),
            terminated, inverse,
            m, A, *_row_strides(x), shift, *_row_strides(None if wide else mask), plan.splits, plan.chunk,
            KIND=kind, WIDE=wide, VEC=16 // x.element_size(), ROWS=plan.rows, BLOCK=plan.block, ACC=_ACC[dtype],
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
