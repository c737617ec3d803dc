"""Triton: allocates the outputs, chooses the launch and runs the kernels on the tensors' device and stream."""

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.kernels import launch
from dqn_fused.kernels.td_loss import row_max_fwd_kernel, sum_kernel, td_loss_bwd_kernel, td_loss_fwd_kernel

INTERPRETED = not isinstance(td_loss_fwd_kernel, triton.runtime.JITFunction)
OLDEST = (3, 4)
SUM_BLOCK = 1024
CHECKS_CPU = False
PARTLY = ""


def unavailable() -> str | None:
    """Say why Triton cannot run here."""
    version = tuple(int(x) for x in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA or ROCm device (TRITON_INTERPRET=1, set before the first import, runs them on the CPU, slowly)"


def refuses(device: torch.device) -> str | None:
    """Serve CUDA tensors, and CPU tensors in the interpreter."""
    expected = "cpu" if INTERPRETED else "cuda"
    return None if device.type == expected else f"expected tensors on {expected}, got {device}"


def forward(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Return (loss, td_error): one launch for a small batch, a second one where several programs share the work."""
    q, next_q, device = batch.q, batch.next_q, batch.q.device
    dtype = accumulation_dtype(q)
    acc = _ACC[dtype]
    n, A = batch.actions.numel(), q.shape[-1]
    td_error = torch.empty(batch.shape, dtype=dtype, device=device)
    if n == 0:
        return torch.empty(batch.shape, dtype=dtype, device=device) if spec.reduction == "none" else (
            td_error.mean() if spec.reduction == "mean" else td_error.sum()
        ), td_error  # fmt: skip
    rank = final = None
    if batch.non_final_mask is not None:
        final, rank = batch.non_final_mask, batch.non_final_mask.cumsum(0)
    else:
        final = batch.terminated
    gamma, gamma_kind = batch.gamma, "number"
    if isinstance(gamma, Tensor):
        gamma_kind = "scalar" if gamma.dim() == 0 else "per_sample"
    elif dtype is torch.float64:  # a float argument reaches a kernel as float32
        gamma, gamma_kind = torch.full((), gamma, dtype=dtype, device=device), "scalar"

    per_row = spec.reduction == "none"
    with _on(device):
        m = next_q.shape[:-1].numel()
        split = launch.split(m, A, next_q.element_size(), next_q.stride(-1) == 1, _sms(device))
        if split is not None:
            next_q = _split_row_max(next_q, None if rank is not None else final, split, dtype)
        K = next_q.shape[-1]
        plan = launch.forward(n, K, next_q.element_size(), next_q.stride(-1) == 1)
        single = plan.programs == 1
        count = n if spec.reduction == "mean" else 1
        loss = torch.empty(batch.shape if per_row else () if single else plan.programs, dtype=dtype, device=device)
        run(
            td_loss_fwd_kernel, plan.programs,
            loss, td_error, q, batch.actions, batch.rewards, next_q, final, rank, gamma,
            n, m, A, K, plan.rows_per_program, *_row_strides(q), *_row_strides(next_q), count if single else 1,
            GAMMA=gamma_kind, PER_ROW=per_row, LAYOUT=plan.layout, VEC=16 // next_q.element_size(),
            ROWS=plan.tile.rows, BLOCK=plan.tile.block, ACC=acc, num_warps=plan.tile.num_warps,
        )  # fmt: skip
        if single or per_row:
            return loss, td_error
        total = torch.empty((), dtype=dtype, device=device)
        run(sum_kernel, 1, total, loss, plan.programs, count, BLOCK=SUM_BLOCK, ACC=acc, num_warps=4)
    return total, td_error


def backward(
    grad_loss: Tensor, td_error: Tensor, actions: Tensor, q_shape: torch.Size, q_dtype: torch.dtype, spec: LossSpec
) -> Tensor:
    """Return grad_q in one launch."""
    grad_q = torch.empty(q_shape, dtype=q_dtype, device=td_error.device)
    n, A = actions.numel(), q_shape[-1]
    if n:
        block, wide = launch.backward(A, grad_q.element_size())
        with _on(td_error.device):
            run(
                td_loss_bwd_kernel, launch.cdiv(n * A, block),
                grad_q, grad_loss, td_error, actions, n, A, n if spec.reduction == "mean" else 1,
                PER_ROW=spec.reduction == "none", WIDE=wide, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return grad_q


def loss_and_grad(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, grad_q, td_error): the launches of forward and that of backward, one after the other."""
    loss, td_error = forward(batch, spec)
    ones = torch.ones(batch.shape if spec.reduction == "none" else (), dtype=td_error.dtype, device=td_error.device)
    q_shape = torch.Size((*batch.shape, batch.q.shape[-1]))
    return loss, backward(ones, td_error, batch.actions, q_shape, batch.q.dtype, spec), td_error


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launch a kernel on a one-dimensional grid: grid.y ends at 65,535."""
    kernel[(programs,)](*args, **meta)


def _split_row_max(next_q: Tensor, terminated: Tensor | None, split: launch.Split, dtype: torch.dtype) -> Tensor:
    """Maxima of column ranges, as an (m, splits) matrix whose rows the forward kernel then finishes."""
    m = next_q.shape[:-1].numel()
    partial = torch.empty((split.splits, m), dtype=dtype, device=next_q.device)
    run(
        row_max_fwd_kernel, split.row_blocks * split.splits,
        partial, next_q, terminated, m, next_q.shape[-1], *_row_strides(next_q), split.chunk,
        SPLITS=split.splits, VEC=16 // next_q.element_size(), ROWS=split.tile.rows, BLOCK=split.tile.block,
        ACC=_ACC[dtype], num_warps=split.tile.num_warps,
    )  # fmt: skip
    return partial.t()


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
