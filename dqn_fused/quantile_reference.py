"""The quantile loss in plain PyTorch: each pair of quantiles is an element of a (n, K, K') tensor."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused.arguments import Batch, accumulation_dtype, check_group, check_values, constants, normalise_weights
from dqn_fused.distributional import chosen, per_row, taken
from dqn_fused.quantile_arguments import QuantileSpec, check_quantile_options, check_quantiles
from dqn_fused.reference import bootstrapped, reduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def quantile_loss(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Quantile regression loss (Dabney et al., 2018) by PyTorch operations, differentiated by autograd, on any device.

    Arguments, result and errors are those of ``dqn_fused.fused_quantile_loss``; ``backend`` is there so that
    the signatures agree, and must be ``"auto"`` or ``"torch"``.

    >>> import torch
    >>> quantiles, next_quantiles = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])
    >>> quantile_loss(quantiles, torch.tensor([0]), torch.tensor([0.0]), next_quantiles, gamma=1.0)
    tensor(0.6250)
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: the reference is PyTorch, expected 'auto' or 'torch', got {backend!r}")
    spec = check_quantile_options(kappa, quantile_reduction, reduction, taus)
    if process_group is not None:
        check_group(process_group, spec)
    samples = Batch(
        quantiles, actions, rewards, next_quantiles, terminated, gamma, non_final_mask,
        next_quantiles_online, next_action_mask, weights,
    )  # fmt: skip
    batch, spec = check_quantiles(samples, spec)
    batch = check_values(batch, batch.q.shape[1], batch.next_count(), "next_quantiles")
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    batch = constants(batch)
    predicted = taken(batch)
    with torch.no_grad():
        target = target_quantiles(batch)
    loss = reduced(loss_of_pairs(predicted, target, spec), batch, spec.reduction)
    return (loss, td_error(predicted, target, batch).detach()) if return_td_error else loss


def target_quantiles(batch: Batch) -> Tensor:
    """r + gamma * next quantiles of the greedy action, (n, K'); r where the episode ended."""
    next_q, chooser, dtype = batch.next_q, batch.next_q_online, accumulation_dtype(batch.q)
    assert next_q is not None
    if chooser is None:
        chooser = next_q
    values = chooser if chooser.dim() == 2 else chooser.mean(2, dtype=accumulation_dtype(chooser))
    column = per_row(batch)
    return bootstrapped(column.rewards.to(dtype), chosen(next_q, values, batch), column, dtype)


def midpoints(predicted: Tensor) -> Tensor:
    """The fractions of K quantiles that share the probability equally, (i + 1/2) / K."""
    K = predicted.shape[1]
    return (torch.arange(K, dtype=predicted.dtype, device=predicted.device) + 0.5) / K


def kappa_in(dtype: torch.dtype, spec: QuantileSpec) -> float:
    """kappa in a dtype: at most its largest number, and 0 below its normal numbers."""
    limits = torch.finfo(dtype)
    return min(spec.kappa, limits.max) if spec.kappa >= limits.tiny else 0.0


def pair_weights(difference: Tensor, predicted: Tensor, taus: Tensor | None) -> Tensor:
    """|tau_i - 1{u < 0}|, (n, K, K'), from the differences -u = predicted_i - target_j."""
    taus = (midpoints(predicted) if taus is None else taus.detach().to(predicted.dtype)).unsqueeze(-1)
    return torch.where(difference > 0, (taus - 1).abs(), taus.abs())


def loss_of_pairs(predicted: Tensor, target: Tensor, spec: QuantileSpec) -> Tensor:
    """Loss of each sample, (n,), from its predicted and target quantiles, (n, K) and (n, K')."""
    difference = predicted.unsqueeze(2) - target.unsqueeze(1)  # (n, K, K')
    weights = pair_weights(difference.detach(), predicted, spec.taus)
    huber = F.smooth_l1_loss(
        difference, torch.zeros_like(difference), reduction="none", beta=kappa_in(predicted.dtype, spec)
    )
    each = (weights * huber).mean(2)
    return each.sum(1) if spec.quantile_reduction == "sum" else each.mean(1)


def slopes_of_pairs(predicted: Tensor, target: Tensor, spec: QuantileSpec) -> Tensor:
    """Derivative of each sample's loss by its predicted quantiles, (n, K); 0 for equal ones if kappa is 0."""
    difference = predicted.unsqueeze(2) - target.unsqueeze(1)
    kappa = kappa_in(predicted.dtype, spec)
    if kappa > 0:
        slopes = (difference / kappa).clamp(-1, 1)
    else:
        slopes = torch.where(difference.isnan(), difference, difference.sgn())  # the sign of NaN is 0
    slopes = (pair_weights(difference, predicted, spec.taus) * slopes).mean(2)
    return slopes if spec.quantile_reduction == "sum" else slopes / predicted.shape[1]


def td_error(predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Mean of the predicted minus mean of the target quantiles, N."""
    return (predicted.mean(1) - target.mean(1)).view(batch.shape)
