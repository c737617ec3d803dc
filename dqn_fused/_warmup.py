"""Compilation ahead of a CUDA graph, which cannot hold it."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dqn_fused._backends import capturing
from dqn_fused.arguments import looks_at_values
from dqn_fused.categorical import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
)
from dqn_fused.loss import fused_dqn_loss, fused_dqn_loss_and_grad
from dqn_fused.quantile import fused_quantile_loss, fused_quantile_loss_and_grad

_AND_GRAD: dict[Any, Callable[..., Any]] = {
    fused_dqn_loss: fused_dqn_loss_and_grad,
    fused_quantile_loss: fused_quantile_loss_and_grad,
    fused_categorical_loss: fused_categorical_loss_and_grad,
    fused_categorical_td_loss: fused_categorical_td_loss_and_grad,
}
_LEARNED = ("q", "quantiles", "logits", "hidden", "weight", "bias")  # arguments that receive a gradient
_NEXT = ("next_q", "next_quantiles", "next_logits", "next_hidden")  # one row for each true entry of non_final_mask


def warmup(*args: Any, **kwargs: Any) -> None:
    """Compile and load everything that a loss, its backward and its ``..._and_grad`` need.

    Call it once before a CUDA graph is captured, or before anything is timed. Which kernel runs depends on dtypes,
    shapes and strides, on where each tensor begins in memory, to 16 bytes, and on the options; so give it the tensors
    that the graph will read, or tensors with the same layout.

    Args:
        *args: the loss, a function or a module of this package, then its arguments; without a loss those of
            ``fused_dqn_loss``. Nothing is changed: no gradient is accumulated, whatever the tensors require. Their
            values are read but do not matter, not even those of actions and ``non_final_mask``: the memory need not
            be filled yet. Only the atoms of a ``support`` must be there.
        **kwargs: those of the loss, ``backend`` included.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as the loss.
        RuntimeError: a CUDA graph is being captured on this stream.

    On the CPU it is a call like any other.

    >>> import torch
    >>> from dqn_fused import fused_quantile_loss, warmup
    >>> q, next_q = torch.empty(32, 18), torch.empty(32, 18)
    >>> actions, rewards = torch.empty(32, dtype=torch.int64), torch.empty(32)
    >>> warmup(q, actions, rewards, next_q, gamma=0.99, loss="huber")
    >>> quantiles, next_quantiles = torch.empty(32, 18, 50), torch.empty(32, 18, 50)
    >>> warmup(fused_quantile_loss, quantiles, actions, rewards, next_quantiles, kappa=0.5)
    """
    if capturing():
        raise RuntimeError("warmup: expected a call before the capture of a CUDA graph, not within one")
    loss: Callable[..., Any] = fused_dqn_loss
    if args and callable(args[0]):
        loss, *args = args  # type: ignore[assignment]
    bound = signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(*args, **kwargs)
    given = bound.arguments
    given |= _valid(given)
    learned = {name: given[name] for name in _LEARNED if name in given}
    given |= {name: x.detach().requires_grad_() for name, x in learned.items() if _floating(x)}
    inputs = [given[name] for name in learned if _floating(given[name])]
    if isinstance(head := given.get("head"), nn.Module):
        inputs += [x for x in head.parameters() if x.requires_grad]
    with torch.enable_grad():
        found = loss(*bound.args, **bound.kwargs)
        result = found[0] if isinstance(found, tuple) else found
        torch.autograd.grad(result, inputs, torch.ones_like(result))
    if loss in _AND_GRAD:
        _AND_GRAD[loss](*bound.args, **bound.kwargs)


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _valid(given: dict[str, Any]) -> dict[str, Tensor]:
    """Values that pass where they are looked at."""
    actions, mask = given.get("actions"), given.get("non_final_mask")
    following = next((given[name] for name in _NEXT if name in given), None)
    valid = {}
    if isinstance(actions, Tensor) and looks_at_values(actions.device):
        valid["actions"] = torch.zeros_like(actions)
        if isinstance(mask, Tensor) and mask.dtype is torch.bool and isinstance(following, Tensor) and following.dim():
            order = torch.arange(mask.numel(), device=mask.device)
            valid["non_final_mask"] = (order < following.shape[0]).reshape(mask.shape)
    return valid
