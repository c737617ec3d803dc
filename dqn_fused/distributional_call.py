"""What the calls of all distributional losses do around the checks of their own arguments."""

from types import ModuleType
from typing import TYPE_CHECKING

from dqn_fused._backends import choose_distributional
from dqn_fused.arguments import Batch, SpecT, check_group, check_values, normalise_weights
from dqn_fused.autograd import inside_transform
from dqn_fused.transforms import refuse
from dqn_fused.unchecked import goes_unchecked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_call(function: str, family: str, spec: SpecT, process_group: "ProcessGroup | None") -> None:
    """Refuse torch.func's transforms, and anything else than a process group for one."""
    if inside_transform():
        refuse(function, f"give an ensemble as a leading dimension, or call dqn_fused.{family}_reference")
    if process_group is not None:
        check_group(process_group, spec)


def backend_that_checks(family: str, given: Batch, spec: SpecT, backend: str) -> ModuleType | None:
    """The backend for a batch as it was given, if that backend checks all of it itself; else None."""
    if not goes_unchecked(given, spec, 3):
        return None
    implementation = choose_distributional(family, backend, given.q.device, given.q.shape[2])
    return implementation if implementation.CHECKS_CPU else None


def prepare(
    family: str, name: str, batch: Batch, spec: SpecT, backend: str, process_group: "ProcessGroup | None"
) -> tuple[Batch, SpecT, ModuleType]:
    """Check the values of a batch whose shapes are checked and choose its backend; ``name`` is what q is called."""
    implementation = choose_distributional(family, backend, batch.q.device, batch.q.shape[2])
    batch = check_values(batch, batch.q.shape[1], batch.next_count(), f"next_{name}", implementation.COUNTS_MASK)
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    return batch, spec, implementation
