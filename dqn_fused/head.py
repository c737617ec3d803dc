"""A linear head without its Q matrix: the value of the action taken, and what the next state is worth.

``q[i, a_i]`` is one dot product, with one row of the weight; only the target needs all actions, and of them only a
maximum or a sum of exponentials, which is taken tile by tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import _ops
from dqn_fused.arguments import (
    Batch,
    LossSpec,
    accumulation_dtype,
    check_compacted,
    check_double,
    check_samples,
    check_values,
)
from dqn_fused.checks import BOOL, FLOATS, dense, matrix, show, wrong_device
from dqn_fused.reference import legal_actions

# Q-values held at once, by device: 4 MB, in the second-level cache of two cores; 32 MB in the 40 to 126 of a GPU, whose
# every operation of a tile costs 5 us to issue.
TILE = {"cpu": 1 << 20, "cuda": 1 << 23}
TILE_ROWS, MIN_COLUMNS = 4096, 256


class Head(NamedTuple):
    """Hidden states and the layers on top of them; checked, the leading dimensions are flattened."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    next_hidden: Tensor  # (m, D)
    next_weight: Tensor  # (A, D)
    next_bias: Tensor | None  # (A,)
    next_hidden_online: Tensor | None  # (m, D)
    next_action_mask: Tensor | None  # (m, A)


def check_head(head: Head, samples: Batch, spec: LossSpec) -> tuple[Head, Batch]:
    """Check shapes, dtypes, devices and values; flatten. Of samples what there is one of for each sample is read."""
    hidden, weight, bias, next_hidden, next_weight, next_bias, next_hidden_online, next_action_mask = head
    dense("hidden", hidden, FLOATS)
    device, shape = hidden.device, hidden.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (*N, D) with at least one feature, got {show(shape)}")
    dense("weight", weight, FLOATS)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != shape[-1]:
        raise ValueError(f"weight: expected shape (A, {shape[-1]}), as nn.Linear holds it, got {show(weight.shape)}")
    A, D = weight.shape
    for name, x, size in (
        ("weight", weight, (A, D)),
        ("bias", bias, (A,)),
        ("next_weight", next_weight, (A, D)),
        ("next_bias", next_bias, (A,)),
    ):
        if x is not None:
            dense(name, x, FLOATS)
            if x.device != device:
                wrong_device(name, x, device, "hidden")
            if x.shape != size:
                raise ValueError(f"{name}: expected shape {show(size)}, got {show(x.shape)}")
    actions, rewards, terminated, gamma, mask, weights = check_samples(samples, shape[:-1], device, "hidden")
    next_shape, like = shape, "hidden"
    if mask is not None and isinstance(next_hidden, Tensor):
        check_compacted("next_hidden", next_hidden, D, mask)
        next_shape, like = next_hidden.shape, "next_hidden"
    next_hidden = matrix("next_hidden", next_hidden, FLOATS, next_shape, like, device)
    if next_hidden_online is not None:
        check_double("next_hidden_online", spec)
        next_hidden_online = matrix("next_hidden_online", next_hidden_online, FLOATS, next_shape, like, device)
    if next_action_mask is not None:
        legal_shape = torch.Size((*next_shape[:-1], A))
        next_action_mask = matrix("next_action_mask", next_action_mask, BOOL, legal_shape, f"{like} and weight", device)
    hidden, next_hidden = flat(hidden), flat(next_hidden)
    next_hidden_online = None if next_hidden_online is None else flat(next_hidden_online)
    next_action_mask = None if next_action_mask is None else flat(next_action_mask)
    batch = Batch(hidden, actions, rewards, next_hidden, terminated, gamma, mask, weights=weights, shape=shape[:-1])
    batch = check_values(batch, A, next_hidden.shape[0], "next_hidden")
    checked = Head(hidden, weight, bias, next_hidden, next_weight, next_bias, next_hidden_online, next_action_mask)
    return checked, batch


def autocast(head: Head) -> Head:
    """Hidden states as ``nn.Linear`` would read them: under autocast in its dtype, float64 excepted."""
    device = head.hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
        return head
    dtype = torch.get_autocast_dtype(device)
    names = ("hidden", "next_hidden", "next_hidden_online")
    states = {name: getattr(head, name) for name in names}
    return head._replace(
        **{name: x.to(dtype) for name, x in states.items() if x is not None and x.dtype is not torch.float64}
    )


def flat(x: Tensor) -> Tensor:
    """(*N, D) as (n, D), copied where its leading dimensions do not merge."""
    return x.reshape(-1, x.shape[-1])


