"""The options and the support of the categorical losses; the arguments of all families are in distributional.py."""

from math import inf
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dqn_fused.arguments import Batch, accumulation_dtype, looks_at_values
from dqn_fused.checks import FLOATS, dense, show, wrong_choice, wrong_device
from dqn_fused.distributional import check_distributions
from dqn_fused.options import REDUCTION_NAMES
from dqn_fused.targets import number

PROJECTIONS = ("two_hot", "hl_gauss")
SIGMA = 0.75  # Farebrother et al. (2024)
WIDEST = 1e20  # widths of a bin; beyond, the mass in all bins is the same to the last digit, and would underflow

Support = Tensor | tuple[float, float]


class CategoricalSpec(NamedTuple):
    """What is computed from a batch: options, all of them checked."""

    support: Support
    sigma: float = 0.0  # of HL-Gauss, in units of the distance of two atoms; 0: two-hot
    reduction: str = "mean"


def check_categorical_options(
    support: Support, reduction: str, projection: str = "two_hot", sigma: float | None = None
) -> CategoricalSpec:
    """Check the options, but not the shape and the values of a support that is a tensor."""
    if reduction not in REDUCTION_NAMES:
        wrong_choice("reduction", reduction, REDUCTION_NAMES)
    if projection not in PROJECTIONS:
        wrong_choice("projection", projection, PROJECTIONS)
    if isinstance(support, Tensor):
        dense("support", support, FLOATS)
    else:
        support = _ends(support)
    if projection == "two_hot":
        if sigma is not None:
            raise ValueError("sigma: expected None with projection 'two_hot': only 'hl_gauss' has a width")
        return CategoricalSpec(support, 0.0, reduction)
    sigma = SIGMA if sigma is None else number("sigma", sigma)
    if not 0 < sigma < inf:
        raise ValueError(f"sigma: expected a finite number above 0, got {sigma}")
    return CategoricalSpec(support, min(sigma, WIDEST), reduction)


def check_logits(given: Batch, spec: CategoricalSpec) -> tuple[Batch, CategoricalSpec]:
    """Check a batch of logits, and the support against them."""
    batch = check_distributions(given, "logits", same_size=True)
    K, device = batch.q.shape[2], batch.q.device
    if K < 2:
        raise ValueError(f"logits: expected at least two atoms, got {show(given.q.shape)}")
    support = spec.support
    if isinstance(support, Tensor):
        if support.device != device:
            wrong_device("support", support, device, "logits")
        if support.shape != (K,):
            raise ValueError(f"support: expected two numbers or shape ({K},), an atom for each logit, got "
                             f"{show(support.shape)}")  # fmt: skip
        if looks_at_values(device):
            check_even(support)
            check_range(support[0].item(), support[-1].item(), K, accumulation_dtype(batch.q))
    else:
        check_range(*support, K, accumulation_dtype(batch.q))
    return batch, spec


def check_range(low: float, high: float, K: int, dtype: torch.dtype) -> None:
    """Check that K atoms from low to high are finite and differ in the dtype of the arithmetic."""
    limits, step = torch.finfo(dtype), (high - low) / (K - 1)
    differ = step > limits.eps * max(abs(low), abs(high)) and step * limits.max >= 1  # 1 / step is finite, too
    if not (differ and high - low <= limits.max):
        raise ValueError(f"support: expected {K} atoms that are finite and differ in {dtype}, got ({low}, {high})")


_EVEN = WeakIdKeyDictionary()  # supports that were checked, and their versions: a check takes 60 us


def known(support: Tensor) -> bool:
    """Whether atoms have been checked by check_even and not changed since."""
    return bool(_EVEN.get(support, -1) == _version(support) >= 0)


def even(spec: CategoricalSpec) -> bool:
    """Whether the support is two numbers or atoms that check_even passes, where it may look at them."""
    support = spec.support
    if not isinstance(support, Tensor) or known(support):
        return True
    try:
        if looks_at_values(support.device):
            check_even(support)
    except ValueError:
        return False
    return known(support)


def _version(support: Tensor) -> int:
    return -1 if support.is_inference() else support._version


def check_even(support: Tensor) -> None:
    """Check that atoms, (K,), increase by the same step, up to the rounding of their dtype or of float32."""
    if known(support):
        return
    if support.dim() != 1 or len(support) < 2:
        raise ValueError(
            f"support: expected two numbers or shape (K,), an atom for each logit, got {show(support.shape)}"
        )
    atoms = support.detach().double()
    even = torch.linspace(float(atoms[0]), float(atoms[-1]), len(atoms), dtype=torch.float64, device=atoms.device)
    error, largest = (atoms - even).abs().amax(), atoms.abs().amax()
    eps = max(torch.finfo(support.dtype).eps, torch.finfo(torch.float32).eps)
    if not (largest < inf and (atoms.diff() > 0).all() and error <= 2 * eps * largest):
        raise ValueError(f"support: expected atoms that increase by the same step, got {support.tolist()}")
    _EVEN[support] = _version(support)


def _ends(support: object) -> tuple[float, float]:
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        _wrong_support(support)
    low, high = (x if type(x) is float else number("support", x, "two numbers") for x in support)
    if not 0 < high - low < inf:
        raise ValueError(f"support: expected v_min < v_max, both finite, got ({low}, {high})")
    return low, high


def _wrong_support(support: object) -> NoReturn:
    raise TypeError(
        f"support: expected (v_min, v_max) or a torch.Tensor of evenly spaced atoms, got {type(support).__name__}"
    )
