"""The public losses of a linear head, as functions."""

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from dqn_fused import hints
from dqn_fused._backends import choose
from dqn_fused.arguments import Batch, LossSpec, check_group, check_loss
from dqn_fused.autograd import apart, inside_transform
from dqn_fused.checks import wrong_choice
from dqn_fused.head.agreement import Agreement, check_member
from dqn_fused.head.arguments import Head, autocast, check_head
from dqn_fused.head.dtensor import has_dtensor, local_layers, refuse_dtensors
from dqn_fused.head.loss import Options, head_loss
from dqn_fused.head.ranks import HIDDEN_GRADS
from dqn_fused.targets import Munchausen, Soft
from dqn_fused.transforms import refuse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_linear_dqn_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_hidden: Tensor,
    next_weight: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    bias: Tensor | None = None,
    next_bias: Tensor | None = None,
    next_hidden_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    target_hidden: Tensor | None = None,
    action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft | Munchausen = "max",
    cql_alpha: float = 0.0,
    value_transform: str = "identity",
    return_td_error: bool = False,
    return_cql: bool = False,
    sparse_grad: bool = False,
    process_group: "ProcessGroup | None" = None,
    tensor_parallel_group: "ProcessGroup | None" = None,
    hidden_grad: str = "sum",
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """DQN loss of a linear head with many actions, such as a vocabulary or a catalogue, without its Q matrix.

    It is ``fused_dqn_loss`` of ``linear(hidden, weight, bias)`` and ``linear(next_hidden, next_weight, next_bias)``.
    The online network costs one dot product per sample, and one row of the weight's gradient; of the next state only
    the maximum is kept. The conservative term and Munchausen sum over all actions of the state itself, tile by tile,
    and the backward of the conservative term multiplies the tiles again. Nothing of the size of a Q matrix is held at
    any time.

    Args:
        hidden: (\\*N, D) output of the online network below its head; floating. Receives a gradient.
        weight: (A, D) of the head, as ``nn.Linear`` holds it. Receives a gradient in the rows of the actions taken,
            and with the conservative term in all rows.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A).
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_hidden: (\\*N, D) of the target network in the next state. With ``non_final_mask``: (M, D).
        next_weight: (A, D) of the target network's head.
        terminated: as in ``fused_dqn_loss``, as are gamma, non_final_mask, weights, loss, delta and reduction.
        gamma: discount.
        bias: (A,) of the head. Receives a gradient.
        next_bias: (A,) of the target network's head.
        next_hidden_online: as next_hidden, of the online network: double DQN. The action is chosen by ``weight`` and
            ``bias``; of equal Q-values the first. Q-values of equal rows of the weight may differ by a rounding, since
            a library may compute the columns at the edge of a matrix by another kernel.
        next_action_mask: (\\*N, A) bool, true for the actions that are legal in the next state; (M, A) with
            ``non_final_mask``.
        non_final_mask: instead of ``terminated``: true for the M samples whose next states ``next_hidden`` holds.
        target_hidden: (\\*N, D) of the target network in the state itself, for Munchausen.
        action_mask: (\\*N, A) bool, true for the actions that are legal in the state itself, over which Munchausen's
            policy and CQL's sum are taken.
        weights: importance weights.
        loss: ``"mse"``, ``"huber"`` or ``"smooth_l1"``.
        delta: of huber and smooth_l1.
        reduction: ``"mean"``, ``"weighted_mean"``, ``"sum"`` or ``"none"``.
        target: ``"max"``, ``"soft"``, ``"munchausen"``, ``Soft`` or ``Munchausen``.
        cql_alpha: weight of the conservative term of CQL(H) (Kumar et al., 2020). It has a second derivative; a third
            one raises.
        value_transform: ``"identity"`` or ``"signed_hyperbolic"``, as in ``fused_dqn_loss``.
        return_td_error: also return the signed TD errors, (\\*N), without gradient.
        return_cql: also return the conservative term of each sample, (\\*N), unweighted and without gradient.
        sparse_grad: give weight and bias row-sparse gradients, as ``nn.Embedding(sparse=True)`` does, for
            ``torch.optim.SGD`` and ``SparseAdam``: nothing of size A is then allocated. torch.compile does not trace
            it. Not with ``cql_alpha``, whose gradient has no zero rows.
        process_group: with ``"weighted_mean"``, the ranks over which weights are summed.
        tensor_parallel_group: ranks that share the weights. Each gives its own rows of weight, bias, next_weight and
            next_bias, in the order of the ranks, any number of them, and its columns of the masks. Everything else is
            the same on every rank, including the actions, which count all rows, and the results. If the weights are
            DTensors, ``Shard(0)`` on a mesh of one dimension, the group is that of the mesh.
        hidden_grad: on ranks, ``"sum"``: the gradient of hidden is summed over them, as behind a copy-to region; or
            ``"partial"``: it is that of the rows of this rank, for a layer below that sums.
        backend: ``"auto"``, or by name as in ``dqn_fused.backends``.

    Returns:
        The loss; or a tuple of loss, td_error and cql, as far as they are asked for, in this order. In float32, or in
        float64 if hidden is float64.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_dqn_loss``.

    >>> import torch
    >>> hidden, next_hidden = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    >>> weight, next_weight = torch.zeros(1000, 3, requires_grad=True), torch.ones(1000, 3)
    >>> actions, rewards = torch.tensor([7, 900]), torch.tensor([0.0, 1.0])
    >>> loss = fused_linear_dqn_loss(hidden, weight, actions, rewards, next_hidden, next_weight, gamma=1.0)
    >>> loss.backward()
    >>> loss.detach(), weight.grad.abs().sum(1).nonzero().flatten()
    (tensor(12.5000), tensor([  7, 900]))
    """
    if unknown:
        hints.unexpected("fused_linear_dqn_loss", unknown)
    chosen = (loss, delta, reduction, target, cql_alpha, return_cql, value_transform)
    head = Head(
        hidden, weight, bias, next_hidden, next_weight, next_bias,
        next_hidden_online, next_action_mask, target_hidden, action_mask,
    )  # fmt: skip
    samples = Batch(hidden, actions, rewards, next_hidden, terminated, gamma, non_final_mask, weights=weights)
    outputs = _run(
        head, samples, chosen, tensor_parallel_group, hidden_grad, "fused_linear_dqn_loss",
        backend, sparse_grad, process_group,
    )  # fmt: skip
    return _returned(outputs, return_td_error, return_cql)


