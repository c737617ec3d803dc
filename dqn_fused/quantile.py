"""The public quantile loss: a function, the same with its gradient, and a module."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from dqn_fused import hints, node
from dqn_fused.arguments import Batch
from dqn_fused.autograd import refuse_tangent
from dqn_fused.distributional_call import backend_that_checks, check_call, prepare
from dqn_fused.loss_module import LossModule
from dqn_fused.node import quantile_loss
from dqn_fused.quantile_arguments import QuantileSpec, check_quantile_options, check_quantiles
from dqn_fused.unchecked import refusing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_quantile_loss(
    quantiles: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_quantiles: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    taus: Tensor | None = None,
    next_quantiles_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    kappa: float = 1.0,
    quantile_reduction: str = "sum",
    reduction: str = "mean",
    return_td_error: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Quantile regression loss of QR-DQN (Dabney et al., 2018), IQN and FQF. Its pairs of quantiles are never stored.

    For each transition the predicted quantiles ``theta = quantiles[a]`` are compared with the target's,
    ``t = rewards + gamma * next_quantiles[a']``, or ``t = rewards`` if terminated; a' has the largest mean. Its loss is
    the sum over i of the mean over j of ``|tau_i - 1{u < 0}| * huber(u) / kappa`` with ``u = t_j - theta_i``. Only
    ``quantiles`` receives a gradient, and in it only the row of the action taken.

    Args:
        quantiles: (\\*N, A, K) quantiles of each action's return by the online network; float16, bfloat16, float32 or
            float64. Any leading dimensions.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A): the action taken.
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_quantiles: (\\*N, A, K') quantiles of the target network in the next state, floating; K' need not be K.
            With ``non_final_mask``: (M, A, K').
        terminated: (\\*N) or (\\*N, 1), nonzero where nothing is bootstrapped, as in ``fused_dqn_loss``.
        gamma: discount: a number, a 0-d tensor, or (\\*N) / (\\*N, 1) floating, for n-step returns.
        taus: (K,) or (\\*N, K), floating: the fractions that the predicted quantiles stand for, a constant. None for
            the midpoints ``(i + 1/2) / K`` of QR-DQN. Sampled ones are those of IQN (Dabney et al., 2018b), midpoints
            of proposed ones those of FQF (Yang et al., 2019).
        next_quantiles_online: chooses a', whose quantiles are read from ``next_quantiles``: (\\*N, A, K'') quantiles of
            the online network for double DQN, of which the largest mean counts, or (\\*N, A) Q-values, such as the
            weighted mean of FQF. With ``non_final_mask`` M stands for \\*N.
        next_action_mask: (\\*N, A) bool, true for the actions that are legal in the next state: no other is chosen. A
            row without one is NaN, unless terminated. With ``non_final_mask``: (M, A).
        non_final_mask: (\\*N) or (\\*N, 1) bool, instead of ``terminated``: true for the M samples, in order, whose
            next states the next tensors hold.
        weights: (\\*N) or (\\*N, 1), floating: the loss of each sample is multiplied by its weight.
        kappa: threshold where Huber's loss turns from quadratic to linear. The loss is divided by it, so 0 is plain
            quantile regression, with slope 0 where ``u`` is 0.
        quantile_reduction: over the predicted quantiles: ``"sum"``, as published, or ``"mean"``, which is
            Stable-Baselines3-contrib's mean over all pairs.
        reduction: ``"mean"``, which divides by the number of samples, ``"weighted_mean"``, which divides by the sum of
            the weights, ``"sum"``, or ``"none"`` for the loss of each sample, (\\*N).
        return_td_error: also return the mean of the predicted minus that of the target quantiles, (\\*N), signed,
            unweighted and without gradient.
        process_group: with ``"weighted_mean"``, the ranks over which weights are summed, as in
            ``fused_dqn_loss``.
        backend: ``"auto"``, or by name as in ``dqn_fused.backends``. Inside ``torch.compile`` on the CPU ``"auto"``
            takes ``"torch"``, whose operations Inductor fuses, up to 32 predicted quantiles.

    Returns:
        The loss, or ``(loss, td_error)``, in float32, or in float64 if quantiles is float64.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_dqn_loss``.
        NotImplementedError: for a second derivative.

    >>> import torch
    >>> quantiles = torch.tensor([[[0.0, 2.0], [9.0, 9.0]]], requires_grad=True)
    >>> next_quantiles = torch.tensor([[[0.0, 0.5], [1.0, 3.0]]])
    >>> loss, td_error = fused_quantile_loss(
    ...     quantiles, torch.tensor([0]), torch.tensor([0.0]), next_quantiles, gamma=1.0, return_td_error=True)
    >>> loss.backward()
    >>> loss.detach(), td_error, quantiles.grad
    (tensor(0.6250), tensor([-1.]), tensor([[[-0.2500, -0.2500],
             [ 0.0000,  0.0000]]]))
    """
    if unknown:
        hints.unexpected("fused_quantile_loss", unknown)
    samples = Batch(
        quantiles, actions, rewards, next_quantiles, terminated, gamma, non_final_mask,
        next_quantiles_online, next_action_mask, weights,
    )  # fmt: skip
    loss, td_error = _run(quantile_loss, samples, taus, kappa, quantile_reduction, reduction, backend, process_group)
    return (loss, td_error) if return_td_error else loss


