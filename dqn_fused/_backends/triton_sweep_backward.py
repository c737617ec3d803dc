"""Triton: the gradient of a tile of Q-values of a linear head, multiplied once more and scaled in one launch.

The other two products of each tile, for the gradients of hidden and of the weight, are left to the library.
"""

import torch
from torch import Tensor

from dqn_fused._backends import triton_launch
from dqn_fused._backends.triton_program import check_sizes
from dqn_fused._backends.triton_sweep import operand_of, pays, units_of, vectors
from dqn_fused.head import sweep_backward as tiles
from dqn_fused.head.sweep import Sweep
from dqn_fused.head.sweep_backward import Gradients, SweepBackward
from dqn_fused.kernels import sweep_launch
from dqn_fused.kernels.launch import cdiv
from dqn_fused.kernels.sweep_bwd import sweep_bwd_kernel


def sweep_backward(work: SweepBackward) -> Gradients:
    """As head.sweep_backward.sweep_backward, of Q-values that are not rounded, as the kernel of the sweep has them."""
    if torch.float64 in (work.hidden.dtype, work.weight.dtype):
        return tiles.sweep_backward(work)
    check_sizes(*work.hidden.shape, *work.weight.shape)
    hidden, bias = work.hidden.resolve_neg(), work.bias
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    bias = None if bias is None else bias.resolve_neg()
    work = work._replace(hidden=hidden, weight=work.weight.resolve_neg(), bias=bias)
    return tiles.sweep_backward_by(tile_gradient, work)


def auto_sweep_backward(work: SweepBackward) -> Gradients:
    """Gradients by the kernel if the sweep was by its kernel, whose statistics are subtracted here."""
    swept = Sweep(work.hidden, work.weight, work.bias, work.mask, "soft", 1.0)
    return sweep_backward(work) if pays(swept) else tiles.sweep_backward(work)


def tile_gradient(work: SweepBackward, h: Tensor, w: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Gradient of a tile of Q-values, (rows, columns), in hidden's dtype, and its sum over the rows, in float32."""
    device, (m, D), A = h.device, h.shape, w.shape[0]
    grad = torch.empty((m, A), dtype=h.dtype, device=device)
    bias = None if work.bias is None else work.bias[columns]
    mask = None if work.mask is None else work.mask[rows, columns]
    itemsize, vec = vectors(h, w)
    with triton_launch.on(device):
        units, precision = units_of(h.dtype, interpreted=triton_launch.INTERPRETED)
        plan = sweep_launch.backward(m, D, itemsize, mask is not None, units)
        row_tiles = cdiv(m, plan.rows)
        partial = torch.empty((row_tiles, A), dtype=torch.float32, device=device)
        if m:
            triton_launch.run(
                sweep_bwd_kernel, row_tiles * cdiv(A, plan.columns),
                grad, partial, h, w, bias, mask,
                *(x[rows] for x in (work.largest, work.policy, work.taken, work.actions)),
                m, A, D // vec, columns.start,
                h.stride(0) // vec, w.stride(0) // vec, w.stride(1),
                *((None,) if bias is None else bias.stride()), *((None, None) if mask is None else mask.stride()),
                row_tiles,
                OPERAND=operand_of(h.dtype, triton_launch.INTERPRETED), PRECISION=precision, VEC=vec,
                EVEN=D % plan.features == 0, ROWS=plan.rows, COLUMNS=plan.columns, FEATURES=plan.features,
                num_warps=plan.num_warps, num_stages=plan.num_stages,
            )  # fmt: skip
    return grad, partial.sum(0)
