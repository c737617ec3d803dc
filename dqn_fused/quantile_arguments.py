"""The options and the taus of the quantile loss; the arguments of all families are in distributional.py."""

from math import inf
from typing import NamedTuple

from torch import Tensor

from dqn_fused.arguments import Batch
from dqn_fused.checks import FLOATS, dense, show, wrong_choice, wrong_device
from dqn_fused.distributional import check_distributions
from dqn_fused.options import REDUCTION_NAMES
from dqn_fused.targets import number

QUANTILE_REDUCTIONS = ("sum", "mean")


class QuantileSpec(NamedTuple):
    """What is computed from a batch: options, all of them checked."""

    kappa: float = 1.0
    quantile_reduction: str = "sum"  # over the predicted quantiles; over the target's it is the mean
    reduction: str = "mean"


def check_quantile_options(kappa: float, quantile_reduction: str, reduction: str) -> QuantileSpec:
    """Check the options."""
    kappa = number("kappa", kappa)
    if not 0 <= kappa < inf:
        raise ValueError(f"kappa: expected a finite number of at least 0, got {kappa}")
    if quantile_reduction not in QUANTILE_REDUCTIONS:
        wrong_choice("quantile_reduction", quantile_reduction, QUANTILE_REDUCTIONS)
    if reduction not in REDUCTION_NAMES:
        wrong_choice("reduction", reduction, REDUCTION_NAMES)
    return QuantileSpec(kappa, quantile_reduction, reduction)


def check_quantiles(given: Batch, taus: Tensor | None) -> tuple[Batch, Tensor | None]:
    """Check a batch of quantiles and their fractions, (K,) or (\\*N, K), which become (K,) or (n, K)."""
    if given.next_q is None:
        raise TypeError("next_quantiles: expected a torch.Tensor, got NoneType")
    batch = check_distributions(given, "quantiles")
    if taus is None:
        return batch, None
    dense("taus", taus, FLOATS)
    if taus.device != batch.q.device:
        wrong_device("taus", taus, batch.q.device, "quantiles")
    K = batch.q.shape[2]
    if taus.shape != (K,) and taus.shape != (*batch.shape, K):
        raise ValueError(
            f"taus: expected shape {show((K,))} or {show((*batch.shape, K))}, a fraction for each of the quantiles, "
            f"got {show(taus.shape)}"
        )
    return batch, taus if taus.dim() == 1 else taus.reshape(-1, K)
