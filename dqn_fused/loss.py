"""The public loss as a function, the same for a ready target, and the same with its gradient."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from dqn_fused import hints, node, transforms
from dqn_fused._backends import choose
from dqn_fused.arguments import (
    Batch,
    LossSpec,
    check_batch,
    check_group,
    check_loss,
    check_values,
    normalise_weights,
)
from dqn_fused.autograd import apart, inside_transform, refuse_tangent
from dqn_fused.ensemble import one_next_q
from dqn_fused.node import td_loss
from dqn_fused.reference import conservative_term
from dqn_fused.targets import Munchausen, Soft
from dqn_fused.unchecked import goes_unchecked, refusing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_dqn_loss(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | Sequence[Tensor],
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    next_q_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    target_q: Tensor | None = None,
    cql_alpha: float = 0.0,
    action_mask: Tensor | None = None,
    value_transform: str = "identity",
    ensemble: str = "min",
    return_td_error: bool = False,
    return_cql: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """DQN loss (Mnih et al., 2015): the TD error of the action taken against the Bellman target.

    For each transition ``td = q[a] - y`` with ``y = rewards + gamma * max(next_q)``, or ``y = rewards`` if terminated;
    its loss is ``td**2``. Only ``q`` receives a gradient, and only at the action taken; everything else is a constant.
    Each option changes one thing, and options can be combined.

    Args:
        q: (\\*N, A) Q-values of the online network; float16, bfloat16, float32 or float64. Any leading dimensions.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A): the action taken.
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_q: (\\*N, A) Q-values of the target network in the next state, floating. With ``non_final_mask``: (M, A).
            Or a list of such tensors, one for each of several target networks: see ``ensemble``.
        terminated: (\\*N) or (\\*N, 1), bool, integer or floating, nonzero where the episode ended in the next
            state: nothing is bootstrapped, that row of ``next_q`` is not used. A truncated episode is not terminated.
        gamma: discount: a number, a 0-d tensor, or (\\*N) / (\\*N, 1) floating, for n-step returns.
        non_final_mask: (\\*N) or (\\*N, 1) bool, instead of ``terminated``: true for the M samples, in order, whose
            next states ``next_q``, ``next_q_online`` and ``next_action_mask`` hold.
        next_q_online: as next_q: Q-values of the online network in the next state. Double DQN (van Hasselt et al.,
            2016): the action is chosen here, the first one of equals, and valued in ``next_q``.
        next_action_mask: as next_q, bool, true for the actions that are legal in the next state: no other is chosen
            or has an effect on the result. A row without a legal action is NaN, unless terminated. With a mask, -inf
            counts as illegal, too.
        weights: (\\*N) or (\\*N, 1), floating: the loss of each sample is multiplied by its weight, the importance
            weight of prioritised replay (Schaul et al., 2016), after ``loss`` and the conservative term.
        loss: ``"mse"``: td squared, without a factor 1/2; ``"huber"``: ``torch.nn.functional.huber_loss`` of td;
            ``"smooth_l1"``: ``torch.nn.functional.smooth_l1_loss``, which is huber divided by ``delta``.
        delta: where huber changes from a parabola to a line; the beta of smooth_l1, where 0 means l1.
        reduction: ``"mean"``, which divides by the number of samples whatever their weights, ``"weighted_mean"``, which
            divides by the sum of the weights, ``"sum"``, or ``"none"`` for the loss of each sample, (\\*N).
        target: ``"max"``, ``"soft"``, ``"munchausen"``, or an instance of ``Soft`` or ``Munchausen`` for constants
            other than those of the papers. They are classes, so that only a target that has a temperature takes one.
        target_q: (\\*N, A), floating: Q-values of the target network in the state itself, for Munchausen.
        cql_alpha: weight of the conservative term of CQL(H) (Kumar et al., 2020), which is added to the loss of each
            sample: ``logsumexp(q) - q[a]``. Every action then receives a gradient.
        action_mask: (\\*N, A) bool, true for the actions that are legal in the state itself: the policy of Munchausen
            and the sum of CQL are taken over them.
        value_transform: ``"identity"``, or ``"signed_hyperbolic"``: the networks learn h of the value, of R2D2
            (Kapturowski et al., 2019), ``y = h(rewards + gamma * h_inverse(max(next_q)))``, and ``y = h(rewards)`` if
            terminated, with ``h(x) = sign(x) * (sqrt(abs(x) + 1) - 1) + 0.001 * x``. Rewards need then not be clipped.
        ensemble: how several target networks are combined: ``"min"``, for each action the least of their values, as
            in clipped double Q-learning (Fujimoto et al., 2018), Maxmin Q-learning (Lan et al., 2020) and REDQ (Chen
            et al., 2021), or ``"mean"``, the mean of their values (Anschel et al., 2017).
        return_td_error: also return the signed, unweighted TD errors, (\\*N), without gradient: priorities of replay.
        return_cql: also return the conservative term of each sample, (\\*N), unweighted and without gradient.
        process_group: with ``"weighted_mean"``, sum the weights over the ranks of the group,
            ``torch.distributed.group.WORLD`` for all of them. The mean of the ranks' losses, and of their gradients,
            which DistributedDataParallel computes, is then the weighted mean over all samples, however they are
            distributed. Every rank must make the call. Without ``weights`` each sample has the weight one.
        backend: ``"auto"``, or by name as in ``dqn_fused.backends``. Inside ``torch.compile`` ``"auto"`` takes
            ``"torch"``, whose operations Inductor fuses, up to 64 actions.

    Returns:
        The loss, or a tuple of it and what else is asked for, in this order: loss, td_error, cql. All are float32, or
        float64 if q is float64. The same call gives the same bits, with the same values in the same layout on the same
        machine, at any number of threads. In another layout the order of a sum may be another one.

    Raises:
        ValueError: a shape, a device or an option does not fit. Nothing is broadcast, no argument is ignored.
        TypeError: a dtype does not fit.
        IndexError: an action outside [0, A), or a mask without exactly M true entries. On a GPU looking would cost a
            synchronisation: the loss is NaN and the gradient zero instead, unless ``DQN_FUSED_CHECK=1`` is set.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    >>> import torch
    >>> q = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> next_q = torch.tensor([[1.0, 2.0], [5.0, 2.0]])
    >>> actions, rewards, terminated = torch.tensor([0, 1]), torch.tensor([0.5, 1.0]), torch.tensor([True, False])
    >>> loss = fused_dqn_loss(q, actions, rewards, next_q, terminated, gamma=0.9)
    >>> loss.backward()
    >>> loss.detach(), q.grad
    (tensor(1.2500), tensor([[ 0.5000,  0.0000],
            [ 0.0000, -1.5000]]))

    Double DQN with prioritised replay and the Huber loss:

    >>> loss, td_error = fused_dqn_loss(
    ...     q, actions, rewards, next_q, terminated, gamma=0.9, next_q_online=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
    ...     weights=torch.tensor([1.0, 0.5]), loss="huber", return_td_error=True)
    >>> td_error
    tensor([0.5000, 1.2000])
    """
    if unknown:
        hints.unexpected("fused_dqn_loss", unknown)
    spec = check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
    batch = Batch(
        q, actions, rewards, one_next_q(q, next_q, ensemble), terminated, gamma, non_final_mask,
        next_q_online, next_action_mask, weights, target_q, action_mask,
    )  # fmt: skip
    return _returned(*_run(td_loss, batch, spec, backend, process_group), return_td_error, return_cql)


def fused_td_loss(
    q: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    cql_alpha: float = 0.0,
    action_mask: Tensor | None = None,
    return_td_error: bool = False,
    return_cql: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """``fused_dqn_loss`` for a target that is already known: n-step returns, Q(lambda), the V(s') of ILQL.

    Args:
        q: (\\*N, A), and all other arguments, as in ``fused_dqn_loss``.
        target: (\\*N) or (\\*N, 1), floating or integer: the target of ``q[a]``; a constant.

    Returns:
        The loss, or a tuple, as ``fused_dqn_loss``.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_dqn_loss``.

    >>> import torch
    >>> q = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> fused_td_loss(q, torch.tensor([0, 1]), torch.tensor([0.5, 5.0]), return_td_error=True)
    (tensor(0.6250), tensor([ 0.5000, -1.0000]))
    """
    if unknown:
        hints.unexpected("fused_td_loss", unknown)
    spec = check_loss(loss, delta, reduction, "max", cql_alpha, return_cql)
    batch = Batch(q, actions, target, None, weights=weights, action_mask=action_mask)
    return _returned(*_run(td_loss, batch, spec, backend, process_group), return_td_error, return_cql)


def fused_dqn_loss_and_grad(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor | Sequence[Tensor],
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    next_q_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    target_q: Tensor | None = None,
    cql_alpha: float = 0.0,
    action_mask: Tensor | None = None,
    value_transform: str = "identity",
    ensemble: str = "min",
    return_td_error: bool = False,
    return_cql: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> tuple[Tensor, ...]:
    """DQN loss and its gradient by q in one pass, without autograd: the fastest implementation.

    ``q.backward(grad_q)`` then continues through the network. In JAX this form is ``value_and_grad``.

    Args:
        q: (\\*N, A), and all other arguments, as in ``fused_dqn_loss``. No graph is recorded, whether or not ``q``
            requires a gradient.

    Returns:
        ``(loss, grad_q)``, then td_error and cql, if asked for. ``grad_q`` has q's shape and dtype and is contiguous.
        Without a conservative term it is zero except at the action taken in each row. With ``reduction="none"`` it is
        the gradient of the sum of the losses.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_dqn_loss``.

    >>> import torch
    >>> states, network = torch.ones(2, 3), torch.nn.Linear(3, 2)
    >>> q = network(states)
    >>> loss, grad_q = fused_dqn_loss_and_grad(q, torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2, 2))
    >>> q.backward(grad_q)
    >>> torch.equal(network.bias.grad, grad_q.sum(0))
    True
    """
    if unknown:
        hints.unexpected("fused_dqn_loss_and_grad", unknown)
    spec = check_loss(loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
    batch = Batch(
        q, actions, rewards, one_next_q(q, next_q, ensemble), terminated, gamma, non_final_mask,
        next_q_online, next_action_mask, weights, target_q, action_mask,
    )  # fmt: skip
    batch, (result, grad_q, td_error, normaliser) = _run(_loss_and_grad, batch, spec, backend, process_group)
    found = [result, grad_q]
    if return_td_error:
        found.append(td_error)
    if return_cql:
        found.append(_cql(normaliser, batch))
    return tuple(found)


def _returned(
    batch: Batch, outputs: tuple[Tensor, ...], return_td_error: bool, return_cql: bool
) -> Tensor | tuple[Tensor, ...]:
    result, td_error, normaliser = outputs
    if return_cql:
        cql = _cql(normaliser, batch)
        return (result, apart(td_error), cql) if return_td_error else (result, cql)
    return (result, apart(td_error)) if return_td_error else result


@torch.no_grad()
def _cql(normaliser: Tensor, batch: Batch) -> Tensor:
    return conservative_term(normaliser, batch._replace(actions=batch.saved_actions()))


def _loss_and_grad(batch: Batch, spec: LossSpec, implementation: ModuleType, q: Tensor) -> tuple[Tensor, ...]:
    refuse_tangent(q)
    return implementation.loss_and_grad(batch, spec)


def _run(
    what: Callable[[Batch, LossSpec, ModuleType, Tensor], tuple[Any, ...]],
    given: Batch,
    spec: LossSpec,
    backend: str,
    process_group: "ProcessGroup | None",
) -> tuple[Batch, tuple[Tensor, ...]]:
    """Check the arguments and run a backend; return the batch, checked or as it was given, and the results."""
    if backend in node.serves and process_group is None and not torch.compiler.is_compiling():
        found = node.calls[what is td_loss](spec, given)
        if found is not None:
            return given, found
    q = given.q
    hints.warn_if_swapped(q, (given.next_q,))
    transformed = inside_transform()
    if process_group is not None:
        check_group(process_group, spec)
    if transformed:
        if process_group is not None:
            transforms.refuse("process_group", "divide the weights by their global sum before, and take the sum")
        if what is not td_loss:
            transforms.refuse("fused_dqn_loss_and_grad", "torch.func.grad_and_value of fused_dqn_loss gives both")
        what, backend = transforms.transformed_td_loss, transforms.backend_inside(backend)
    elif goes_unchecked(given, spec, 2):
        implementation = choose(backend, q.device, q.shape[-1])
        if implementation.CHECKS_CPU:
            return given, refusing(lambda: what(given, spec, implementation, q), lambda: _checked(given, spec))
    batch = check_batch(given, spec)
    implementation = choose(backend, batch.q.device, batch.action_count(), batch.actions.numel())
    if not transformed or torch.compiler.is_compiling():
        counts_mask = implementation.COUNTS_MASK and not transformed
        batch = check_values(batch, batch.action_count(), batch.next_count(), counts_mask=counts_mask)
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    return batch, what(batch, spec, implementation, q)


def _checked(given: Batch, spec: LossSpec) -> Batch:
    batch = check_batch(given, spec)
    return check_values(batch, batch.action_count(), batch.next_count())