def fused_quantile_loss_and_grad(
    quantiles: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_quantiles: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    taus: Tensor | None = None,
    next_quantiles_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    kappa: float = 1.0,
    quantile_reduction: str = "sum",
    reduction: str = "mean",
    return_td_error: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> tuple[Tensor, ...]:
    """Quantile regression loss and its gradient by quantiles in one pass, without autograd.

    ``quantiles.backward(gradient)`` then goes on through the network.

    Args:
        quantiles: (\\*N, A, K), and all other arguments, as in ``fused_quantile_loss``. No graph is recorded.

    Returns:
        ``(loss, gradient)`` or ``(loss, gradient, td_error)``. The gradient has the shape and dtype of quantiles and is
        contiguous. With ``reduction="none"`` it is the gradient of the sum of the losses.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_quantile_loss``.

    >>> import torch
    >>> quantiles = torch.tensor([[[0.0, 2.0], [9.0, 9.0]]])
    >>> fused_quantile_loss_and_grad(
    ...     quantiles, torch.tensor([0]), torch.tensor([1.0]), torch.zeros(1, 2, 2), torch.tensor([True]))
    (tensor(0.2500), tensor([[[-0.2500,  0.2500],
             [ 0.0000,  0.0000]]]))
    """
    if unknown:
        hints.unexpected("fused_quantile_loss_and_grad", unknown)
    samples = Batch(
        quantiles, actions, rewards, next_quantiles, terminated, gamma, non_final_mask,
        next_quantiles_online, next_action_mask, weights,
    )  # fmt: skip
    loss, gradient, td_error = _run(
        _loss_and_grad, samples, taus, kappa, quantile_reduction, reduction, backend, process_group
    )
    return (loss, gradient, td_error) if return_td_error else (loss, gradient)


Run = Callable[[Tensor, Batch, Tensor | None, QuantileSpec, ModuleType], tuple[Any, ...]]


def _loss_and_grad(
    x: Tensor, batch: Batch, taus: Tensor | None, spec: QuantileSpec, implementation: ModuleType
) -> tuple[Any, ...]:
    refuse_tangent(x)
    found: tuple[Any, ...] = implementation.quantile_loss_and_grad(batch, taus, spec)
    return found


def _run(
    what: Run,
    given: Batch,
    taus: Tensor | None,
    kappa: float,
    quantile_reduction: str,
    reduction: str,
    backend: str,
    process_group: "ProcessGroup | None",
) -> tuple[Any, ...]:
    """Check the arguments and run a backend."""
    spec = check_quantile_options(kappa, quantile_reduction, reduction)
    if backend in node.serves and process_group is None and not torch.compiler.is_compiling():
        found = node.quantile_calls[what is quantile_loss](spec, given, taus)
        if found is not None:
            return found
    check_call("fused_quantile_loss", "quantile", spec, process_group)
    unchecked = backend_that_checks("quantile", given, spec, backend)
    if unchecked is not None:
        return refusing(
            lambda: what(given.q, given, taus, spec, unchecked), lambda: _checked(given, taus, spec, backend)
        )
    batch, taus, spec, implementation = _checked(given, taus, spec, backend, process_group)
    return what(given.q, batch, taus, spec, implementation)


def _checked(
    given: Batch, taus: Tensor | None, spec: QuantileSpec, backend: str, process_group: "ProcessGroup | None" = None
) -> tuple[Batch, Tensor | None, QuantileSpec, ModuleType]:
    batch, taus = check_quantiles(given, taus)
    batch, spec, implementation = prepare("quantile", "quantiles", batch, spec, backend, process_group)
    return batch, taus, spec, implementation


class FusedQuantileLoss(LossModule):
    """``fused_quantile_loss`` as a module that keeps the discount and the options.

    ``gamma`` is a number or a tensor, which becomes a buffer and moves with the module; a call may bring its own.

    >>> import torch
    >>> criterion = FusedQuantileLoss(gamma=1.0, kappa=0.0)
    >>> criterion
    FusedQuantileLoss(gamma=1.0, kappa=0.0, quantile_reduction='sum', reduction='mean')
    >>> criterion(torch.zeros(1, 1, 2), torch.tensor([0]), torch.tensor([1.0]), torch.ones(1, 1, 2))
    tensor(2.)
    """

    FUNCTION = staticmethod(fused_quantile_loss)
    SHOWN = ("gamma", "kappa", "quantile_reduction", "reduction")

    def __init__(
        self,
        gamma: float | Tensor = 0.99,
        *,
        kappa: float = 1.0,
        quantile_reduction: str = "sum",
        reduction: str = "mean",
        return_td_error: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        super().__init__(locals())
        check_quantile_options(kappa, quantile_reduction, reduction)

    def forward(
        self,
        quantiles: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_quantiles: Tensor,
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        taus: Tensor | None = None,
        next_quantiles_online: Tensor | None = None,
        next_action_mask: Tensor | None = None,
        non_final_mask: Tensor | None = None,
        weights: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of a batch; see ``fused_quantile_loss``."""
        self.refuse(unknown)
        return fused_quantile_loss(
            quantiles,
            actions,
            rewards,
            next_quantiles,
            terminated,
            taus=taus,
            next_quantiles_online=next_quantiles_online,
            next_action_mask=next_action_mask,
            non_final_mask=non_final_mask,
            weights=weights,
            **self.options(gamma=gamma),
        )
