"""What the next state is worth: the Bellman targets that are more than a maximum."""

import math
from dataclasses import dataclass
from numbers import Real


def number(name: str, x: object, expected: str = "a number") -> float:
    """Check that an option is a number: a tensor would have to be read back from its device."""
    if not isinstance(x, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    return float(x)


@dataclass(frozen=True)
class Soft:
    """The soft value, ``temperature * logsumexp(next_q / temperature)``, instead of the maximum.

    It tends to the maximum as the temperature goes to 0, and is computed so that any temperature is stable.
    Haarnoja et al. (2017), https://arxiv.org/abs/1702.08165.

    >>> Soft()
    Soft(temperature=0.03)
    """

    temperature: float = 0.03

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)


@dataclass(frozen=True)
class Munchausen:
    """The soft value, and ``alpha * clip(temperature * log pi(a|s), clip, 0)`` added to the reward.

    pi is the softmax of ``target_q / temperature``: the target network's Q-values of the state itself. The defaults are
    those of the paper: Vieillard et al. (2020), https://arxiv.org/abs/2007.14430.

    >>> Munchausen(temperature=0.5)
    Munchausen(temperature=0.5, alpha=0.9, clip=-1.0)
    """

    temperature: float = 0.03
    alpha: float = 0.9
    clip: float = -1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not math.isfinite(number("alpha", self.alpha)):
            raise ValueError(f"alpha: expected a finite number, got {self.alpha}")
        if not number("clip", self.clip) <= 0:
            raise ValueError(f"clip: expected a number of at most 0, the lower bound of a log-policy, got {self.clip}")


def _check_temperature(temperature: float) -> None:
    if not 0 < number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
