"""The call of every distributional loss, around the checks of its own arguments."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dqn_fused import hints, node
from dqn_fused._backends import choose_distributional
from dqn_fused.arguments import Batch, SpecT, check_group, check_values, normalise_weights
from dqn_fused.autograd import inside_transform, refuse_tangent
from dqn_fused.transforms import refuse
from dqn_fused.unchecked import goes_unchecked, refusing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Family(NamedTuple):
    """What a family of losses has of its own. The names of its functions in the backends begin with its name."""

    name: str
    input: str  # what q is called
    functions: str  # what its public functions are called
    check: Callable[[Batch, Any], tuple[Batch, Any]]  # a batch and its options, for the backends
    ready: Callable[[Any], bool]  # whether an op may be given the options as they are, and checks the rest


def run(
    family: Family, recording: bool, given: Batch, spec: Any, backend: str, process_group: "ProcessGroup | None"
) -> tuple[Tensor, ...]:
    """Check the arguments and run a backend: its loss, which autograd records, or its loss_and_grad."""
    ready = process_group is None and not torch.compiler.is_compiling() and family.ready(spec)
    if ready and backend in node.serves:
        found = node.row_calls[family.name][recording](spec, given)
        if found is not None:
            return found
    hints.warn_if_swapped(given.q, (given.next_q,), family.input)
    if inside_transform():
        refuse(family.functions, f"give an ensemble as a leading dimension, or call dqn_fused.{family.name}_reference")
    if process_group is not None:
        check_group(process_group, spec)
    what = node.row_loss_of if recording else loss_and_grad
    unchecked = backend_that_checks(family.name, given, spec, backend) if ready else None
    if unchecked is not None:
        return refusing(
            lambda: what(family.name, given.q, given, spec, unchecked), lambda: _checked(family, given, spec, backend)
        )
    batch, spec, implementation = _checked(family, given, spec, backend)
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    return what(family.name, given.q, batch, spec, implementation)


def _checked(family: Family, given: Batch, spec: Any, backend: str) -> tuple[Batch, Any, ModuleType]:
    batch, spec = family.check(given, spec)
    n, A, K = batch.q.shape
    implementation = choose_distributional(family.name, backend, batch.q.device, K, n)
    next_name = f"next_{family.input}"
    batch = check_values(batch, A, batch.next_count(), next_name, implementation.COUNTS_MASK)
    return batch, spec, implementation


def backend_that_checks(family: str, given: Batch, spec: SpecT, backend: str) -> ModuleType | None:
    """The backend for a batch as it was given, if that backend checks all of it itself; else None."""
    if not goes_unchecked(given, spec, 3):
        return None
    implementation = choose_distributional(family, backend, given.q.device, given.q.shape[2])
    return implementation if implementation.CHECKS_CPU else None


def loss_and_grad(family: str, x: Tensor, batch: Batch, spec: SpecT, backend: ModuleType) -> tuple[Tensor, ...]:
    """Run a backend's loss_and_grad, where no tangent of forward mode would be dropped."""
    refuse_tangent(x)
    found: tuple[Tensor, ...] = getattr(backend, f"{family}_loss_and_grad")(batch, spec)
    return found
