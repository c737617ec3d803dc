"""The one place that checks arguments: user's tensors in, a flat and immutable description of the batch out."""

import os
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
WIDE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})  # few PyTorch operations know these
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}) | WIDE_UNSIGNED
NUMBERS = FLOATS | INTEGERS
FLAGS = NUMBERS | {torch.bool}
BOOL = frozenset({torch.bool})

CPU = torch.device("cpu")

LOSSES = ("mse",)
REDUCTIONS = ("mean", "sum", "none")


class Batch(NamedTuple):
    """A checked batch of n = prod(N) transitions. Per-sample tensors are contiguous and one-dimensional."""

    q: Tensor  # (n, A), or (outer, inner, A) where the leading dimensions do not merge
    actions: Tensor  # (n,)
    rewards: Tensor  # (n,)
    next_q: Tensor  # as q, or (m, A) with non_final_mask
    terminated: Tensor | None  # (n,)
    gamma: float | Tensor  # number, () or (n,)
    non_final_mask: Tensor | None  # (n,)
    shape: torch.Size  # N


class LossSpec(NamedTuple):
    """What is computed from the TD errors."""

    loss: str
    reduction: str


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the arithmetic, the loss and the TD errors: float32, and float64 for a float64 q."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def check_loss(loss: str, reduction: str) -> LossSpec:
    """Check the names of the loss and the reduction."""
    spec = _SPECS.get((loss, reduction))
    if spec is not None:
        return spec
    if loss not in LOSSES:
        _wrong_choice("loss", loss, LOSSES)
    return _wrong_choice("reduction", reduction, REDUCTIONS)


_SPECS = {(loss, reduction): LossSpec(loss, reduction) for loss in LOSSES for reduction in REDUCTIONS}


def check_batch(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None,
    gamma: float | Tensor,
    non_final_mask: Tensor | None,
) -> Batch:
    """Check shapes, dtypes and devices and flatten the leading dimensions. Looks at no value (see check_values)."""
    if not isinstance(q, Tensor) or q.dtype not in FLOATS or q.layout is not torch.strided:
        _wrong_tensor("q", q, FLOATS)
    q_shape, device = q.shape, q.device
    if not q_shape or q_shape[-1] == 0:
        raise ValueError(f"q: expected shape (*N, A) with at least one action, got {_show(q_shape)}")
    shape = q_shape[:-1]
    actions = _per_sample("actions", actions, INTEGERS, shape, device)
    if actions.dtype in WIDE_UNSIGNED:
        actions = actions.to(torch.int64)
    rewards = _per_sample("rewards", rewards, NUMBERS, shape, device)

    if not isinstance(next_q, Tensor) or next_q.dtype not in FLOATS or next_q.layout is not torch.strided:
        _wrong_tensor("next_q", next_q, FLOATS)
    if next_q.device != device:
        _wrong_device("next_q", next_q, device)
    if non_final_mask is None:
        if next_q.shape != q_shape:
            raise ValueError(f"next_q: expected shape {_show(q_shape)}, as q, got {_show(next_q.shape)}")
        if terminated is not None:
            terminated = _per_sample("terminated", terminated, FLAGS, shape, device)
    else:
        if terminated is not None:
            raise ValueError("terminated: expected None beside non_final_mask, which says the same; give one of them")
        non_final_mask = _per_sample("non_final_mask", non_final_mask, BOOL, shape, device)
        if next_q.dim() != 2 or next_q.shape[1] != q_shape[-1] or next_q.shape[0] > non_final_mask.shape[0]:
            raise ValueError(
                f"next_q: expected shape (M, {q_shape[-1]}) with non_final_mask, M being the number of its true "
                f"entries, at most {non_final_mask.shape[0]}, got {_show(next_q.shape)}"
            )

    if isinstance(gamma, Tensor):
        one_for_all = gamma.dim() == 0
        gamma = _per_sample("gamma", gamma, FLOATS, torch.Size() if one_for_all else shape, device)
        if one_for_all:
            gamma = gamma.reshape(())
    elif type(gamma) is not float:
        if not isinstance(gamma, Real):
            raise TypeError(f"gamma: expected a number or a torch.Tensor, got {type(gamma).__name__}")
        gamma = float(gamma)
    return Batch(_rows(q), actions, rewards, _rows(next_q), terminated, gamma, non_final_mask, shape)


