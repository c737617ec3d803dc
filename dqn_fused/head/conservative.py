"""The conservative term of a linear head: log-sum-exp over all actions minus the value of the action taken."""

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from dqn_fused.arguments import LossSpec
from dqn_fused.head.arguments import Head
from dqn_fused.head.second_order import SecondOrder, second_order
from dqn_fused.head.sweep import Statistics, Sweep
from dqn_fused.head.sweep_backward import Gradients, SweepBackward, sweep_backward
from dqn_fused.head.taken import taken_values
from dqn_fused.head.whole import Whole


def state_sweep(head: Head, actions: Tensor, spec: LossSpec, shards: Whole) -> Sweep | None:
    """The sweep that the conservative term needs; None if the term is not asked for.

    In half precision it also returns the values of the actions taken, rounded like all others, because the term is a
    small difference between them.
    """
    if not spec.cql:
        return None
    halves = head.hidden.dtype.itemsize == 2
    index = shards.locate(actions, head.weight.shape[0])[0] if halves else None
    return Sweep(head.hidden, head.weight, head.bias, head.action_mask, "soft", 1.0, index)


def largest_legal(found: Statistics, mask: Tensor | None) -> Tensor:
    """Largest Q-value, (n,); NaN where no action is legal."""
    return found.largest if mask is None else torch.where(found.largest == -torch.inf, torch.nan, found.largest)


def conservative_term(taken: Tensor, largest: Tensor, total: Tensor) -> Tensor:
    """logsumexp_a q[i, a] - q[i, a_i], (n,), the term of CQL(H) (Kumar et al., 2020)."""
    return (largest - taken) + total.log()


class ConservativeValues(torch.autograd.Function):
    """(taken, term), each (n,): the value of the action taken, and the conservative term.

    Both are NaN where the action is illegal, and the gradient of that row is zero. Every action contributes to the
    gradient of the weight, so it is dense.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        actions: Tensor,
        mask: Tensor | None,
        largest: Tensor,
        total: Tensor,
        swept: Tensor | None,
        backend: ModuleType,
        auto: bool,
        shards: Whole,
    ) -> tuple[Tensor, Tensor]:
        """From the results of a sweep, each (n,): largest, over the legal actions; total; and swept, the value taken.

        swept is None if the sweep was not asked for it.
        """
        taken = taken_values(hidden, weight, bias, actions, shards)
        term = conservative_term(taken if swept is None else swept, largest, total)
        ctx.save_for_backward(hidden, weight, bias, actions, mask, largest, total)
        ctx.about, ctx.shards = (backend, auto), shards
        ctx.set_materialize_grads(False)
        return taken, term

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, (n, D), of weight, (A, D), and of bias, (A,)."""
        hidden, weight, bias, actions, mask, largest, total = ctx.saved_tensors
        of_taken, of_term = (torch.zeros_like(total) if x is None else x for x in grads)
        taken, rest = (ctx.shards.enter(x) for x in (of_taken - of_term, of_term))
        index, here = ctx.shards.locate(actions, weight.shape[0])
        if here is not None:
            taken = torch.where(here, taken, 0)
        legal = ctx.shards.legal(actions, weight.shape[0])
        if legal is not None:
            rest = torch.where(legal, rest, 0)
        given = (hidden, weight, bias, mask, largest, total, index, taken, rest)
        needs = tuple(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = RecordedGradients.apply(*given, needs, *ctx.about, ctx.shards)
        else:
            found = gradients(*given, needs, *ctx.about)
        return *found, None, None, None, None, None, None, None, None


def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    largest: Tensor,
    total: Tensor,
    index: Tensor,
    taken: Tensor,
    rest: Tensor,
    needs: tuple[bool, bool, bool],
    backend: ModuleType,
    auto: bool,
) -> Gradients:
    """Gradients of hidden, weight and bias, from those of taken and of the log-sum-exp, rest, each (n,)."""
    policy = torch.where(total == 0, 0, rest / total)  # total is 0 where no action is legal
    run = backend.auto_sweep_backward if auto else backend.sweep_backward
    if weight.shape[0] == 0:  # a rank without rows
        run = sweep_backward
    found: Gradients = run(SweepBackward(hidden, weight, bias, mask, largest, policy, index, taken, needs))
    return found


class RecordedGradients(torch.autograd.Function):
    """gradients, recorded so that they can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Gradients:
        """Compute the gradients."""
        ctx.save_for_backward(*given[:9])
        ctx.set_materialize_grads(False)
        ctx.has_bias, ctx.shards = given[2] is not None, given[-1]
        return gradients(*given[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight, bias, taken and rest; a third order raises."""
        hidden, weight, bias, taken, rest = SecondOrderGradients.apply(*ctx.saved_tensors, *grads, ctx.shards)
        return (
            hidden, weight, bias if ctx.has_bias else None, None, None, None, None, taken, rest, None, None, None, None,
        )  # fmt: skip


class SecondOrderGradients(torch.autograd.Function):
    """second_order, recorded so that a third order raises here.

    The error of once_differentiable is not raised if torch.autograd.grad is asked for only some of the inputs.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        """Compute the second-order gradients."""
        return second_order(SecondOrder(*given))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        """Refuse."""
        raise NotImplementedError(
            "the third derivative of the conservative term of a linear head is not implemented; "
            "dqn_fused.reference.dqn_loss of the Q matrix has it"
        )
