"""The categorical losses as modules."""

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from dqn_fused.categorical import fused_categorical_loss, fused_categorical_td_loss
from dqn_fused.categorical_arguments import Support, check_categorical_options, check_even
from dqn_fused.loss_module import LossModule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _OnSupport(LossModule):
    """Keeps a support: two numbers, or a tensor, which must be evenly spaced."""

    def show(self, name: str) -> str:
        """Write a support in few words."""
        if name == "support" and isinstance(self.support, Tensor):
            return f"{len(self.support)} atoms from {self.support[0]:g} to {self.support[-1]:g}"
        return super().show(name)


class FusedCategoricalLoss(_OnSupport):
    """``fused_categorical_loss`` as a module that keeps the support, the discount and the options.

    ``gamma`` is a number or a tensor, which becomes a buffer and moves with the module; a call may bring its own.

    >>> import torch
    >>> criterion = FusedCategoricalLoss((0.0, 1.0), gamma=0.5)
    >>> criterion
    FusedCategoricalLoss(support=(0.0, 1.0), gamma=0.5, reduction='mean')
    >>> criterion(torch.zeros(1, 1, 2), torch.tensor([0]), torch.tensor([0.0]), torch.zeros(1, 1, 2)).exp()
    tensor(2.)
    """

    FUNCTION = staticmethod(fused_categorical_loss)
    SHOWN = ("support", "gamma", "reduction")

    def __init__(
        self,
        support: Support,
        gamma: float | Tensor = 0.99,
        *,
        reduction: str = "mean",
        return_td_error: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        super().__init__(locals())
        check_categorical_options(support, reduction)
        if isinstance(support, Tensor):
            check_even(support)

    def forward(
        self,
        logits: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_logits: Tensor,
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        next_logits_online: Tensor | None = None,
        next_action_mask: Tensor | None = None,
        non_final_mask: Tensor | None = None,
        weights: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch; see ``fused_categorical_loss``."""
        self.refuse(unknown)
        return fused_categorical_loss(
            logits,
            actions,
            rewards,
            next_logits,
            terminated,
            next_logits_online=next_logits_online,
            next_action_mask=next_action_mask,
            non_final_mask=non_final_mask,
            weights=weights,
            **self.options(gamma=gamma),
        )


class FusedCategoricalTDLoss(_OnSupport):
    """``fused_categorical_td_loss`` as a module that keeps the support and the options.

    >>> import torch
    >>> criterion = FusedCategoricalTDLoss((0.0, 2.0), projection="hl_gauss")
    >>> criterion
    FusedCategoricalTDLoss(support=(0.0, 2.0), projection='hl_gauss', sigma=None, reduction='mean')
    >>> criterion(torch.zeros(1, 1, 3), torch.tensor([0]), torch.tensor([1.0])).exp()
    tensor(3.)
    """

    FUNCTION = staticmethod(fused_categorical_td_loss)
    SHOWN = ("support", "projection", "reduction")

    def __init__(
        self,
        support: Support,
        *,
        projection: str = "two_hot",
        sigma: float | None = None,
        reduction: str = "mean",
        return_td_error: bool = False,
        return_expectation: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        super().__init__(locals())
        check_categorical_options(support, reduction, projection, sigma)
        if isinstance(support, Tensor):
            check_even(support)

    def forward(
        self,
        logits: Tensor,
        actions: Tensor,
        target: Tensor,
        *,
        weights: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch; see ``fused_categorical_td_loss``."""
        self.refuse(unknown)
        return fused_categorical_td_loss(
            logits,
            actions,
            target,
            weights=weights,
            **self.options(),
        )

    def shows(self, name: str) -> bool:
        """Show sigma, too, where it matters."""
        return super().shows(name) or (name == "sigma" and self.projection == "hl_gauss")
