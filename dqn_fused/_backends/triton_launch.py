"""Triton: how kernels are launched, on the tensors' device and the current stream, and what all losses launch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqn_fused._backends import triton_program
from dqn_fused._backends.triton_program import Program, Run
from dqn_fused.kernels import launch
from dqn_fused.kernels.mask import count_kernel
from dqn_fused.kernels.td_loss import sum_kernel

INTERPRETED = not isinstance(sum_kernel, triton.runtime.JITFunction)
# For every kernel. If a product and a sum were fused in one lane but not in another that holds a copy of the same row,
# the two would differ in the last bit, and both store, in no fixed order. It costs 4 and 9 registers in two of 67
# kernels on sm_90, none on sm_80 and gfx942.
OPTIONS = {"enable_fp_fusion": False}
ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> Any:
    """Launch a kernel on a one-dimensional grid: grid.y ends at 65,535. Returns what Triton has compiled."""
    return kernel[(programs,)](*args, **OPTIONS, **meta)


def run_program(
    build: triton_program.Build, names: Sequence[str], given: Sequence[Any], spec: Any, device: torch.device
) -> list[Any]:
    """Run a program on the tensors' device; asking which is current is cheaper than switching always."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return triton_program.call(build, names, given, spec, device, run)
    with torch.cuda.device(device):
        return triton_program.call(build, names, given, spec, device, run)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device current; asking first is cheaper than switching always."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: small enough that small test shapes are split too
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_sum(run: Run, loss: Tensor | str, partial: Tensor | str, count: int, dtype: torch.dtype) -> None:
    """Sum of the partial sums."""
    run(sum_kernel, 1, loss, partial, count, BLOCK=launch.MAX_PROGRAMS, ACC=ACC[dtype], num_warps=launch.SUM_WARPS)


def count_mask(program: Program, n: int, num_warps: int) -> str | None:
    """Numbers of the true entries of the parts of a mask; None if the next launch counts all of them itself."""
    programs = launch.counts(n, num_warps)
    if programs == 0:
        return None
    counts = program.empty("counts", (programs,), torch.int32)
    program.launch(
        count_kernel, programs, counts, "non_final_mask", n,
        COUNTED=launch.COUNTED, BLOCK=launch.COUNTED_A_WARP * 4, num_warps=4,
    )  # fmt: skip
    return counts


def named(given: Any) -> Any:
    """A Batch, or what is saved of one, with names for tensors."""
    return given._make(name if isinstance(x, Tensor) else x for name, x in zip(given._fields, given, strict=True))


Strides = tuple[int | None, int | None, int | None, int | None]


def row_strides(x: Tensor | None) -> Strides:
    """(inner, stride_outer, stride_inner, stride_action) of an (n, A) or (outer, inner, A) tensor."""
    if x is None:
        return None, None, None, None
    if x.dim() == 2:
        return None, None, x.stride(0), x.stride(1)
    return x.shape[1], x.stride(0), x.stride(1), x.stride(2)


def strides_unless_flat(x: Tensor | None) -> Strides:
    return row_strides(None if x is None or x.is_contiguous() else x)