def fused_linear_td_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    cql_alpha: float = 0.0,
    return_td_error: bool = False,
    return_cql: bool = False,
    sparse_grad: bool = False,
    process_group: "ProcessGroup | None" = None,
    tensor_parallel_group: "ProcessGroup | None" = None,
    hidden_grad: str = "sum",
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """``fused_linear_dqn_loss`` for a target that is already computed: returns, or the V(s') of ILQL.

    Args:
        hidden: (\\*N, D), and all other arguments, as in ``fused_linear_dqn_loss``.
        weight: (A, D).
        actions: (\\*N) or (\\*N, 1).
        target: (\\*N) or (\\*N, 1), floating or integer; a constant, with which ``q[a]`` is compared.
        bias: (A,).
        action_mask: (\\*N, A), for the conservative term.
        weights: (\\*N) or (\\*N, 1).
        loss: ``"mse"``, ``"huber"`` or ``"smooth_l1"``.
        delta: of huber and smooth_l1.
        reduction: over the samples.
        cql_alpha: weight of the conservative term. With it this is the Q loss of ILQL (Snell et al., 2023), without
            the Q-values of all tokens.
        return_td_error: also return the TD errors.
        return_cql: also return the conservative term.
        sparse_grad: row-sparse gradients, without ``cql_alpha``.
        process_group: of ``"weighted_mean"``.
        tensor_parallel_group: ranks that share the weight.
        hidden_grad: ``"sum"`` or ``"partial"`` over those ranks.
        backend: by name, or ``"auto"``.

    Returns:
        The loss, or a tuple, as ``fused_linear_dqn_loss``.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_linear_dqn_loss``.

    >>> import torch
    >>> hidden, weight = torch.ones(2, 3), torch.zeros(1000, 3)
    >>> fused_linear_td_loss(hidden, weight, torch.tensor([7, 900]), torch.tensor([1.0, 3.0]), cql_alpha=1.0)
    tensor(11.9078)
    """
    if unknown:
        hints.unexpected("fused_linear_td_loss", unknown)
    chosen = (loss, delta, reduction, "max", cql_alpha, return_cql)
    head = Head(hidden, weight, bias, action_mask=action_mask)
    samples = Batch(hidden, actions, target, None, weights=weights)
    outputs = _run(
        head, samples, chosen, tensor_parallel_group, hidden_grad, "fused_linear_td_loss",
        backend, sparse_grad, process_group,
    )  # fmt: skip
    return _returned(outputs, return_td_error, return_cql)


