"""The loss of a linear head: once its actions are reduced, it is a loss with one action per sample."""

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype, normalise_weights
from dqn_fused.head.arguments import Head
from dqn_fused.head.conservative import ConservativeValues, conservative_term, largest_legal, state_sweep
from dqn_fused.head.sweep import Statistics
from dqn_fused.head.taken import TakenValues
from dqn_fused.head.targets import bonus, bonus_sweep, next_sweep, next_values
from dqn_fused.head.whole import WHOLE, Sweeper, Whole
from dqn_fused.node import td_loss
from dqn_fused.reference import reduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options(NamedTuple):
    """How the loss is computed. None of this changes its value."""

    backend: ModuleType
    auto: bool  # the backend was not asked for by name
    sparse_grad: bool = False
    process_group: "ProcessGroup | None" = None
    shards: Whole = WHOLE

    def sweep(self) -> Sweeper:
        """The backend's."""
        return self.backend.auto_sweep if self.auto else self.backend.sweep


def head_loss(head: Head, samples: Batch, spec: LossSpec, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, td_error, cql) of checked arguments; cql, of shape N, is None if it is not asked for."""
    backend, shards = options.backend, options.shards
    with torch.no_grad():
        works = (next_sweep(head, spec), bonus_sweep(head, spec), state_sweep(head, samples.actions, spec, shards))
        of_next, of_target, of_state = shards.sweeps(options.sweep(), works)
        rewards, next_q = samples.rewards, next_values(head, spec, of_next, shards)
        if of_target is not None:
            rewards = rewards.to(accumulation_dtype(head.hidden))
            rewards = rewards + bonus(head, samples.actions, spec, of_target, shards)
    taken, term = _values_of_state(head, samples.actions, spec, of_state, options)
    batch = samples._replace(
        q=taken.unsqueeze(1),
        actions=torch.zeros_like(samples.actions),
        rewards=rewards,
        next_q=None if next_q is None else next_q.unsqueeze(1),
    )
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, options.process_group)
    of_td = spec._replace(target="max", cql=False, cql_alpha=0.0)
    if term is None or spec.cql_alpha == 0:
        loss, td_error, _ = td_loss(batch, of_td, backend, batch.q)
    else:
        each = batch._replace(weights=None), of_td._replace(reduction="none")
        loss, td_error, _ = td_loss(*each, backend, batch.q)
        loss = reduced(loss + spec.cql_alpha * term.view(batch.shape), batch, spec.reduction)
    return loss, td_error, None if term is None else term.detach().view(batch.shape)


def _values_of_state(
    head: Head, actions: Tensor, spec: LossSpec, found: Statistics | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Value of the action taken, (n,), and the conservative term, (n,) or None; NaN where the action is illegal."""
    hidden, weight, bias, mask = head.hidden, head.weight, head.bias, head.action_mask
    if found is None:
        return TakenValues.apply(hidden, weight, bias, actions, options.sparse_grad, options.shards), None
    shards, largest, swept = options.shards, largest_legal(found, mask), found.taken
    assert found.total is not None
    if swept is not None:
        swept = shards.select(swept, shards.locate(actions, weight.shape[0])[1])
    if spec.dense_gradient():
        swept_values = (largest, found.total, swept)
        taken, term = ConservativeValues.apply(
            hidden, weight, bias, actions, mask, *swept_values, options.backend, options.auto, shards
        )
        return taken, term
    taken = TakenValues.apply(hidden, weight, bias, actions, options.sparse_grad, shards)
    with torch.no_grad():
        return taken, conservative_term(taken if swept is None else swept, largest, found.total)
