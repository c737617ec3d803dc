"""Triton: what the losses of distributions share, the gradient of (n, A, K) above all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqn_fused._backends.triton_launch import run_program
from dqn_fused._backends.triton_program import Program
from dqn_fused.kernels import launch
from dqn_fused.kernels.distributions_bwd import rows_bwd_kernel
from dqn_fused.row_loss import SavedRows, rows_gradient


def rows_backward(grad_loss: Tensor, saved: SavedRows) -> Tensor:
    """Return the gradient of a distributional loss, in one launch."""
    if torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # of is_grads_batched=True: it has no address
        return rows_gradient(grad_loss, saved)
    if saved.actions.numel() == 0:
        return torch.empty(saved.shape, dtype=saved.dtype, device=saved.slopes.device)
    (gradient,) = run_program(_backward, _SAVED, (grad_loss, *saved), None, saved.slopes.device)
    found: Tensor = gradient
    return found


_SAVED = ("grad_loss", *SavedRows._fields)


def _backward(program: Program, given: Sequence[Any], spec: None) -> None:
    """Build what rows_backward launches."""
    slopes, _, weights, shape, dtype, reduction = SavedRows(*given[1:])
    gradient = program.empty("gradient", shape, dtype)
    n, K = slopes.shape
    store_rows(
        program, gradient, "grad_loss", "slopes", "actions", None if weights is None else "weights",
        (n, shape[-2], K), dtype, reduction,
    )  # fmt: skip
    program.returns(gradient)


def store_rows(
    program: Program, gradient: str, grad_loss: str | None, slopes: str, actions: str, weights: str | None,
    shape: tuple[int, int, int], dtype: torch.dtype, reduction: str,
) -> None:  # fmt: skip
    """Write a gradient of (n, A, K) elements: slopes, (n, K), in the rows of the actions; grad_loss None is ones."""
    n, A, K = shape
    block, run_length = launch.backward(K, dtype.itemsize, dense=True)
    program.launch(
        rows_bwd_kernel, launch.cdiv(n * A * K, block),
        gradient, grad_loss, slopes, actions, weights,
        n, A, K, n if reduction == "mean" else 1,
        PER_ROW=reduction == "none", FAR=n * A * K > 2**31 - 1 - block, RUN=run_length, BLOCK=block, num_warps=4,
    )  # fmt: skip
