"""Checks of one tensor or option: which argument, what was expected, what came."""

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from dqn_fused import hints

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
WIDE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})  # few PyTorch operations support these
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}) | WIDE_UNSIGNED
NUMBERS = FLOATS | INTEGERS
FLAGS = NUMBERS | {torch.bool}
BOOL = frozenset({torch.bool})


def dense(name: str, x: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """Check that x is a dense tensor of one of the dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.layout is not torch.strided:
        _wrong_tensor(name, x, dtypes)


def per_sample(
    name: str, x: Tensor, dtypes: frozenset[torch.dtype], shape: torch.Size, device: torch.device, like: str = "q"
) -> Tensor:
    """Check a tensor with one value for each sample, (*N) or (*N, 1), and flatten it to a contiguous (n,)."""
    dense(name, x, dtypes)
    if x.device != device:
        wrong_device(name, x, device, like)
    got = x.shape
    if got != shape and got != (*shape, 1):
        more = hints.of_actions(like) if name == "actions" and got[:-1] == shape else ""
        raise ValueError(f"{name}: expected shape {show(shape)} or {show((*shape, 1))}, got {show(got)}{more}")
    if len(got) != 1:
        x = x.reshape(-1)
    return x if x.is_contiguous() else x.contiguous()


def matrix(
    name: str, x: Tensor, dtypes: frozenset[torch.dtype], shape: torch.Size, like: str, device: torch.device
) -> Tensor:
    """Check a tensor with one value for each sample and action, (*N, A), and flatten its leading dimensions."""
    dense(name, x, dtypes)
    if x.device != device:
        wrong_device(name, x, device, like)
    if x.shape != shape:
        more = hints.ALL_ACTIONS if x.shape in (shape[:-1], (*shape[:-1], 1)) else ""
        raise ValueError(f"{name}: expected shape {show(shape)}, as {like}, got {show(x.shape)}{more}")
    return rows(x)


def _wrong_tensor(name: str, x: Tensor, dtypes: frozenset[torch.dtype]) -> NoReturn:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{hints.of_type(name, x)}")
    if x.dtype not in dtypes:
        kind = {FLOATS: "a floating", INTEGERS: "an integer", NUMBERS: "a floating or integer", BOOL: "the bool"}
        raise TypeError(
            f"{name}: expected {kind.get(dtypes, 'a bool, integer or floating')} dtype, got {x.dtype}"
            f"{hints.of_dtype(name, dtypes is INTEGERS)}"
        )
    raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")


def wrong_device(name: str, x: Tensor, device: torch.device, like: str) -> NoReturn:
    """Raise for a tensor on another device."""
    raise ValueError(f"{name}: expected device {device}, as {like}, got {x.device}")


def rows(x: Tensor) -> Tensor:
    """View (*N, A) as (n, A), or as (outer, inner, A) where the rows of a slice do not have one stride.

    A tensor whose leading dimensions merge into neither, such as three that are permuted, is copied.
    """
    if x.dim() == 2:
        return x
    if x.dim() == 1:
        return x.unsqueeze(0)
    if torch.compiler.is_compiling():  # Dynamo catches no error of a view
        return x.reshape(-1, x.shape[-1])
    for outer in range(x.dim() - 1):
        try:
            return x.view(*((x.shape[:outer].numel(),) if outer else ()), x.shape[outer:-1].numel(), x.shape[-1])
        except RuntimeError:
            continue
    return x.reshape(-1, x.shape[-1])


def check_choice(name: str, got: object, choices: tuple[str, ...]) -> None:
    """Check that a name is one of the choices."""
    if not isinstance(got, str) or got not in choices:
        wrong_choice(name, got, choices)


def wrong_choice(name: str, got: object, choices: tuple[str, ...]) -> NoReturn:
    """Raise for a name that is not one of the choices."""
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got!r}")


def row_index(row: int, shape: torch.Size) -> str:
    """Write a flat row as an index into the user's tensor: 5, or (1, 2) with two leading dimensions."""
    if len(shape) < 2:
        return str(row)
    index = []
    for size in reversed(shape):
        row, i = divmod(row, size)
        index.append(i)
    return show(reversed(index))


def show(shape: Iterable[int]) -> str:
    """Write a shape as a tuple."""
    return str(tuple(shape))


def has_autocast(device: str) -> bool:
    """Whether there is an autocast for a device type: meta has none."""
    return torch.amp.is_autocast_available(device)


# Dynamo of torch 2.10 and 2.11 does not trace what it calls.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