def check_values(batch: Batch) -> Batch:
    """Check what only the values tell: actions inside [0, A), and as many true entries in non_final_mask as next rows.

    On the CPU, and on any device under ``DQN_FUSED_CHECK=1``, a violation is an IndexError. Elsewhere looking would
    cost a synchronisation: an illegal action is left to the backend (td is NaN, the gradient row zero), and a wrong
    mask makes every action illegal. Inside torch.compile nothing is looked at: a raise would break the graph.
    """
    mask, m, A = batch.non_final_mask, batch.next_q.shape[0], batch.q.shape[-1]
    if not looks_at_values(batch.q.device):
        if mask is None:
            return batch
        return batch._replace(actions=torch.where(mask.sum() == m, batch.actions.to(torch.int64), -1))
    if batch.actions.numel():
        low, high = (int(x) for x in torch.aminmax(batch.actions))
        if low < 0 or high >= A:
            actions = batch.actions.to(torch.int64)  # A need not fit the actions' own dtype
            row = int(((actions < 0) | (actions >= A)).int().argmax())
            raise IndexError(
                f"actions: expected values in [0, {A}), got {int(batch.actions[row])} in row {_row(row, batch.shape)}"
            )
    if mask is not None and (count := int(mask.sum())) != m:
        raise IndexError(
            f"non_final_mask: expected as many true entries as next_q has rows, {m}, got {count} of {mask.numel()}"
        )
    return batch


def looks_at_values(device: torch.device) -> bool:
    """Whether check_values looks, so that everything behind it may rely on legal actions."""
    if torch.compiler.is_compiling():
        return False
    return device == CPU or os.environ.get("DQN_FUSED_CHECK", "0") not in ("", "0")


def _per_sample(
    name: str, x: Tensor, dtypes: frozenset[torch.dtype], shape: torch.Size, device: torch.device
) -> Tensor:
    """Check one value a sample, (*N) or (*N, 1), and flatten it to a contiguous (n,)."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes or x.layout is not torch.strided:
        _wrong_tensor(name, x, dtypes)
    if x.device != device:
        _wrong_device(name, x, device)
    got = x.shape
    if got != shape and got != (*shape, 1):
        raise ValueError(f"{name}: expected shape {_show(shape)} or {_show((*shape, 1))}, got {_show(got)}")
    if len(got) != 1:
        x = x.reshape(-1)
    return x if x.is_contiguous() else x.contiguous()


def _wrong_tensor(name: str, x: Tensor, dtypes: frozenset[torch.dtype]) -> NoReturn:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        kind = {FLOATS: "a floating", INTEGERS: "an integer", NUMBERS: "a floating or integer", BOOL: "the bool"}
        raise TypeError(f"{name}: expected {kind.get(dtypes, 'a bool, integer or floating')} dtype, got {x.dtype}")
    raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")


def _wrong_device(name: str, x: Tensor, device: torch.device) -> NoReturn:
    raise ValueError(f"{name}: expected device {device}, as q, got {x.device}")


def _rows(x: Tensor) -> Tensor:
    """View (*N, A) as (n, A), or as (outer, inner, A) where a slice of a longer sequence forbids one row stride.

    Leading dimensions that merge into neither, such as three that are permuted, are copied.
    """
    if x.dim() == 2:
        return x
    if x.dim() == 1:
        return x.unsqueeze(0)
    for outer in range(x.dim() - 1):
        try:
            return x.view(*((x.shape[:outer].numel(),) if outer else ()), x.shape[outer:-1].numel(), x.shape[-1])
        except RuntimeError:
            continue
    return x.reshape(-1, x.shape[-1])


def _wrong_choice(name: str, got: object, choices: tuple[str, ...]) -> NoReturn:
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got!r}")


def _row(row: int, shape: torch.Size) -> str:
    """Write a flat row as the index the user knows: 5, or (1, 2) with two leading dimensions."""
    if len(shape) < 2:
        return str(row)
    return _show(int(i) for i in torch.unravel_index(torch.tensor(row), shape))


def _show(shape: Iterable[int]) -> str:
    return str(tuple(shape))
