"""The loss of a linear head as a module."""

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor, nn

from dqn_fused.arguments import check_loss
from dqn_fused.linear import fused_linear_dqn_loss
from dqn_fused.loss_module import LossModule
from dqn_fused.targets import Munchausen, Soft

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedLinearDQNLoss(LossModule):
    """``fused_linear_dqn_loss`` as a module, for heads that are ``nn.Linear`` layers.

    The layers are arguments of the call, not children of the module: their parameters stay where they are.

    >>> import torch
    >>> head, target_head = torch.nn.Linear(3, 1000), torch.nn.Linear(3, 1000)
    >>> criterion = FusedLinearDQNLoss(gamma=0.9, loss="huber")
    >>> hidden, actions, rewards = torch.ones(2, 3), torch.tensor([7, 900]), torch.zeros(2)
    >>> criterion(head, hidden, actions, rewards, target_head, hidden).backward()
    >>> head.bias.grad.nonzero().flatten()
    tensor([  7, 900])
    """

    FUNCTION = staticmethod(fused_linear_dqn_loss)
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
        return_td_error: bool = False,
        return_cql: bool = False,
        sparse_grad: bool = False,
        process_group: "ProcessGroup | None" = None,
        tensor_parallel_group: "ProcessGroup | None" = None,
        hidden_grad: str = "sum",
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        super().__init__(locals())
        check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)

    def forward(
        self,
        head: nn.Linear,
        hidden: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_head: nn.Linear,
        next_hidden: Tensor,
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        next_hidden_online: Tensor | None = None,
        next_action_mask: Tensor | None = None,
        non_final_mask: Tensor | None = None,
        target_hidden: Tensor | None = None,
        action_mask: Tensor | None = None,
        weights: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch; see ``fused_linear_dqn_loss``."""
        self.refuse(unknown)
        return fused_linear_dqn_loss(
            hidden,
            head.weight,
            actions,
            rewards,
            next_hidden,
            next_head.weight,
            terminated,
            bias=head.bias,
            next_bias=next_head.bias,
            next_hidden_online=next_hidden_online,
            next_action_mask=next_action_mask,
            non_final_mask=non_final_mask,
            target_hidden=target_hidden,
            action_mask=action_mask,
            weights=weights,
            **self.options(gamma=gamma),
        )

    def shows(self, name: str) -> bool:
        """Show delta, too, where it matters."""
        return super().shows(name) or (name == "delta" and self.loss != "mse")
