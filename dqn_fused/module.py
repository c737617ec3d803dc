"""The loss as a module."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from dqn_fused.arguments import check_loss
from dqn_fused.ensemble import check_ensemble
from dqn_fused.loss import fused_dqn_loss
from dqn_fused.loss_module import LossModule
from dqn_fused.targets import Munchausen, Soft

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedDQNLoss(LossModule):
    """``fused_dqn_loss`` as a module that keeps the discount and the options, like ``torch.nn.MSELoss``.

    ``gamma`` is a number or a tensor, which becomes a buffer and moves with the module; a call may bring its own.

    >>> import torch
    >>> criterion = FusedDQNLoss(gamma=0.9, loss="huber")
    >>> criterion
    FusedDQNLoss(gamma=0.9, loss='huber', delta=1.0, reduction='mean')
    >>> criterion(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), torch.ones(2, 3))
    tensor(0.2050)
    """

    FUNCTION = staticmethod(fused_dqn_loss)
    SHOWN = ("gamma", "loss", "reduction")

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
        super().__init__(locals())
        check_ensemble(ensemble)
        check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)

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
        self.refuse(unknown)
        return fused_dqn_loss(
            q,
            actions,
            rewards,
            next_q,
            terminated,
            non_final_mask=non_final_mask,
            next_q_online=next_q_online,
            next_action_mask=next_action_mask,
            weights=weights,
            target_q=target_q,
            action_mask=action_mask,
            **self.options(gamma=gamma),
        )

    def shows(self, name: str) -> bool:
        """Show delta, too, where it matters."""
        return super().shows(name) or (name == "delta" and self.loss != "mse")
