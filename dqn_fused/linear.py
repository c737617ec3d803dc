"""The public loss of a linear head: as a function and as a module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dqn_fused._backends import choose
from dqn_fused.arguments import Batch, check_group, check_loss, normalise_weights
from dqn_fused.autograd import apart, inside_transform
from dqn_fused.head.arguments import Head, autocast, check_head
from dqn_fused.head.taken import TakenValues
from dqn_fused.head.targets import next_values
from dqn_fused.head.whole import WHOLE
from dqn_fused.node import td_loss
from dqn_fused.targets import Soft
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
    weights: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
    target: str | Soft = "max",
    return_td_error: bool = False,
    sparse_grad: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """DQN loss of a linear head, whose Q matrix is never built.

    The same as :func:`fused_dqn_loss` of ``linear(hidden, weight, bias)`` and ``linear(next_hidden, next_weight,
    next_bias)``, but the online network costs a dot product a sample, and a row of the weight's gradient, and of the
    next state only the maximum is kept. For a vocabulary or a catalogue: many actions.

    Args:
        hidden: (\\*N, D) output of the online network below its head; floating. Receives a gradient.
        weight: (A, D) of the head, as ``nn.Linear`` holds it. Receives a gradient, in the rows of the actions taken.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A).
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_hidden: (\\*N, D) of the target network in the next state. With ``non_final_mask``: (M, D).
        next_weight: (A, D) of the target network's head.
        terminated: as in :func:`fused_dqn_loss`, as are gamma, non_final_mask, weights, loss, delta and reduction.
        gamma: discount.
        bias: (A,) of the head. Receives a gradient.
        next_bias: (A,) of the target network's head.
        next_hidden_online: as next_hidden, of the online network: double DQN. ``weight`` and ``bias`` choose the first
            of the actions that are equal as the product computes them: equal rows of the weight may differ by a
            rounding, since a library computes the columns at the edge of a matrix by another kernel.
        next_action_mask: (\\*N, A) bool, true for the actions that are legal in the next state; (M, A) with
            ``non_final_mask``.
        non_final_mask: instead of ``terminated``: true for the M samples whose next states ``next_hidden`` holds.
        weights: importance weights.
        loss: ``"mse"``, ``"huber"`` or ``"smooth_l1"``.
        delta: of huber and smooth_l1.
        reduction: ``"mean"``, ``"weighted_mean"``, ``"sum"`` or ``"none"``.
        target: ``"max"``, ``"soft"`` or :class:`Soft`.
        return_td_error: also return the signed TD errors, (\\*N), without gradient.
        sparse_grad: give weight and bias row-sparse gradients, as ``nn.Embedding(sparse=True)`` does, for
            ``torch.optim.SGD`` and ``SparseAdam``: nothing of size A is then allocated at all. torch.compile does not
            trace it.
        process_group: with ``"weighted_mean"``, the ranks over which weights are summed.
        backend: ``"auto"``, or by name as in :func:`dqn_fused.backends`.

    Returns:
        The loss, or ``(loss, td_error)``, in float32, or in float64 if hidden is float64.

    Raises:
        As :func:`fused_dqn_loss`.

    >>> import torch
    >>> hidden, next_hidden = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    >>> weight, next_weight = torch.zeros(1000, 3, requires_grad=True), torch.ones(1000, 3)
    >>> actions, rewards = torch.tensor([7, 900]), torch.tensor([0.0, 1.0])
    >>> loss = fused_linear_dqn_loss(hidden, weight, actions, rewards, next_hidden, next_weight, gamma=1.0)
    >>> loss.backward()
    >>> loss.detach(), weight.grad.abs().sum(1).nonzero().flatten()
    (tensor(12.5000), tensor([  7, 900]))
    """
    if inside_transform():
        refuse("fused_linear_dqn_loss", "call fused_dqn_loss with the Q matrices, or this once for each network")
    spec = check_loss(loss, delta, reduction, target)
    if process_group is not None:
        check_group(process_group, spec)
    if spec.target == "munchausen":
        raise ValueError("target: expected 'max', 'soft' or Soft: the linear head has no Munchausen target")
    head = Head(hidden, weight, bias, next_hidden, next_weight, next_bias, next_hidden_online, next_action_mask)
    samples = Batch(hidden, actions, rewards, next_hidden, terminated, gamma, non_final_mask, weights=weights)
    head, samples = check_head(head, samples, spec)
    head = autocast(head)
    road = choose(backend, hidden.device)
    with torch.no_grad():
        value = next_values(head, spec, road.auto_sweep if backend == "auto" else road.sweep)
    taken = TakenValues.apply(head.hidden, weight, bias, samples.actions, sparse_grad, WHOLE)
    # What is left is a loss of one action a sample.
    batch = samples._replace(q=taken.unsqueeze(1), actions=torch.zeros_like(samples.actions), next_q=value.unsqueeze(1))
    spec = spec._replace(target="max")
    if spec.reduction == "weighted_mean":
        batch, spec = normalise_weights(batch, spec, process_group)
    result, td_error, _ = td_loss(batch, spec, road, batch.q)
    return (result, apart(td_error)) if return_td_error else result


class FusedLinearDQNLoss(nn.Module):
    """:func:`fused_linear_dqn_loss` as a module, for heads that are ``nn.Linear`` layers.

    The layers are arguments of the call, not children of the module: their parameters stay where they are.

    >>> import torch
    >>> head, target_head = torch.nn.Linear(3, 1000), torch.nn.Linear(3, 1000)
    >>> criterion = FusedLinearDQNLoss(gamma=0.9, loss="huber")
    >>> hidden, actions, rewards = torch.ones(2, 3), torch.tensor([7, 900]), torch.zeros(2)
    >>> criterion(head, hidden, actions, rewards, target_head, hidden).backward()
    >>> head.bias.grad.nonzero().flatten()
    tensor([  7, 900])
    """

    gamma: float | Tensor

    def __init__(
        self,
        gamma: float | Tensor = 0.99,
        *,
        loss: str = "mse",
        delta: float = 1.0,
        reduction: str = "mean",
        target: str | Soft = "max",
        return_td_error: bool = False,
        sparse_grad: bool = False,
        process_group: "ProcessGroup | None" = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_loss(loss, delta, reduction, target)
        if isinstance(gamma, Tensor):
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = gamma
        self.loss, self.delta, self.reduction, self.target = loss, delta, reduction, target
        self.return_td_error, self.sparse_grad = return_td_error, sparse_grad
        self.process_group, self.backend = process_group, backend

    def forward(
        self,
        head: nn.Linear,
        hidden: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_head: nn.Linear,
        next_hidden: Tensor,
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        next_hidden_online: Tensor | None = None,
        next_action_mask: Tensor | None = None,
        non_final_mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch; see :func:`fused_linear_dqn_loss`."""
        return fused_linear_dqn_loss(
            hidden,
            head.weight,
            actions,
            rewards,
            next_hidden,
            next_head.weight,
            terminated,
            self.gamma if gamma is None else gamma,
            bias=head.bias,
            next_bias=next_head.bias,
            next_hidden_online=next_hidden_online,
            next_action_mask=next_action_mask,
            non_final_mask=non_final_mask,
            weights=weights,
            loss=self.loss,
            delta=self.delta,
            reduction=self.reduction,
            target=self.target,
            return_td_error=self.return_td_error,
            sparse_grad=self.sparse_grad,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for repr."""
        return f"gamma={self.gamma}, loss={self.loss!r}, reduction={self.reduction!r}"
