"""What the distributional losses share: checks of (\\*N, A, K) tensors, the next action, reductions."""

from typing import Any

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, accumulation_dtype, check_samples
from dqn_fused.checks import BOOL, FLOATS, dense, show, wrong_device
from dqn_fused.reference import legal_actions, legal_values, of_samples


def check_distributions(batch: Batch, name: str, same_size: bool = False) -> Batch:
    """Check a batch whose q is (\\*N, A, K), and flatten it; the counterpart of arguments.check_batch.

    ``name`` is what the user calls q: ``quantiles`` or ``logits``; the others are ``next_<name>`` and
    ``next_<name>_online``. next_q is (\\*N, A, K'), with K' = K if same_size, and None for a ready target;
    next_q_online is (\\*N, A, K'') or (\\*N, A), next_action_mask (\\*N, A). With non_final_mask M stands for \\*N.
    The checked batch has one leading dimension: (n, A, K), (m, A, K'), (m, A, K'') or (m, A), (m, A) and (n,).
    """
    q, next_q, next_q_online, next_action_mask = batch.q, batch.next_q, batch.next_q_online, batch.next_action_mask
    dense(name, q, FLOATS)
    if q.dim() < 2 or 0 in q.shape[-2:]:
        raise ValueError(f"{name}: expected shape (*N, A, K) with at least one action and K > 0, got {show(q.shape)}")
    (*_, A, K), device = q.shape, q.device
    shape = q.shape[:-2]
    if next_q is not None:
        dense(f"next_{name}", next_q, FLOATS)
    actions, rewards, terminated, gamma, non_final_mask, weights = check_samples(batch, shape, device, name)
    lead, like = tuple(shape), name
    if non_final_mask is not None and next_q is not None:
        n, m = non_final_mask.shape[0], next_q.shape[0] if next_q.dim() else 0
        if next_q.dim() != 3 or m > n:
            raise ValueError(
                f"next_{name}: expected shape (M, {A}, {K if same_size else 'K'}) with non_final_mask, M being the "
                f"number of its true entries, at most {n}, got {show(next_q.shape)}"
            )
        lead = (m,)
    size = K if same_size else None
    if next_q is not None:
        next_q = _block(f"next_{name}", next_q, (*lead, A), size, like, device)
        like = f"next_{name}"
    if next_q_online is not None:
        chooser = f"next_{name}_online"
        dense(chooser, next_q_online, FLOATS)
        if next_q_online.dim() == len(lead) + 1:
            next_q_online = _values(chooser, next_q_online, (*lead, A), like, device)
        else:
            next_q_online = _block(chooser, next_q_online, (*lead, A), size, like, device)
    if next_action_mask is not None:
        dense("next_action_mask", next_action_mask, BOOL)
        next_action_mask = _values("next_action_mask", next_action_mask, (*lead, A), like, device)
    return Batch(
        q.reshape(-1, A, K), actions, rewards, next_q, terminated, gamma, non_final_mask,
        next_q_online, next_action_mask, weights, shape=shape,
    )  # fmt: skip


def _block(name: str, x: Tensor, lead: tuple[int, ...], size: int | None, like: str, device: torch.device) -> Tensor:
    """Check a tensor (*lead, size), or of any size above 0, and merge its leading dimensions except the actions."""
    if x.device != device:
        wrong_device(name, x, device, like)
    if x.shape[:-1] != lead or x.shape[-1] != (size or x.shape[-1]) or x.shape[-1] == 0:
        expected = show((*lead, size)) if size else f"({', '.join(map(str, lead))}, K) with K > 0"
        raise ValueError(f"{name}: expected shape {expected}, as {like}, got {show(x.shape)}")
    return x.reshape(-1, *x.shape[-2:])


def _values(name: str, x: Tensor, shape: tuple[int, ...], like: str, device: torch.device) -> Tensor:
    """Check a tensor of one value for each next state and action, and merge the leading dimensions."""
    if x.device != device:
        wrong_device(name, x, device, like)
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {show(shape)}, as {like}, got {show(x.shape)}")
    return x.reshape(-1, x.shape[-1])


def greedy(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """First largest legal action of the next states' values, (m, A): its index, (m,), and where there is none, (m,).

    There is none if no action is legal, or if a legal one is NaN. With a mask -inf counts as illegal, too.
    """
    best, index = legal_values(values, mask).max(-1)
    return index, best.isnan() if mask is None else best.isnan() | (best == -torch.inf)


def at_actions(x: Tensor, index: Tensor) -> Tensor:
    """x[i, index_i] of (n, A, K): (n, K)."""
    return x.gather(1, index.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def taken(batch: Batch) -> Tensor:
    """q[i, a_i] in the accumulation dtype, (n, K), differentiable by q; NaN where the action is illegal."""
    index, legal = legal_actions(batch.actions, batch.q.shape[1])
    x = at_actions(batch.q, index).to(accumulation_dtype(batch.q))
    return x if legal is None else torch.where(legal.unsqueeze(1), x, torch.nan)


def chosen(next_q: Tensor, values: Tensor, batch: Batch) -> Tensor:
    """The row of next_q of the greedy action by values, (m, A), for each sample, (n, K'), in the accumulation dtype.

    NaN where there is none, and arbitrary where nothing is bootstrapped.
    """
    index, unknown = greedy(values, batch.next_action_mask)
    x = at_actions(next_q, index).to(accumulation_dtype(batch.q))
    return of_samples(torch.where(unknown.unsqueeze(1), torch.nan, x), batch)


def per_row(batch: Batch) -> Batch:
    """The batch with its per-sample tensors as (n, 1), which reference.bootstrapped broadcasts along rows."""
    columns: dict[str, Any] = {
        name: x.unsqueeze(1)
        for name in ("rewards", "terminated", "gamma", "non_final_mask")
        if isinstance(x := getattr(batch, name), Tensor) and x.dim()
    }
    return batch._replace(**columns)
