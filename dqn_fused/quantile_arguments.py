"""The options of the quantile loss, the taus among them; the arguments of all families are in distributional.py."""

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
    taus: Tensor | None = None  # (K,) or (n, K); None for the midpoints


def check_quantile_options(
    kappa: float, quantile_reduction: str, reduction: str, taus: Tensor | None = None
) -> QuantileSpec:
    """Check the options, but not the taus."""
    kappa = number("kappa", kappa)
    if not 0 <= kappa < inf:
        raise ValueError(f"kappa: expected a finite number of at least 0, got {kappa}")
    if quantile_reduction not in QUANTILE_REDUCTIONS:
        wrong_choice("quantile_reduction", quantile_reduction, QUANTILE_REDUCTIONS)
    if reduction not in REDUCTION_NAMES:
        wrong_choice("reduction", reduction, REDUCTION_NAMES)
    return QuantileSpec(kappa, quantile_reduction, reduction, taus)


def check_quantiles(given: Batch, spec: QuantileSpec) -> tuple[Batch, QuantileSpec]:
    """Check a batch of quantiles and their taus, (K,) or (\\*N, K), which become (K,) or (n, K)."""
    if given.next_q is None:
        raise TypeError("next_quantiles: expected a torch.Tensor, got NoneType")
    batch, taus = check_distributions(given, "quantiles"), spec.taus
    if taus is None:
        return batch, spec
    dense("taus", taus, FLOATS)
    if taus.device != batch.q.device:
        wrong_device("taus", taus, batch.q.device, "quantiles")
    K = batch.q.shape[2]
    if taus.shape != (K,) and taus.shape != (*batch.shape, K):
        raise ValueError(
            f"taus: expected shape {show((K,))} or {show((*batch.shape, K))}, a fraction for each of the quantiles, "
            f"got {show(taus.shape)}"
        )
    return batch, spec if taus.dim() == 1 else spec._replace(taus=taus.reshape(-1, K))
