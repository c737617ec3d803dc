"""The categorical losses as modules."""

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor, nn

from dqn_fused import hints
from dqn_fused.categorical import fused_categorical_loss, fused_categorical_td_loss
from dqn_fused.categorical_arguments import Support, check_categorical_options, check_even

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _OnSupport(nn.Module):
    """Keeps a support: two numbers, or a tensor, which becomes a buffer and moves with the module."""

    support: Support

    def _keep(self, support: Support) -> None:
        if isinstance(support, Tensor):
            check_even(support)
            self.register_buffer("support", support)
        else:
            self.support = support

    def _support(self) -> str:
        if isinstance(self.support, Tensor):
            return f"support={len(self.support)} atoms from {self.support[0]:g} to {self.support[-1]:g}"
        return f"support={tuple(self.support)}"


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

    gamma: float | Tensor

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
        if unknown:
            hints.unexpected("FusedCategoricalLoss", unknown)
        super().__init__()
        check_categorical_options(support, reduction)
        self._keep(support)
        if isinstance(gamma, Tensor):
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = gamma
        self.reduction, self.return_td_error = reduction, return_td_error
        self.process_group, self.backend = process_group, backend

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
        if unknown:
            hints.unexpected("FusedCategoricalLoss", unknown)
        return fused_categorical_loss(
            logits,
            actions,
            rewards,
            next_logits,
            terminated,
            self.gamma if gamma is None else gamma,
            support=self.support,
            next_logits_online=next_logits_online,
            next_action_mask=next_action_mask,
            non_final_mask=non_final_mask,
            weights=weights,
            reduction=self.reduction,
            return_td_error=self.return_td_error,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for repr."""
        return f"{self._support()}, gamma={self.gamma}, reduction={self.reduction!r}"


class FusedCategoricalTDLoss(_OnSupport):
    """``fused_categorical_td_loss`` as a module that keeps the support and the options.

    >>> import torch
    >>> criterion = FusedCategoricalTDLoss((0.0, 2.0), projection="hl_gauss")
    >>> criterion
    FusedCategoricalTDLoss(support=(0.0, 2.0), projection='hl_gauss', sigma=None, reduction='mean')
    >>> criterion(torch.zeros(1, 1, 3), torch.tensor([0]), torch.tensor([1.0])).exp()
    tensor(3.)
    """

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
        if unknown:
            hints.unexpected("FusedCategoricalTDLoss", unknown)
        super().__init__()
        check_categorical_options(support, reduction, projection, sigma)
        self._keep(support)
        self.projection, self.sigma, self.reduction = projection, sigma, reduction
        self.return_td_error, self.return_expectation = return_td_error, return_expectation
        self.process_group, self.backend = process_group, backend

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
        if unknown:
            hints.unexpected("FusedCategoricalTDLoss", unknown)
        return fused_categorical_td_loss(
            logits,
            actions,
            target,
            support=self.support,
            projection=self.projection,
            sigma=self.sigma,
            weights=weights,
            reduction=self.reduction,
            return_td_error=self.return_td_error,
            return_expectation=self.return_expectation,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for repr: those that have a say."""
        options = [self._support(), f"projection={self.projection!r}"]
        if self.projection == "hl_gauss":
            options.append(f"sigma={self.sigma}")
        return ", ".join([*options, f"reduction={self.reduction!r}"])