class Sweep(NamedTuple):
    """One layer over all actions, reduced as it goes: the work of ``sweep``, which a backend may do by a kernel."""

    hidden: Tensor  # (m, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    mask: Tensor | None  # (m, A), true where an action is legal
    kind: str  # "max", "argmax" or "soft"
    temperature: float


def next_values(head: Head, spec: LossSpec, sweep: Callable[[Sweep], tuple[Tensor, Tensor | None]]) -> Tensor:
    """What each next state is worth, (m,), in the accumulation dtype; nothing of size (m, A) is held."""
    mask = head.next_action_mask
    if head.next_hidden_online is None:
        kind = "max" if spec.target == "max" else "soft"
        best, _ = sweep(Sweep(head.next_hidden, head.next_weight, head.next_bias, mask, kind, spec.temperature))
        value = best
    else:
        best, index = sweep(Sweep(head.next_hidden_online, head.weight, head.bias, mask, "argmax", spec.temperature))
        assert index is not None
        value = taken_values(head.next_hidden, head.next_weight, head.next_bias, index)
        value = torch.where(best.isnan(), torch.nan, value)
    # With a mask, -inf says that no action was legal.
    return value if mask is None else torch.where(best == -torch.inf, torch.nan, value)


def sweep(work: Sweep) -> tuple[Tensor, Tensor | None]:
    """Largest Q-value or soft value of each row, (m,), in the accumulation dtype, and the first index of the largest.

    The products are the library's, of tiles of actions that are reduced while they are in the cache. torch.compile
    calls it from its graph: traced, the number of tiles would be a constant, and each batch size a graph of its own.
    """
    if torch.compiler.is_compiling():
        value, index = _ops.sweep(*work)
        return value, index if work.kind == "argmax" else None
    rows = range(0, max(work.hidden.shape[0], 1), TILE_ROWS)
    parts = [_sweep_rows(work, slice(start, start + TILE_ROWS)) for start in rows]
    value, index = parts[0]
    if len(parts) > 1:
        value = torch.cat([part[0] for part in parts])
        index = None if index is None else torch.cat([part[1] for part in parts if part[1] is not None])
    return value, index


@torch.library.impl("dqn_fused::sweep", "CompositeExplicitAutograd")
def _sweep_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    value, index = sweep(Sweep(hidden, weight, bias, mask, kind, temperature))
    return value, hidden.new_empty(0, dtype=torch.int64) if index is None else index


def _sweep_rows(work: Sweep, some: slice) -> tuple[Tensor, Tensor | None]:
    hidden, mask = work.hidden[some], None if work.mask is None else work.mask[some]
    dtype = accumulation_dtype(hidden)
    tiles = _tiles(hidden, work.weight, work.bias, mask)
    if work.kind == "soft":
        return _soft_value(tiles, work.temperature, dtype), None
    if work.kind == "max":
        return _max(tiles).to(dtype), None
    best, index = _argmax(tiles)
    return best.to(dtype), index


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Q-values of ranges of actions, (rows, columns), and the first action of each; -inf where an action is illegal."""
    columns = max(TILE.get(hidden.device.type, TILE["cpu"]) // max(hidden.shape[0], 1), MIN_COLUMNS)
    for start in range(0, weight.shape[0], columns):
        some = slice(start, start + columns)
        q = F.linear(hidden, weight[some].to(hidden.dtype), None if bias is None else bias[some].to(hidden.dtype))
        yield start, q if mask is None else q.masked_fill_(~mask[:, some], -torch.inf)


def _max(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
    best = next(tiles)[1].amax(1)
    for _, q in tiles:
        best = torch.maximum(best, q.amax(1))
    return best


def _argmax(tiles: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Maximum and its first index; NaN wins."""
    best, index = next(tiles)[1].max(1)
    for start, q in tiles:
        value, where = q.max(1)
        better = (value > best) | (value.isnan() & ~best.isnan())
        best, index = torch.where(better, value, best), torch.where(better, where + start, index)
    return best, index


def _soft_value(tiles: Iterator[tuple[int, Tensor]], temperature: float, dtype: torch.dtype) -> Tensor:
    """temperature * logsumexp(q / temperature), by a running maximum and a running sum of exponentials below it."""
    scale = min(1 / temperature, torch.finfo(dtype).max)
    best = total = torch.empty(0)
    for start, q in tiles:
        q = q.to(dtype)
        largest = q.amax(1) if start == 0 else torch.maximum(best, q.amax(1))
        finite = torch.where(largest.isinf(), 0, largest)
        part = (q - finite.unsqueeze(1)).mul_(scale).exp_().sum(1)
        total = part if start == 0 else part + total * ((best - finite) * scale).exp()
        best = largest
    return best + temperature * total.log()


