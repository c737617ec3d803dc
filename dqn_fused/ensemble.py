"""Several target networks as one: the minimum, or the mean, of their Q-values of each action."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqn_fused import hints
from dqn_fused.checks import FLOATS, dense, show, wrong_choice, wrong_device

ENSEMBLES = ("min", "mean")


def one_next_q(q: Tensor, next_q: Tensor | Sequence[Tensor], ensemble: str) -> Tensor:
    """The one matrix that stands for all target networks: next_q itself where it is a tensor.

    The minimum is exact, and a NaN of any network wins, as in torch.minimum. The mean is computed in the accumulation
    dtype.
    """
    if ensemble == "min" and isinstance(next_q, Tensor):
        return next_q
    check_ensemble(ensemble)
    if not isinstance(next_q, (list, tuple)):
        if next_q is None:
            raise TypeError("next_q: expected a torch.Tensor, got NoneType; for a ready target there is fused_td_loss")
        if isinstance(next_q, Tensor):
            raise ValueError(
                "ensemble: expected 'min' with one next_q, got 'mean'; several target networks are given as a list"
            )
        return next_q  # type: ignore[return-value]  # check_batch says what is wrong with it
    if not next_q:
        raise ValueError("next_q: expected the Q-values of at least one target network, got none")
    _check(next_q)
    hints.warn_if_swapped(q, next_q)
    with torch.no_grad():
        networks = [x.detach() for x in next_q]
        if ensemble == "min":
            whole = networks[0]
            for x in networks[1:]:
                whole = torch.minimum(whole, x)
            return whole
        wide = any(getattr(x, "dtype", None) is torch.float64 for x in (q, *networks))
        dtype = torch.float64 if wide else torch.float32
        whole = networks[0].to(dtype)
        for x in networks[1:]:
            whole = whole + x
        return whole / len(networks)


def check_ensemble(ensemble: str) -> None:
    """Check the option."""
    if ensemble not in ENSEMBLES:
        wrong_choice("ensemble", ensemble, ENSEMBLES)


def _check(networks: Sequence[Tensor]) -> None:
    first = networks[0]
    for i, x in enumerate(networks):
        name = f"next_q[{i}]"
        dense(name, x, FLOATS)
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected shape {show(first.shape)}, as next_q[0], got {show(x.shape)}")
        if x.device != first.device:
            wrong_device(name, x, first.device, "next_q[0]")
