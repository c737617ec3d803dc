"""The loss as a module."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor, nn

from dqn_fused import hints
from dqn_fused.arguments import check_loss
from dqn_fused.ensemble import check_ensemble
from dqn_fused.loss import fused_dqn_loss
from dqn_fused.targets import Munchausen, Soft

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedDQNLoss(nn.Module):
    """``fused_dqn_loss`` as a module that keeps the discount and the options, like ``torch.nn.MSELoss``.

    ``gamma`` is a number or a tensor, which becomes a buffer and moves with the module; a call may bring its own.

    >>> import torch
    >>> criterion = FusedDQNLoss(gamma=0.9, loss="huber")
    >>> criterion
    FusedDQNLoss(gamma=0.9, loss='huber', delta=1.0, reduction='mean')
    >>> criterion(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), torch.ones(2, 3))
    tensor(0.2050)
    """

    gamma: float | Tensor

    def __init__(
        self,
        gamma: float | Tensor = 0.99,
        *,
        loss: str = "mse",
        delta: float = 1.0,
        reduction: str = "mean",
        target: str | Soft | Munchausen = "max",
        cql_alpha: float = 0.0,
        value_transform: str = "identity",
        ensemble: str = "min",
        return_td_error: bool = False,
        return_cql: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            hints.unexpected("FusedDQNLoss", unknown)
        super().__init__()
        check_ensemble(ensemble)
        check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
        if isinstance(gamma, Tensor):
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = gamma
        self.loss, self.delta, self.reduction = loss, delta, reduction
        self.target, self.cql_alpha, self.value_transform = target, cql_alpha, value_transform
        self.ensemble = ensemble
        self.return_td_error, self.return_cql = return_td_error, return_cql
        self.process_group, self.backend = process_group, backend

    def forward(
        self,
        q: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_q: Tensor | Sequence[Tensor],
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        non_final_mask: Tensor | None = None,
        next_q_online: Tensor | None = None,
        next_action_mask: Tensor | None = None,
        weights: Tensor | None = None,
        target_q: Tensor | None = None,
        action_mask: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch; see ``fused_dqn_loss``."""
        if unknown:
            hints.unexpected("FusedDQNLoss", unknown)
        return fused_dqn_loss(
            q,
            actions,
            rewards,
            next_q,
            terminated,
            self.gamma if gamma is None else gamma,
            non_final_mask=non_final_mask,
            next_q_online=next_q_online,
            next_action_mask=next_action_mask,
            weights=weights,
            loss=self.loss,
            delta=self.delta,
            reduction=self.reduction,
            target=self.target,
            target_q=target_q,
            cql_alpha=self.cql_alpha,
            action_mask=action_mask,
            value_transform=self.value_transform,
            ensemble=self.ensemble,
            return_td_error=self.return_td_error,
            return_cql=self.return_cql,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for repr: those that have a say."""
        options = [f"gamma={self.gamma}", f"loss={self.loss!r}"]
        if self.loss != "mse":
            options.append(f"delta={self.delta}")
        options.append(f"reduction={self.reduction!r}")
        if self.target != "max":
            options.append(f"target={self.target!r}")
        if self.cql_alpha != 0:
            options.append(f"cql_alpha={self.cql_alpha}")
        if self.value_transform != "identity":
            options.append(f"value_transform={self.value_transform!r}")
        if self.ensemble != "min":
            options.append(f"ensemble={self.ensemble!r}")
        return ", ".join(options)