def taken_values(hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor) -> Tensor:
    """Q-values of one action a row, (n,): dot products in the accumulation dtype."""
    dtype = accumulation_dtype(hidden)
    value = (hidden.to(dtype) * weight.index_select(0, actions).to(dtype)).sum(-1)
    return value if bias is None else value + bias.index_select(0, actions).to(dtype)


class TakenValues(torch.autograd.Function):
    """taken_values, NaN where the action is illegal, with gradients for hidden, weight and bias.

    The rows of the weight's gradient are added up in a fixed order, in the accumulation dtype, where several samples
    took the same action. A backward that is itself recorded is written in differentiable operations.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, sparse: bool) -> Tensor:
        """Gather the rows and multiply."""
        index, legal = legal_actions(actions, weight.shape[0])
        ctx.save_for_backward(hidden, weight, actions)
        ctx.bias_dtype, ctx.sparse = None if bias is None else bias.dtype, sparse
        value = taken_values(hidden, weight, bias, index)
        return value if legal is None else torch.where(legal, value, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of hidden, (n, D), of weight, (A, D), and of bias, (A,)."""
        hidden, weight, actions = ctx.saved_tensors
        (grad,) = grads
        A = weight.shape[0]
        index, legal = legal_actions(actions, A)
        if legal is not None:
            grad = torch.where(legal, grad, 0)
        grad = grad.unsqueeze(1)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad * take_rows(weight, index).to(grad.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _add_rows(grad * hidden.to(grad.dtype), index, A, weight.dtype, ctx.sparse)
        if ctx.needs_input_grad[2]:
            grad_bias = _add_rows(grad, index, A, ctx.bias_dtype, ctx.sparse, column=True)
        return grad_hidden, grad_weight, grad_bias, None, None


def _add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype, sparse: bool, column: bool = False) -> Tensor:
    """Rows added up by their index, (A, D), or (A,) of a column; equal indices in the order of the samples."""
    if sparse:
        values = (values.squeeze(1) if column else values).to(dtype)
        return torch.sparse_coo_tensor(index.unsqueeze(0), values, (A, *values.shape[1:]), check_invariants=False)
    total = add_rows(values, index, A, dtype)
    return total.squeeze(1) if column else total


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, (n, D), whose derivative is add_rows: that of index_select adds by atomics on a GPU."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        taken: Tensor = TakeRows.apply(x, index)
        return taken
    return x.index_select(0, index)


def add_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
    """Sums of the rows of values by their index, (A, D), in a fixed order; differentiable any number of times."""
    if torch.compiler.is_compiling():
        return _ops.add_rows(values, index, A, dtype)
    if torch.is_grad_enabled():
        total: Tensor = AddRows.apply(values, index, A, dtype)
        return total
    return _sum_rows(values, index, A, dtype)


class TakeRows(torch.autograd.Function):
    """take_rows, recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """Gather rows."""
        ctx.save_for_backward(index)
        ctx.about = x.shape[0], x.dtype
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum of what came for each row, in the accumulation dtype."""
        (index,) = ctx.saved_tensors
        (grad,) = grads
        A, dtype = ctx.about
        return add_rows(grad.to(accumulation_dtype(grad)), index, A, dtype), None


class AddRows(torch.autograd.Function):
    """add_rows, recorded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
        """Add up rows."""
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return _sum_rows(values, index, A, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """What came for the row that each was added to."""
        (index,) = ctx.saved_tensors
        (grad,) = grads
        return take_rows(grad, index).to(ctx.dtype), None, None, None


def _sum_rows(values: Tensor, index: Tensor, A: int, dtype: torch.dtype) -> Tensor:
    """add_rows: within the dtype of values, which a narrower weight's gradient is rounded from once.

    Without a look at how many different indices there are, which would cost a synchronisation.
    """
    if dtype is values.dtype:
        return torch.ops.aten.embedding_dense_backward(values, index, A, -1, False)
    order = index.argsort(stable=True)
    index = index[order]
    segment = torch.cat([index.new_zeros(1), (index[1:] != index[:-1]).cumsum(0)])[: index.shape[0]]
    sums = torch.ops.aten.embedding_dense_backward(values[order], segment, max(index.shape[0], 1), -1, False)
    total = torch.zeros((A, values.shape[1]), dtype=dtype, device=values.device)
    # Where an index stands several times, the same sum is written several times.
    return total.index_copy_(0, index, sums.to(dtype)[segment])


torch.library.impl("dqn_fused::add_rows", "CompositeExplicitAutograd", _sum_rows)
