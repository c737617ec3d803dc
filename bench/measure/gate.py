"""No figure without the right result: each provider is compared with eager before it is timed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# Against eager in the same dtype, which rounds gamma * max(next_q) to it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class HasCall(Protocol):
    @property
    def call(self) -> Callable[[], Sequence[Tensor]]: ...


K = TypeVar("K")
P = TypeVar("P", bound=HasCall)


def passed(makers: Mapping[K, Callable[[], P]], dtype: torch.dtype, where: object, problems: list[str]) -> dict[K, P]:
    """The providers that run and agree with the first; problems gets a line for each of the others."""
    found: dict[K, P] = {}
    expected: list[Tensor] = []
    for name, make in makers.items():
        try:
            provider = make()
            result = [x.detach() for x in provider.call()]
        except Exception as error:
            problems.append(f"{name}, {where}: {type(error).__name__}: {error}")
            if not expected:  # nothing to compare with
                return {}
            continue
        expected = expected or [x.clone() for x in result]  # a CUDA graph would overwrite them
        why = difference(result, expected, dtype)
        if why is None:
            found[name] = provider
        else:
            problems.append(f"{name}, {where}, differs from eager: {why}")
    return found


def difference(result: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """What differs by more than the dtype's tolerance, relative to the largest element; None if nothing does."""
    for got, wanted in zip(result, expected, strict=False):  # some return the TD errors as well
        scale = wanted.abs().max().item()
        try:
            torch.testing.assert_close(
                got.to_dense(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10 * scale, check_dtype=False
            )
        except AssertionError as error:
            return str(error)
    return None
