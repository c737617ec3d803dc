"""Triton: allocates the outputs, chooses the launch and runs the kernels on the tensors' device and stream."""

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused._backends.triton_sweep import sweep as sweep
from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.kernels import launch
from dqn_fused.kernels.td_loss import row_max_fwd_kernel, sum_kernel, td_loss_bwd_kernel, td_loss_fwd_kernel
from dqn_fused.reference import loss_of_td_error

INTERPRETED = not isinstance(td_loss_fwd_kernel, triton.runtime.JITFunction)
OLDEST = (3, 6)
SUM_BLOCK = 1024
CHECKS_CPU = False
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
        return None
    return "no CUDA or ROCm device (TRITON_INTERPRET=1, set before the first import, runs them on the CPU, slowly)"


def refuses(device: torch.device, spec: LossSpec) -> str | None:
    """Serve CUDA tensors, and CPU tensors in the interpreter."""
    expected = "cpu" if INTERPRETED else "cuda"
    return None if device.type == expected else f"expected tensors on {expected}, got {device}"


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return (loss, td_error): one launch for a small batch, a second one where several programs share the work."""
    loss, td_error, _ = _forward(batch, spec, None)
    return loss, td_error


def backward(
    grad_loss: Tensor, td_error: Tensor, actions: Tensor, q_shape: torch.Size, q_dtype: torch.dtype, spec: LossSpec
) -> Tensor:
    """Return grad_q in one launch."""
    grad_q = torch.empty(q_shape, dtype=q_dtype, device=td_error.device)
    _store_gradient(grad_q, grad_loss, td_error, actions, spec)
    return grad_q


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, grad_q, td_error): up to 64 actions the forward launch writes grad_q too, above one more does."""
    q = batch.q
    grad_q = torch.empty((*batch.shape, q.shape[-1]), dtype=q.dtype, device=q.device)
    loss, td_error, stored = _forward(batch, spec, grad_q)
    if not stored:
        _store_gradient(grad_q, None, td_error, batch.actions, spec)
    return loss, grad_q, td_error


def _forward(batch: Batch, spec: LossSpec, grad_q: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """Loss, TD errors, and whether grad_q is filled."""
    # A pointer does not carry the lazy minus sign of conj().imag; per-sample tensors lost it when made contiguous.
    q, next_q, device = batch.q.resolve_neg(), batch.next_q.resolve_neg(), batch.q.device
    dtype = accumulation_dtype(q)
    acc = _ACC[dtype]
    n, A = batch.actions.numel(), q.shape[-1]
    td_error = torch.empty(batch.shape, dtype=dtype, device=device)
    if n == 0:
        return loss_of_td_error(td_error, spec), td_error, True
    rank, final = None, batch.terminated
    if batch.non_final_mask is not None:
        rank, final = batch.non_final_mask.cumsum(0), batch.non_final_mask
    gamma, gamma_kind = batch.gamma, "number"
    if isinstance(gamma, Tensor):
        gamma_kind = "scalar" if gamma.dim() == 0 else "per_sample"
    elif dtype is torch.float64:  # a float argument reaches a kernel as float32
        gamma, gamma_kind = torch.full((), gamma, dtype=dtype, device=device), "scalar"

    per_row = spec.reduction == "none"
    with _on(device):
        m = next_q.shape[:-1].numel()
        split = launch.split(m, A, next_q.element_size(), next_q.stride(-1) == 1, _sms(device))
        next_q, shift = _from_boundary(next_q)
        if split is not None:
            next_q, shift = _split_row_max(next_q, shift, None if rank is not None else final, split, dtype), 0
        K = next_q.shape[-1]
        with_grad = grad_q is not None and split is None
        plan = launch.forward(n, K, next_q.element_size(), next_q.stride(-1) == 1, with_grad)
        stores_grad = with_grad and plan.layout == "narrow"
        loss = torch.empty(
            batch.shape if per_row else () if plan.programs == 1 else plan.programs, dtype=dtype, device=device
        )
        run(
            td_loss_fwd_kernel, plan.programs,
            loss, td_error, grad_q if stores_grad else None,
            q, batch.actions, batch.rewards, next_q, final, rank, gamma,
            n, m, A, K, *_row_strides(q), *_row_strides(next_q), shift, _count(n, spec),
            GAMMA=gamma_kind, PER_ROW=per_row, LAYOUT=plan.layout, VEC=16 // next_q.element_size(),
            TILES=plan.tiles, ROWS=plan.rows, BLOCK=plan.block, ACC=acc, num_warps=plan.num_warps,
        )  # fmt: skip
        if not per_row and plan.programs > 1:
            partial, loss = loss, torch.empty((), dtype=dtype, device=device)
            run(sum_kernel, 1, loss, partial, plan.programs, BLOCK=SUM_BLOCK, ACC=acc, num_warps=4)
    return loss, td_error, stores_grad


def _store_gradient(
    grad_q: Tensor, grad_loss: Tensor | None, td_error: Tensor, actions: Tensor, spec: LossSpec
) -> None:
    """Write grad_q; grad_loss None stands for ones."""
    n, A = actions.numel(), grad_q.shape[-1]
    if n == 0:
        return
    block, wide = launch.backward(A, grad_q.element_size())
    with _on(td_error.device):
        run(
            td_loss_bwd_kernel, launch.cdiv(n * A, block),
            grad_q, grad_loss, td_error, actions, n, A, _count(n, spec),
            PER_ROW=spec.reduction == "none", WIDE=wide, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _count(n: int, spec: LossSpec) -> int:
    return n if spec.reduction == "mean" else 1


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launch a kernel on a one-dimensional grid: grid.y ends at 65,535."""
    kernel[(programs,)](*args, **meta)


def _split_row_max(
    next_q: Tensor, shift: int, terminated: Tensor | None, split: launch.Split, dtype: torch.dtype
) -> Tensor:
    """Maxima of column ranges, as an (m, splits) matrix whose rows the forward kernel then finishes."""
    m = next_q.shape[:-1].numel()
    partial = torch.empty((split.splits, m), dtype=dtype, device=next_q.device)
    run(
        row_max_fwd_kernel, m * split.splits,
        partial, next_q, terminated, m, next_q.shape[-1], *_row_strides(next_q), shift, split.splits, split.chunk,
        VEC=16 // next_q.element_size(), BLOCK=split.block, ACC=_ACC[dtype], num_warps=4,
    )  # fmt: skip
    return partial.t()


def _from_boundary(x: Tensor) -> tuple[Tensor, int]:
    """View that starts at the 16-byte boundary at or before x's first element, and how many elements that is before.

    A kernel is compiled for 16-byte loads only where its pointer is a multiple of 16: x[:, 1:] is not.
    """
    shift = x.data_ptr() % 16 // x.element_size()
    if shift == 0 or x.storage_offset() < shift:
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - shift), shift


def _row_strides(x: Tensor) -> tuple[int | None, int | None, int, int]:
    """(inner, stride_outer, stride_inner, stride_action) of an (n, A) or (outer, inner, A) tensor."""
    if x.dim() == 2:
        return None, None, x.stride(0), x.stride(1)
    return x.shape[1], x.stride(0), x.stride(1), x.stride(2)


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
