"""The public loss: a function, the same with its gradient, and the same as a module."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dqn_fused import arguments
from dqn_fused._backends import choose
from dqn_fused.arguments import Batch, LossSpec, check_batch, check_loss, check_values
from dqn_fused.autograd import TDLoss


def fused_dqn_loss(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    loss: str = "mse",
    reduction: str = "mean",
    return_td_error: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """DQN loss (Mnih et al., 2015): squared TD error of the action taken against the Bellman target.

    For each transition ``td = q[a] - y`` with ``y = rewards + gamma * max(next_q)``, or ``y = rewards`` if terminated.
    Only ``q`` receives a gradient, and in it only the node of the action taken; everything else is a constant.

    Args:
        q: (\\*N, A) Q-values of the online network; float16, bfloat16, float32 or float64. Any leading dimensions.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A): the action taken.
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_q: (\\*N, A) Q-values of the target network in the next state, floating. With ``non_final_mask``: (M, A).
        terminated: (\\*N) or (\\*N, 1), bool, integer or floating, nonzero where the episode ended in the next
            state: nothing is bootstrapped, that row of ``next_q`` is not used. A truncated episode is not terminated.
        gamma: discount: a number, a 0-d tensor, or (\\*N) / (\\*N, 1) floating, for n-step returns.
        non_final_mask: (\\*N) or (\\*N, 1) bool, instead of ``terminated``: true for the M samples, in order, whose
            next states ``next_q`` holds.
        loss: ``"mse"``: td squared, without a factor 1/2.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the loss of each sample, (\\*N).
        return_td_error: also return the signed TD errors, (\\*N), without gradient: priorities of a replay buffer.
        backend: ``"auto"``, or by name as in :func:`dqn_fused.backends`.

    Returns:
        The loss, or ``(loss, td_error)``, in float32, or in float64 if q is float64.

    Raises:
        ValueError: a shape or a device does not fit. Nothing is broadcast.
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
    """
    spec = check_loss(loss, reduction)
    result, td_error = _run(_loss, spec, backend, q, actions, rewards, next_q, terminated, gamma, non_final_mask)
    return (result, td_error.detach()) if return_td_error else result


def fused_dqn_loss_and_grad(
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    non_final_mask: Tensor | None = None,
    loss: str = "mse",
    reduction: str = "mean",
    return_td_error: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """DQN loss and its gradient by q in one pass, without autograd: the fastest road.

    ``q.backward(grad_q)`` then goes on through the network. JAX users know the form as ``value_and_grad``.

    Args:
        q: (\\*N, A), and all other arguments, as in :func:`fused_dqn_loss`. No graph is recorded, whether or not ``q``
            requires a gradient.

    Returns:
        ``(loss, grad_q)``, or ``(loss, grad_q, td_error)``. ``grad_q`` has q's shape and dtype, is contiguous, and zero
        but for the action taken in each row. With ``reduction="none"`` it is the gradient of the sum of the losses.

    Raises:
        As :func:`fused_dqn_loss`.

    >>> import torch
    >>> states, network = torch.ones(2, 3), torch.nn.Linear(3, 2)
    >>> q = network(states)
    >>> loss, grad_q = fused_dqn_loss_and_grad(q, torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2, 2))
    >>> q.backward(grad_q)
    >>> torch.equal(network.bias.grad, grad_q.sum(0))
    True
    """
    spec = check_loss(loss, reduction)
    result, grad_q, td_error = _run(
        _loss_and_grad, spec, backend, q, actions, rewards, next_q, terminated, gamma, non_final_mask
    )
    return (result, grad_q, td_error) if return_td_error else (result, grad_q)


def _loss(q: Tensor, batch: Batch, spec: LossSpec, road: ModuleType) -> tuple[Tensor, ...]:
    # Forward-mode too: TDLoss has no rule for it and says so, where a backend would drop the tangent in silence.
    if (q.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return TDLoss.apply(q, batch, spec, road)
    return road.forward(batch, spec)


def _loss_and_grad(q: Tensor, batch: Batch, spec: LossSpec, road: ModuleType) -> tuple[Tensor, ...]:
    return road.loss_and_grad(batch, spec)


def _run(
    what: Callable[[Tensor, Batch, LossSpec, ModuleType], tuple[Tensor, ...]],
    spec: LossSpec,
    backend: str,
    q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q: Tensor,
    terminated: Tensor | None,
    gamma: float | Tensor,
    non_final_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """Check the arguments and run a backend.

    A compiled op on the CPU checks everything itself as it reads it, where check_batch and check_values take 4 us each,
    so matrices go to it as they are. If it refuses, the checks are made after all, and say what is wrong, if anything.
    """
    try:
        device = q.device
        road = choose(backend, device)
        plain = q.is_cpu and q.dim() == next_q.dim() == 2 and isinstance(gamma, (float, int, Tensor))
        if road.CHECKS_CPU and plain and arguments.looks_at_values(device):
            unchecked = Batch(q, actions, rewards, next_q, terminated, gamma, non_final_mask, q.shape[:-1])
            return what(q, unchecked, spec, road)
    except (RuntimeError, AttributeError, TypeError):
        pass
    batch = check_values(check_batch(q, actions, rewards, next_q, terminated, gamma, non_final_mask))
    return what(q, batch, spec, choose(backend, batch.q.device))


class FusedDQNLoss(nn.Module):
    """:func:`fused_dqn_loss` as a module that keeps the discount and the options, like ``torch.nn.MSELoss``.

    ``gamma`` is a number or a tensor, which becomes a buffer and moves with the module; a call may bring its own.

    >>> import torch
    >>> criterion = FusedDQNLoss(gamma=0.9)
    >>> criterion
    FusedDQNLoss(gamma=0.9, loss='mse', reduction='mean')
    >>> criterion(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), torch.ones(2, 3))
    tensor(0.4100)
    """

    gamma: float | Tensor

    def __init__(
        self,
        gamma: float | Tensor = 0.99,
        *,
        loss: str = "mse",
        reduction: str = "mean",
        return_td_error: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_loss(loss, reduction)
        if isinstance(gamma, Tensor):
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = gamma
        self.loss, self.reduction = loss, reduction
        self.return_td_error, self.backend = return_td_error, backend

    def forward(
        self,
        q: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_q: Tensor,
        terminated: Tensor | None = None,
        gamma: float | Tensor | None = None,
        *,
        non_final_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of a batch; see :func:`fused_dqn_loss`."""
        return fused_dqn_loss(
            q,
            actions,
            rewards,
            next_q,
            terminated,
            self.gamma if gamma is None else gamma,
            non_final_mask=non_final_mask,
            loss=self.loss,
            reduction=self.reduction,
            return_td_error=self.return_td_error,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options, for repr."""
        return f"gamma={self.gamma}, loss={self.loss!r}, reduction={self.reduction!r}"
