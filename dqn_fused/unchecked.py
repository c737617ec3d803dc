"""Batches that go to a compiled op as they were given, because on the CPU it checks everything as it reads it.

The checks in Python take 10 us, as long as the op takes for 32 samples.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, Reduced, looks_at_values
from dqn_fused.options import REDUCTIONS

Result = TypeVar("Result")
# Types of what a batch holds. Of subclasses of Tensor, a FakeTensor would reach the fake of the op, which checks less.
PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, type(None)})


def goes_unchecked(batch: Batch, spec: Reduced, dim: int) -> bool:
    """Whether a batch may go to an op that checks it: q and next_q have ``dim`` dimensions, nothing is unusual."""
    (q, _, _, next_q, *_), (*given, _, _) = batch, batch
    if not isinstance(q, Tensor) or not q.is_cpu or q.dim() != dim or not looks_at_values(q.device):
        return False
    same = next_q is None or (isinstance(next_q, Tensor) and next_q.dim() == dim)
    return same and spec.reduction in REDUCTIONS and PLAIN.issuperset(map(type, given))


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
