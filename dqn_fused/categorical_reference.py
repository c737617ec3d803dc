"""The categorical losses in plain PyTorch: ground truth for the kernels, fallback where none of them runs.

A distribution is K probabilities on K evenly spaced atoms, the support. Everything is (n, K), and in units of the
distance of two atoms where it says position: atom j is at position j.
"""

import math

import torch
from torch import Tensor

CPU = torch.device("cpu")


def atoms(support: Tensor | tuple[float, float], K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The support, (K,)."""
    if isinstance(support, Tensor):
        return support.detach().to(dtype)
    return torch.linspace(*support, K, dtype=dtype, device=device)


def positions(values: Tensor, support: Tensor) -> Tensor:
    """Positions of values on a support; those beyond an end are moved to it. NaN stays NaN."""
    low, high, last = support[0], support[-1], support.shape[0] - 1
    return ((torch.clamp(values, low, high) - low) / ((high - low) / last)).clamp(0, last)


def project(position: Tensor, probabilities: Tensor, K: int) -> Tensor:
    """Share each probability, (n, K'), between the two atoms on either side of its position: (n, K).

    The lower atom is at most the last but one, so that a position on an atom, also on the last, gives it everything.
    """
    lower = position.floor().clamp(max=K - 2)
    index = torch.where(position.isnan(), 0, lower).to(torch.int64)
    upper_share = position - lower  # NaN reaches the result here
    return add_at(index, (1 - upper_share) * probabilities, K) + add_at(index + 1, upper_share * probabilities, K)


def add_at(index: Tensor, values: Tensor, K: int) -> Tensor:
    """Sums of the values of equal index, (n, K), in a fixed order."""
    if values.device.type == "cpu":
        return values.new_zeros(values.shape[0], K).scatter_add(1, index, values)
    # A GPU would add by atomics, in another order every time.
    same = index.unsqueeze(1) == torch.arange(K, device=index.device).unsqueeze(1)  # (n, K, K')
    return torch.where(same, values.unsqueeze(1), 0).sum(-1)


def two_hot(target: Tensor, support: Tensor) -> Tensor:
    """A scalar, (n,), as the distribution on its two neighbouring atoms that has it for its mean, (n, K)."""
    position = positions(target, support).unsqueeze(1)
    return project(position, torch.ones_like(position), support.shape[0])


def hl_gauss(target: Tensor, support: Tensor, sigma: float) -> Tensor:
    """A scalar, (n,), as a normal distribution cut into bins whose centres are the atoms, (n, K).

    sigma is in units of their width. What falls outside of all bins is shared out among them.
    """
    K, dtype = support.shape[0], support.dtype
    edges = torch.arange(K + 1, dtype=dtype, device=support.device) - 0.5
    scale = min(1 / (sigma * math.sqrt(2)), torch.finfo(dtype).max)
    cumulative = torch.erf((edges - positions(target, support).unsqueeze(1)) * scale)  # (n, K + 1)
    return cumulative.diff(dim=1) / (cumulative[:, -1:] - cumulative[:, :1])


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum_j target_j log softmax(logits)_j, (n,): an atom without a target does not count, whatever its logit."""
    return -torch.where(target == 0, 0, target * torch.log_softmax(logits, -1)).sum(-1)


def expectation(logits: Tensor, support: Tensor) -> Tensor:
    """Expectation of softmax(logits) on the support, over the last dimension."""
    return (torch.softmax(logits, -1) * support).sum(-1)
