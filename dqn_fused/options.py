"""The one description of the options of the loss: what a call takes, what follows from it, and what an op is given.

An option has its names or its range in ``check_loss``, a field of ``LossSpec``, a row of ``CODES`` and one of
``PUBLIC``. The arguments of the ops follow from these, and tests/test_options.py compares the signatures of functions
and modules, their docstrings, docs/call.md and csrc/td_loss.h with them.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch

from dqn_fused.checks import check_choice
from dqn_fused.targets import Munchausen, Soft, number

# The enumerations of csrc/td_loss.h. The weighted mean is not among them: it becomes a sum or a mean.
LOSSES = {"mse": 0, "huber": 1, "smooth_l1": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
TARGETS = {"max": 0, "soft": 1, "munchausen": 2}
VALUE_TRANSFORMS = {"identity": 0, "signed_hyperbolic": 1}

REDUCTION_NAMES = ("mean", "sum", "none", "weighted_mean")
BY_NAME = {"max": None, "soft": Soft(), "munchausen": Munchausen()}


class LossSpec(NamedTuple):
    """What is computed from a batch: the options, all checked."""

    loss: str = "mse"
    delta: float = 1.0
    reduction: str = "mean"
    target: str = "max"
    temperature: float = 1.0
    alpha: float = 0.0
    clip: float = 0.0
    cql: bool = False  # whether the conservative term is asked for, to be added or only returned
    cql_alpha: float = 0.0
    value_transform: str = "identity"

    def dense_gradient(self) -> bool:
        """Whether every action gets a gradient, not only the one taken."""
        return self.cql_alpha != 0


# The fields of LossSpec that are not numbers, and the numbers that stand for their values in an op.
CODES: dict[str, Mapping[Any, int]] = {
    "loss": LOSSES,
    "reduction": REDUCTIONS,
    "target": TARGETS,
    "cql": {False: 0, True: 1},
    "value_transform": VALUE_TRANSFORMS,
}
# What fused_dqn_loss takes besides the fields of arguments.Batch, and the fields of LossSpec that each of these
# decides: none where the call itself handles it.
PUBLIC: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "delta": ("delta",),
    "reduction": ("reduction",),
    "target": ("target", "temperature", "alpha", "clip"),
    "cql_alpha": ("cql", "cql_alpha"),
    "value_transform": ("value_transform",),
    "ensemble": (),
    "return_td_error": (),
    "return_cql": ("cql",),
    "process_group": (),
    "backend": (),
}

# For each field of LossSpec its codes as floats, or None if it is a number. The node in C++ is given this, too.
FIELD_CODES: tuple[dict[Any, float] | None, ...] = tuple(
    {value: float(code) for value, code in CODES[name].items()} if name in CODES else None for name in LossSpec._fields
)
_FIELD_NAMES = tuple(codes and {code: value for value, code in codes.items()} for codes in FIELD_CODES)


def packed(spec: LossSpec) -> list[float]:
    """A LossSpec as an op takes it: numbers."""
    known = None if torch.compiler.is_compiling() else _PACKED.get(spec)  # there a comparison may be a guard
    return _packed(spec) if known is None else known


def _packed(spec: LossSpec) -> list[float]:
    fields: tuple[Any, ...] = spec
    return [x if codes is None else codes[x] for x, codes in zip(fields, FIELD_CODES, strict=True)]


def unpacked(numbers: Sequence[float]) -> LossSpec:
    """The LossSpec that was packed."""
    return LossSpec._make(x if names is None else names[x] for x, names in zip(numbers, _FIELD_NAMES, strict=True))


def check_loss(
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    cql_alpha: float = 0.0,
    return_cql: bool = False,
    value_transform: str = "identity",
) -> LossSpec:
    """Check the options."""
    key = (loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
    names = type(loss) is type(reduction) is type(target) is type(value_transform) is str
    spec = _PLAIN.get(key) if names and type(delta) is type(cql_alpha) is float else None
    if spec is not None:
        return spec
    check_choice("loss", loss, tuple(LOSSES))
    check_choice("reduction", reduction, REDUCTION_NAMES)
    check_choice("value_transform", value_transform, tuple(VALUE_TRANSFORMS))
    delta, cql_alpha = number("delta", delta), number("cql_alpha", cql_alpha)
    if not (0 < delta < inf or (loss == "smooth_l1" and delta == 0)):
        raise ValueError(f"delta: expected a finite number above 0, got {delta}")
    if not -inf < cql_alpha < inf:  # torch.compile may hold a number for which math.isfinite has no rule
        raise ValueError(f"cql_alpha: expected a finite number, got {cql_alpha}")
    if isinstance(target, str):
        check_choice("target", target, tuple(BY_NAME))
        chosen = BY_NAME[target]
    elif isinstance(target, (Soft, Munchausen)):
        chosen = target
    else:
        raise TypeError(f"target: expected a name, Soft or Munchausen, got {type(target).__name__}")
    spec = LossSpec(
        loss,
        delta,
        reduction,
        cql=bool(return_cql) or cql_alpha != 0,
        cql_alpha=cql_alpha,
        value_transform=value_transform,
    )
    if isinstance(chosen, Munchausen):
        return spec._replace(
            target="munchausen",
            temperature=float(chosen.temperature),
            alpha=float(chosen.alpha),
            clip=float(chosen.clip),
        )
    if isinstance(chosen, Soft):
        return spec._replace(target="soft", temperature=float(chosen.temperature))
    return spec


_PLAIN: dict[tuple[object, ...], LossSpec] = {
    (loss, 1.0, reduction, "max", 0.0, False, "identity"): LossSpec(loss, 1.0, reduction)
    for loss in LOSSES
    for reduction in REDUCTION_NAMES
}
_PACKED = {spec: _packed(spec) for spec in _PLAIN.values() if spec.reduction in REDUCTIONS}
