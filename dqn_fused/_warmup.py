"""Whatever happens once, before it must not: a CUDA graph can hold no compilation."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dqn_fused._backends import capturing
from dqn_fused.arguments import looks_at_values
from dqn_fused.loss import fused_dqn_loss, fused_dqn_loss_and_grad


def warmup(*args: Any, **kwargs: Any) -> None:
    """Compile and load what ``fused_dqn_loss``, its backward and ``fused_dqn_loss_and_grad`` need.

    To be called once before a CUDA graph is captured, or before anything is timed. Which kernel runs depends on dtypes,
    shapes and strides, on where each tensor begins in memory, to 16 bytes, and on the options; so give it the tensors
    that the graph will read, or such as are laid out like them.

    Args:
        *args: those of ``fused_dqn_loss``. Nothing is changed: no gradient is accumulated, whatever the tensors
            require. Their values are read but mean nothing: memory that is not yet filled will do, for actions and
            ``non_final_mask`` too.
        **kwargs: those of ``fused_dqn_loss``, ``backend`` included.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as ``fused_dqn_loss``.
        RuntimeError: a CUDA graph is being captured on this stream.

    On the CPU it is a call like any other.

    >>> import torch
    >>> q, next_q = torch.empty(32, 18), torch.empty(32, 18)
    >>> actions, rewards = torch.empty(32, dtype=torch.int64), torch.empty(32)
    >>> warmup(q, actions, rewards, next_q, gamma=0.99, loss="huber")
    """
    if capturing():
        raise RuntimeError("warmup: expected a call before the capture of a CUDA graph, not within one")
    given = signature(fused_dqn_loss).bind(*args, **kwargs).arguments
    q = given["q"]
    if isinstance(q, Tensor) and looks_at_values(q.device):
        given |= _valid(given["actions"], given.get("non_final_mask"), given["next_q"])
    if isinstance(q, Tensor) and q.is_floating_point():
        given["q"] = q.detach().requires_grad_()
    with torch.enable_grad():
        found = fused_dqn_loss(**given)
        loss = found[0] if isinstance(found, tuple) else found
        torch.autograd.grad(loss, given["q"], torch.ones_like(loss))
    fused_dqn_loss_and_grad(**given)


def _valid(actions: object, mask: object, next_q: object) -> dict[str, Tensor]:
    """Values that pass where they are looked at."""
    valid = {}
    if isinstance(actions, Tensor):
        valid["actions"] = torch.zeros_like(actions)
    if isinstance(mask, Tensor) and mask.dtype is torch.bool and isinstance(next_q, Tensor) and next_q.dim():
        order = torch.arange(mask.numel(), device=mask.device)
        valid["non_final_mask"] = (order < next_q.shape[0]).reshape(mask.shape)
    return valid
