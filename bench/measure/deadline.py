"""A deadline divided over pieces of work; what did not fit is recorded, so that it can be named."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """Seconds from now on; infinite by default."""

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()

    def part(self, share: float) -> "Deadline":
        """A share of what is left."""
        return Deadline(max(0.0, self.left() * share), self.clock)

    def over(self, work: Sequence[T], dropped: list[T], least: float = 2.0) -> Iterator[tuple[T, float]]:
        """Each piece of work and the seconds it may take: an equal part of what is left.

        A piece that starts with less than `least` seconds left is dropped.
        """
        for i, item in enumerate(work):
            if self.left() < least:
                dropped.append(item)
            else:
                yield item, self.left() / (len(work) - i)
