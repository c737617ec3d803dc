"""Batches that go to a compiled op as they were given, because on the CPU it checks everything as it reads it.

The checks in Python take 10 us, as long as the op takes for 32 samples.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch._subclasses import FakeTensor

from dqn_fused import arguments
from dqn_fused.arguments import Batch, Reduced
from dqn_fused.options import REDUCTIONS

Result = TypeVar("Result")


def goes_unchecked(batch: Batch, spec: Reduced, dim: int) -> bool:
    """Whether a batch may go to an op that checks it: q and next_q have ``dim`` dimensions, nothing is unusual.

    A FakeTensor would reach the op's fake, which infers shapes and checks nothing.
    """
    q, _, _, next_q, _, gamma, *_ = batch
    if not isinstance(q, Tensor) or not q.is_cpu or q.dim() != dim or not arguments.looks_at_values(q.device):
        return False
    same = next_q is None or (isinstance(next_q, Tensor) and next_q.dim() == dim)
    usual = same and spec.reduction in REDUCTIONS and isinstance(gamma, (float, int, Tensor))
    return usual and FakeTensor not in map(type, batch)


def refusing(run: Callable[[], Result], check: Callable[[], object]) -> Result:
    """What ``run`` returns, which calls an op with a batch that nothing has checked.

    If it raises, ``check`` says which argument is wrong. If none is, the error is not about the arguments: memory has
    run out, or a hook of the user's has raised. It is raised as it is, and nothing is run again.
    """
    try:
        return run()
    except Exception:
        wrong = _error_of(check)
        if wrong is None:
            raise
        raise wrong from None


def _error_of(check: Callable[[], object]) -> Exception | None:
    try:
        check()
    except Exception as error:
        return error
    return None