def _run(
    head: Head,
    samples: Batch,
    chosen: tuple[Any, ...],
    tensor_parallel_group: "ProcessGroup | None",
    hidden_grad: str,
    name: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if inside_transform():
        instead = name.replace("_linear", "")
        refuse(name, f"call {instead} with the Q matrices, or this once for each network")
    if tensor_parallel_group is not None or has_dtensor(head):
        return _run_on_ranks(head, samples, chosen, tensor_parallel_group, hidden_grad, name, *rest)
    if hidden_grad != "sum":
        raise ValueError(f"hidden_grad: expected 'sum' without tensor_parallel_group, got {hidden_grad!r}")
    return head_loss(*_checked(head, samples, chosen, False, name, *rest))


def _run_eagerly(
    head: Head,
    samples: Batch,
    chosen: tuple[Any, ...],
    group: "ProcessGroup | None",
    hidden_grad: str,
    name: str,
    backend: str,
    sparse_grad: bool,
    process_group: "ProcessGroup | None",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a sharded weight. What is checked before the agreement must be the same on every rank."""
    if group is not None:
        check_member(group)
    row_sparse = sparse_grad and has_dtensor(head)
    head, group = local_layers(head, group)
    assert group is not None
    with Agreement(group, process_group) as agreement:
        if hidden_grad not in HIDDEN_GRADS:
            wrong_choice("hidden_grad", hidden_grad, HIDDEN_GRADS)
        if row_sparse:
            raise ValueError("sparse_grad: expected False with DTensors, whose gradients are dense")
        refuse_dtensors(head, samples)
        checked = _checked(head, samples, chosen, True, name, backend, sparse_grad, process_group)
        head, samples, spec, options = checked
        agreement.state(head, samples, (spec, hidden_grad))
    ranks = agreement.ranks
    assert ranks is not None
    if hidden_grad == "sum":
        head = head._replace(hidden=ranks.enter(head.hidden))
    return head_loss(head, samples, spec, options._replace(shards=ranks))


# torch.compile breaks the graph here, and raises with fullgraph=True. torch.compiler.disable as a decorator would
# import Dynamo with this module, which takes a second.
_run_on_ranks = torch._disable_dynamo(_run_eagerly)


def _checked(
    head: Head,
    samples: Batch,
    chosen: tuple[Any, ...],
    sharded: bool,
    name: str,
    backend: str,
    sparse_grad: bool,
    process_group: "ProcessGroup | None",
) -> tuple[Head, Batch, LossSpec, Options]:
    """Arguments of head_loss."""
    if name == "fused_linear_dqn_loss" and head.next_hidden is None:
        raise TypeError(
            "next_hidden: expected a torch.Tensor, got NoneType; for a ready target there is fused_linear_td_loss"
        )
    spec = check_loss(*chosen)
    if process_group is not None:
        check_group(process_group, spec)
    if sparse_grad and spec.dense_gradient():
        raise ValueError("sparse_grad: expected False with cql_alpha: every row of the weight has a gradient")
    head, samples = check_head(head, samples, spec, sharded)
    head = autocast(head)
    options = Options(choose(backend, head.hidden.device), backend == "auto", sparse_grad, process_group)
    return head, samples, spec, options


def _returned(
    outputs: tuple[Tensor, Tensor, Tensor | None], return_td_error: bool, return_cql: bool
) -> Tensor | tuple[Tensor, ...]:
    loss, td_error, cql = outputs
    found = [loss]
    if return_td_error:
        found.append(apart(td_error))
    if return_cql and cql is not None:
        found.append(cql)
    return loss if len(found) == 1 else tuple(found)
