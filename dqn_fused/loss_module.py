"""What the losses as modules have in common: they keep options, and call a function with them."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from dqn_fused import hints


class LossModule(nn.Module):
    """A module that keeps arguments of a function as attributes of the same names.

    A tensor becomes a buffer, which moves with the module.
    """

    FUNCTION: ClassVar[Callable[..., Any]]
    SHOWN: ClassVar[tuple[str, ...]]  # by repr, even where they are the function's defaults

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments of a constructor, given as its locals(), that are arguments of the function."""
        self.refuse(given["unknown"])
        super().__init__()
        known = inspect.signature(self.FUNCTION).parameters.keys() - {"unknown"}
        self._names = tuple(name for name in given if name in known)
        for name in self._names:
            if isinstance(given[name], Tensor):
                self.register_buffer(name, given[name])
            else:
                setattr(self, name, given[name])

    def refuse(self, unknown: Mapping[str, object]) -> None:
        """Raise for keywords that the module does not know."""
        if unknown:
            hints.unexpected(type(self).__name__, unknown)

    def options(self, **given: Any) -> dict[str, Any]:
        """Arguments of the function: those that are kept, and of those given what is not None in place of them."""
        return {name: getattr(self, name) if given.get(name) is None else given[name] for name in self._names}

    def extra_repr(self) -> str:
        """Options, for repr: those that are shown, and those that are not the function's defaults."""
        defaults = inspect.signature(self.FUNCTION).parameters
        shown = [name for name in self._names if self.shows(name) or getattr(self, name) != defaults[name].default]
        return ", ".join(f"{name}={self.show(name)}" for name in shown)

    def shows(self, name: str) -> bool:
        """Whether repr shows an option whatever it is."""
        return name in self.SHOWN

    def show(self, name: str) -> str:
        """Write an option for repr."""
        x = getattr(self, name)
        return f"{x}" if isinstance(x, Tensor) else repr(x)
