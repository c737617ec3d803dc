"""The derivative of sweep_backward, which a gradient penalty needs; it is computed by tiles, too."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused.arguments import accumulation_dtype
from dqn_fused.head.sweep import column_blocks, origin, row_blocks, tile
from dqn_fused.head.sweep_backward import without_autocast
from dqn_fused.head.whole import WHOLE, Whole


class SecondOrder(NamedTuple):
    """The work of ``second_order``: the gradients of S = sum(g * z), where g and z are (n, A).

    g is the gradient of the Q-values, rest * softmax(q), plus taken at the action taken. z is the change of the
    Q-values when hidden, weight and bias change by the upstream gradients of_hidden, of_weight and of_bias.
    """

    hidden: Tensor  # (n, D)
    weight: Tensor  # (A, D)
    bias: Tensor | None  # (A,)
    mask: Tensor | None  # (n, A)
    largest: Tensor  # (n,), of the legal Q-values
    total: Tensor  # (n,), of exp(q - largest)
    actions: Tensor  # (n,) int64, in [0, A)
    taken: Tensor  # (n,)
    rest: Tensor  # (n,)
    # Upstream gradients of the gradients of hidden, weight and bias, each of the same shape.
    of_hidden: Tensor | None
    of_weight: Tensor | None
    of_bias: Tensor | None
    shards: Whole = WHOLE


def second_order(work: SecondOrder) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, taken and rest, in two sweeps; the first finds means of z under the policy."""
    with without_autocast(work.hidden.device):
        return _by_tiles(work)


def _by_tiles(work: SecondOrder) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, dtype = work.hidden, work.weight, accumulation_dtype(work.hidden)
    A, bias_dtype = weight.shape[0], weight.dtype if work.bias is None else work.bias.dtype
    taken, mean = (torch.zeros_like(work.rest) for _ in range(2))
    by_hidden = torch.zeros_like(hidden, dtype=dtype)
    by_weight, by_bias = torch.zeros_like(weight), weight.new_zeros(A, dtype=bias_dtype)
    rows_at_once = list(row_blocks(hidden.shape[0]))
    tiles = [(rows, columns) for columns in column_blocks(hidden[rows_at_once[0]], A) for rows in rows_at_once]
    for rows, columns in tiles:
        policy, change = _policy(work, rows, columns), _change(work, rows, columns)
        mean[rows] += (policy * change).sum(1)
        inside, column = _column(work, rows, columns)
        taken[rows] += torch.where(inside, change.gather(1, column).squeeze(1), 0)
    mean_of_all = work.shards.total(mean)
    for rows, columns in tiles:
        share = _policy(work, rows, columns) * work.rest[rows].unsqueeze(1)
        off = share * (_change(work, rows, columns) - mean_of_all[rows].unsqueeze(1))
        inside, column = _column(work, rows, columns)
        gradient = share.scatter(
            1, column, share.gather(1, column) + torch.where(inside, work.taken[rows], 0).unsqueeze(1)
        )
        by_hidden[rows] += off @ weight[columns].to(dtype)
        of_weight = off.T @ hidden[rows].to(dtype)
        if work.of_weight is not None:
            by_hidden[rows] += gradient @ work.of_weight[columns].to(dtype)
        if work.of_hidden is not None:
            of_weight += gradient.T @ work.of_hidden[rows].to(dtype)
        by_weight[columns] += of_weight.to(weight.dtype)
        by_bias[columns] += off.sum(0).to(bias_dtype)
    return by_hidden.to(hidden.dtype), by_weight, by_bias, taken, mean


def _policy(work: SecondOrder, rows: slice, columns: slice) -> Tensor:
    """Softmax of a tile of Q-values, (rows, columns)."""
    hidden, mask = work.hidden[rows], None if work.mask is None else work.mask[rows]
    q = tile(hidden, work.weight[columns].to(hidden.dtype), work.bias, mask, columns).to(work.rest.dtype)
    share = torch.where(work.total == 0, 0, 1 / work.total)[rows]
    return (q - origin(work.largest)[rows].unsqueeze(1)).exp() * share.unsqueeze(1)


def _change(work: SecondOrder, rows: slice, columns: slice) -> Tensor:
    """A tile of z, (rows, columns)."""
    dtype = work.rest.dtype
    change = work.rest.new_zeros(work.rest[rows].shape[0], columns.stop - columns.start)
    if work.of_hidden is not None:
        change += F.linear(work.of_hidden[rows].to(dtype), work.weight[columns].to(dtype))
    if work.of_weight is not None:
        change += F.linear(work.hidden[rows].to(dtype), work.of_weight[columns].to(dtype))
    return change if work.of_bias is None else change + work.of_bias[columns].to(dtype)


def _column(work: SecondOrder, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether the action was taken in these columns, (rows,), and in which, (rows, 1)."""
    column = work.actions[rows] - columns.start
    last = columns.stop - columns.start - 1
    return (column >= 0) & (column <= last), column.clamp(0, last).unsqueeze(1)
