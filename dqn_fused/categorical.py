"""The public categorical losses: functions, and the same with their gradients."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from dqn_fused import hints, node
from dqn_fused.arguments import Batch
from dqn_fused.autograd import refuse_tangent
from dqn_fused.categorical_arguments import (
    CategoricalSpec,
    Support,
    check_categorical_options,
    check_even,
    check_logits,
    known,
)
from dqn_fused.distributional_call import backend_that_checks, check_call, prepare
from dqn_fused.node import categorical_loss
from dqn_fused.unchecked import refusing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_categorical_loss(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_logits: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    support: Support,
    next_logits_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """Loss of C51 (Bellemare et al., 2017): the cross-entropy of a return's distribution and its projected target.

    The return of each action is a distribution on K evenly spaced atoms z, ``softmax(logits)``. The target is the
    distribution of the next state's action with the largest expectation, with its atoms moved to
    ``rewards + gamma * z``, or all of its probability at ``rewards`` if terminated. Locations beyond the support are
    moved to its ends, and each probability is split between the two atoms beside it, in proportion to their nearness.
    Only ``logits`` receives a gradient, and in it only the row of the action taken.

    Args:
        logits: (\\*N, A, K) of the online network; float16, bfloat16, float32 or float64. Any leading dimensions, at
            least two atoms.
        actions: (\\*N) or (\\*N, 1), any integer dtype, in [0, A): the action taken.
        rewards: (\\*N) or (\\*N, 1), floating or integer.
        next_logits: (\\*N, A, K) of the target network in the next state, floating. With ``non_final_mask``: (M, A, K).
        terminated: (\\*N) or (\\*N, 1), nonzero where nothing is bootstrapped, as in ``fused_dqn_loss``.
        gamma: discount: a number, a 0-d tensor, or (\\*N) / (\\*N, 1) floating, for n-step returns.
        support: the atoms: their ends ``(v_min, v_max)``, or all of them, (K,), floating, increasing by the same step,
            and different from each other in the dtype of the loss. On a GPU the values of a tensor are checked only if
            ``DQN_FUSED_CHECK=1`` is set.
        next_logits_online: chooses the next action, whose distribution is read from ``next_logits``: (\\*N, A, K)
            logits of the online network for double DQN, or (\\*N, A) Q-values. With ``non_final_mask`` M stands for
            \\*N.
        next_action_mask: (\\*N, A) bool, true for the actions that are legal in the next state: no other is chosen. A
            row without one is NaN, unless terminated. With ``non_final_mask``: (M, A).
        non_final_mask: (\\*N) or (\\*N, 1) bool, instead of ``terminated``: true for the M samples, in order, whose
            next states the next tensors hold.
        weights: (\\*N) or (\\*N, 1), floating: the loss of each sample is multiplied by its weight.
        reduction: ``"mean"``, which divides by the number of samples, ``"weighted_mean"``, which divides by the sum of
            the weights, ``"sum"``, or ``"none"`` for the loss of each sample, (\\*N): priorities as Rainbow has them.
        return_td_error: also return the expectation of the distribution of the action taken minus that of the
            projected target, (\\*N), signed, unweighted and without gradient.
        process_group: with ``"weighted_mean"``, the ranks over which weights are summed, as in
            ``fused_dqn_loss``.
        backend: ``"auto"``, or by name as in ``dqn_fused.backends``. Inside ``torch.compile`` on the CPU ``"auto"``
            takes ``"torch"``, whose operations Inductor fuses, up to 32 atoms.

    Returns:
        The loss, or ``(loss, td_error)``, in float32, or in float64 if logits is float64.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_dqn_loss``.
        NotImplementedError: for a second derivative.

    >>> import torch
    >>> logits = torch.zeros(1, 2, 3, requires_grad=True)
    >>> next_logits = torch.tensor([[[0.0, 0.0, 100.0], [100.0, 0.0, 0.0]]])  # of the value 2, and 0
    >>> loss, td_error = fused_categorical_loss(
    ...     logits, torch.tensor([0]), torch.tensor([-0.5]), next_logits, gamma=1.0, support=(0.0, 2.0),
    ...     return_td_error=True)
    >>> loss.backward()
    >>> loss.exp().detach(), td_error, logits.grad
    (tensor(3.), tensor([-0.5000]), tensor([[[ 0.3333, -0.1667, -0.1667],
             [ 0.0000,  0.0000,  0.0000]]]))
    """
    if unknown:
        hints.unexpected("fused_categorical_loss", unknown)
    spec = check_categorical_options(support, reduction)
    batch = _with_next_states(
        logits, actions, rewards, next_logits, terminated, gamma, non_final_mask,
        next_logits_online, next_action_mask, weights,
    )  # fmt: skip
    loss, values = _run(categorical_loss, batch, spec, backend, process_group)
    return (loss, values[0]) if return_td_error else loss


def fused_categorical_loss_and_grad(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_logits: Tensor,
    terminated: Tensor | None = None,
    gamma: float | Tensor = 0.99,
    *,
    support: Support,
    next_logits_online: Tensor | None = None,
    next_action_mask: Tensor | None = None,
    non_final_mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> tuple[Tensor, ...]:
    """``fused_categorical_loss`` and its gradient by logits in one pass, without autograd.

    Args:
        logits: (\\*N, A, K), and all other arguments, as in ``fused_categorical_loss``. No graph is recorded.

    Returns:
        ``(loss, gradient)`` or ``(loss, gradient, td_error)``. The gradient has the shape and dtype of logits and is
        contiguous. With ``reduction="none"`` it is the gradient of the sum of the losses.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_categorical_loss``.

    >>> import torch
    >>> fused_categorical_loss_and_grad(
    ...     torch.zeros(1, 1, 2), torch.tensor([0]), torch.tensor([3.0]), torch.zeros(1, 1, 2), torch.tensor([True]),
    ...     support=(-1.0, 1.0))
    (tensor(0.6931), tensor([[[ 0.5000, -0.5000]]]))
    """
    if unknown:
        hints.unexpected("fused_categorical_loss_and_grad", unknown)
    spec = check_categorical_options(support, reduction)
    batch = _with_next_states(
        logits, actions, rewards, next_logits, terminated, gamma, non_final_mask,
        next_logits_online, next_action_mask, weights,
    )  # fmt: skip
    loss, gradient, values = _run(_loss_and_grad, batch, spec, backend, process_group)
    return (loss, gradient, values[0]) if return_td_error else (loss, gradient)


def fused_categorical_td_loss(
    logits: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    support: Support,
    projection: str = "two_hot",
    sigma: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    return_expectation: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """Loss of a scalar target learned by classification (Farebrother et al., 2024): the Q-value is an expectation.

    The target becomes a distribution on the K atoms, and the loss is its cross-entropy with ``softmax(logits[a])``.

    Args:
        logits: (\\*N, A, K), and all other arguments, as in ``fused_categorical_loss``.
        target: (\\*N) or (\\*N, 1), floating or integer; a constant. Beyond the support it is moved to its end.
        projection: ``"two_hot"``: the target is split between the two atoms beside it, in proportion to their
            nearness; ``"hl_gauss"``: a normal distribution around it is integrated over bins whose centres are the
            atoms, and divided by its mass in all of them. In the published listing the ends of the support are the
            outer edges of the outer bins, half a bin further out than here.
        sigma: standard deviation of ``"hl_gauss"`` in units of the width of a bin, 0.75 if None.
        return_td_error: also return the expectation of ``softmax(logits[a])`` minus that of the target's distribution,
            (\\*N), without gradient.
        return_expectation: also return that expectation, the Q-value of the action taken, (\\*N), without gradient.

    Returns:
        The loss, or a tuple of it and what else is asked for, in that order: loss, td_error, expectation.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_categorical_loss``.

    >>> import torch
    >>> logits = torch.zeros(1, 2, 3)
    >>> loss, expectation = fused_categorical_td_loss(
    ...     logits, torch.tensor([1]), torch.tensor([0.5]), support=(0.0, 2.0), return_expectation=True)
    >>> loss.exp(), expectation
    (tensor(3.), tensor([1.]))
    """
    if unknown:
        hints.unexpected("fused_categorical_td_loss", unknown)
    spec = check_categorical_options(support, reduction, projection, sigma)
    found = _run(categorical_loss, Batch(logits, actions, target, None, weights=weights), spec, backend, process_group)
    return _returned(found, return_td_error, return_expectation)


def fused_categorical_td_loss_and_grad(
    logits: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    support: Support,
    projection: str = "two_hot",
    sigma: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    return_td_error: bool = False,
    return_expectation: bool = False,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> tuple[Tensor, ...]:
    """``fused_categorical_td_loss`` and its gradient by logits in one pass, without autograd.

    Args:
        logits: (\\*N, A, K), and all other arguments, as in ``fused_categorical_td_loss``. No graph is recorded.

    Returns:
        ``(loss, gradient)``, followed by td_error and expectation, if asked for.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailableError: as ``fused_categorical_loss``.

    >>> import torch
    >>> logits, target = torch.zeros(1, 1, 2), torch.tensor([0.75])
    >>> fused_categorical_td_loss_and_grad(logits, torch.tensor([0]), target, support=(0.0, 1.0))
    (tensor(0.6931), tensor([[[ 0.2500, -0.2500]]]))
    """
    if unknown:
        hints.unexpected("fused_categorical_td_loss_and_grad", unknown)
    spec = check_categorical_options(support, reduction, projection, sigma)
    found = _run(_loss_and_grad, Batch(logits, actions, target, None, weights=weights), spec, backend, process_group)
    return tuple(_returned(found, return_td_error, return_expectation))


Run = Callable[[Tensor, Batch, CategoricalSpec, ModuleType], tuple[Tensor, ...]]


def _returned(
    found: tuple[Tensor, ...], return_td_error: bool, return_expectation: bool
) -> Tensor | tuple[Tensor, ...]:
    *first, values = found
    wanted = [*first]
    if return_td_error:
        wanted.append(values[0])
    if return_expectation:
        wanted.append(values[1])
    return wanted[0] if len(wanted) == 1 else tuple(wanted)


def _with_next_states(logits: Tensor, actions: Tensor, rewards: Tensor, next_logits: Tensor, *rest: object) -> Batch:
    if next_logits is None:  # which in a Batch stands for a ready target
        raise TypeError(
            "next_logits: expected a torch.Tensor, got NoneType; for a ready target there is fused_categorical_td_loss"
        )
    return Batch(logits, actions, rewards, next_logits, *rest)  # type: ignore[arg-type]


def _loss_and_grad(x: Tensor, batch: Batch, spec: CategoricalSpec, implementation: ModuleType) -> tuple[Tensor, ...]:
    refuse_tangent(x)
    found: tuple[Tensor, ...] = implementation.categorical_loss_and_grad(batch, spec)
    return found


def _run(
    what: Run, given: Batch, spec: CategoricalSpec, backend: str, process_group: "ProcessGroup | None"
) -> tuple[Tensor, ...]:
    """Check the arguments and run a backend."""
    if backend in node.serves and process_group is None and not torch.compiler.is_compiling() and known(spec.support):
        found = node.categorical_calls[what is categorical_loss](spec, given)
        if found is not None:
            return found
    check_call("the categorical losses", "categorical", spec, process_group)
    unchecked = backend_that_checks("categorical", given, spec, backend)
    if unchecked is not None:
        return refusing(lambda: _unchecked(what, given, spec, unchecked), lambda: _checked(given, spec, backend))
    batch, spec, implementation = _checked(given, spec, backend, process_group)
    return what(given.q, batch, spec, implementation)


def _unchecked(what: Run, given: Batch, spec: CategoricalSpec, implementation: ModuleType) -> tuple[Tensor, ...]:
    if isinstance(spec.support, Tensor):  # of which the op reads the ends
        check_even(spec.support)
    return what(given.q, given, spec, implementation)


def _checked(
    given: Batch, spec: CategoricalSpec, backend: str, process_group: "ProcessGroup | None" = None
) -> tuple[Batch, CategoricalSpec, ModuleType]:
    batch = check_logits(given, spec)
    return prepare("categorical", "logits", batch, spec, backend, process_group)
