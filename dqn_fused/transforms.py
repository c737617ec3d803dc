"""The loss inside torch.func's transforms: an ensemble of networks under vmap is one larger batch and one launch."""

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dqn_fused._backends import BackendUnavailableError
from dqn_fused.arguments import Batch, LossSpec, check_values, constants, looks_at_values
from dqn_fused.autograd import TDLoss, inside_transform, refuse_forward_mode, save, td_loss
from dqn_fused.checks import rows

PER_SAMPLE = ("actions", "rewards", "terminated", "weights")
MATRICES = ("next_q", "next_q_online", "next_action_mask")
MATRICES_OF_S = ("target_q", "action_mask")


def refuse(name: str, instead: str) -> NoReturn:
    """Raise for what has no rule, and would otherwise fail elsewhere with an unclear error."""
    raise RuntimeError(f"{name}: not inside torch.func's transforms; there, {instead}")


def backend_inside(name: str) -> str:
    """Name of the backend inside a transform; while torch.compile traces it is "torch", with PyTorch's own operations.

    There an autograd.Function silently loses its backward where an op has no derivative of its own.
    """
    if not torch.compiler.is_compiling():
        return name
    if name not in ("auto", "torch"):
        raise BackendUnavailableError(
            f"backend {name!r} cannot serve: inside torch.func's transforms torch.compile takes 'torch', as 'auto' does"
        )
    return "torch"


def transformed_td_loss(
    batch: Batch, spec: LossSpec, backend: ModuleType, q: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """autograd.td_loss inside torch.func.grad, vjp, jacrev or vmap; the values are checked as soon as they can be."""
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            refuse_forward_mode()
        return backend.forward(constants(batch), spec)
    if not looks_at_values(q.device):
        batch = check_values(batch, batch.action_count(), batch.next_count())
    loss, td_error, *normaliser = TransformedTDLoss.apply(q, batch, spec, backend)
    return loss, td_error, normaliser[0] if normaliser else None


class TransformedTDLoss(torch.autograd.Function):
    """TDLoss in the form that torch.func requires, with a rule for vmap. Its backward is in PyTorch's operations."""

    @staticmethod
    def forward(q: Tensor, batch: Batch, spec: LossSpec, backend: ModuleType) -> tuple[Tensor, ...]:
        """Run the backend's forward, below all transforms."""
        if looks_at_values(q.device):
            batch = check_values(batch, batch.action_count(), batch.next_count())
        loss, td_error, normaliser = backend.forward(batch, spec)
        return (loss, td_error) if normaliser is None else (loss, td_error, normaliser)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what TDLoss saves."""
        (q, batch, spec, backend), (_, td_error, *normaliser) = inputs, output
        save(ctx, q, batch, spec, backend, td_error, normaliser[0] if normaliser else None)

    backward = TDLoss.backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Make the members of the ensemble a leading dimension, and reduce each of them."""
        q, batch, spec, backend = inputs
        q, batch = fold(q, batch, in_dims[0], in_dims[1], info.batch_size)
        each = spec._replace(reduction="none")
        run = transformed_td_loss if inside_transform() else _checked_td_loss
        loss, td_error, normaliser = run(batch, each, backend, q)
        if spec.reduction != "none":
            loss = loss.reshape(info.batch_size, q.shape[1:-1].numel())
            loss = loss.mean(1) if spec.reduction == "mean" else loss.sum(1)
        if normaliser is None:
            return (loss, td_error), (0, 0)
        return (loss, td_error, normaliser), (0, 0, 1)


def _checked_td_loss(
    batch: Batch, spec: LossSpec, backend: ModuleType, q: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch = check_values(batch, batch.action_count(), batch.next_count())
    return td_loss(batch, spec, backend, q)


def fold(q: Tensor, batch: Batch, q_dim: int | None, dims: Batch, members: int) -> tuple[Tensor, Batch]:
    """Fold Q-values and a checked batch, whose tensors may have a dimension of members, to a batch of (members, *N)."""

    def lead(x: Tensor, dim: int | None) -> Tensor:  # (members, ...)
        return x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)

    def flat(x: Tensor) -> Tensor:  # with one member or one sample, reshape alone would return an expanded view
        return x.reshape(-1).contiguous()

    if dims.non_final_mask is not None:
        raise ValueError(
            "non_final_mask: expected the same one for every member under vmap, whose tensors cannot hold a different "
            "number of next states each; terminated says the same"
        )
    q = lead(q, q_dim)
    changed: dict[str, Any] = {"shape": q.shape[:-1]}
    for name in PER_SAMPLE:
        x = getattr(batch, name)
        if x is not None:
            changed[name] = flat(lead(x, getattr(dims, name)))
    for name in ("q", *MATRICES, *MATRICES_OF_S):
        x = getattr(batch, name)
        if x is not None:
            x = lead(x, getattr(dims, name))
            compacted = batch.non_final_mask is not None and name in MATRICES
            changed[name] = x.reshape(-1, x.shape[-1]) if compacted else rows(x)
    gamma, mask = batch.gamma, batch.non_final_mask
    if isinstance(gamma, Tensor) and gamma.dim():  # () is one number for all members
        gamma = lead(gamma, dims.gamma)  # type: ignore[arg-type]
        per_member = q.shape[1:-1].numel()
        changed["gamma"] = flat(gamma if gamma.dim() == 2 else gamma.unsqueeze(1).expand(-1, per_member))
    if mask is not None:
        changed["non_final_mask"] = flat(lead(mask, None))
    return q, batch._replace(**changed)
