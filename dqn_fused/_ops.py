"""Schemas and fakes of the compiled ops; the libraries built from csrc/ add the kernels."""

import torch
from torch import Tensor
from torch.library import Library

BATCH = (
    "Tensor q, Tensor actions, Tensor rewards, Tensor next_q, Tensor? terminated, Tensor? non_final_mask, "
    "Tensor? gammas, float gamma, int reduction, bool check"
)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # enum Reduction of csrc/td_loss.h

_library = Library("dqn_fused", "DEF")
_library.define(f"td_loss({BATCH}) -> (Tensor loss, Tensor td_error)")
_library.define(f"td_loss_and_grad({BATCH}) -> (Tensor loss, Tensor grad_q, Tensor td_error)")
_library.define(
    "td_loss_backward(Tensor grad_loss, Tensor td_error, Tensor actions, int A, ScalarType dtype, int reduction) "
    "-> Tensor grad_q"
)
for _name in ("td_loss", "td_loss_and_grad", "td_loss_backward"):
    # Autograd stops here: TDLoss has the derivative, and loss_and_grad gives it.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("dqn_fused::td_loss", lib=_library)
def _td_loss(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None,
    non_final_mask: Tensor | None,
    gammas: Tensor | None,
    gamma: float,
    reduction: int,
    check: bool,
) -> tuple[Tensor, Tensor]:
    for x in (actions, rewards, next_q, terminated, non_final_mask, gammas):
        if x is not None and x.device != q.device:
            raise RuntimeError(f"expected all tensors on {q.device}, as q, got {x.device}")
    n, dtype = actions.shape[0], torch.float64 if q.dtype is torch.float64 else torch.float32
    per_row = reduction == REDUCTIONS["none"]
    return q.new_empty((n,) if per_row else (), dtype=dtype), q.new_empty((n,), dtype=dtype)


@torch.library.register_fake("dqn_fused::td_loss_and_grad", lib=_library)
def _td_loss_and_grad(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None,
    non_final_mask: Tensor | None,
    gammas: Tensor | None,
    gamma: float,
    reduction: int,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, td_error = _td_loss(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, reduction, check)
    return loss, q.new_empty((actions.shape[0], q.shape[-1])), td_error


@torch.library.register_fake("dqn_fused::td_loss_backward", lib=_library)
def _td_loss_backward(
    grad_loss: Tensor, td_error: Tensor, actions: Tensor, A: int, dtype: torch.dtype, reduction: int
) -> Tensor:
    return td_error.new_empty((actions.shape[0], A), dtype=dtype)


td_loss = torch.ops.dqn_fused.td_loss.default
td_loss_and_grad = torch.ops.dqn_fused.td_loss_and_grad.default
td_loss_backward = torch.ops.dqn_fused.td_loss_backward.default
