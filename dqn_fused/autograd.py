"""The one autograd.Function between the public functions and the backends."""

from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dqn_fused.arguments import Batch, LossSpec, accumulation_dtype
from dqn_fused.checks import rows
from dqn_fused.kernels.launch import NARROW
from dqn_fused.reference import legal_actions, legal_values

# The test that torch.autograd.Function.apply makes.
inside_transform = torch._C._are_functorch_transforms_active


class Saved(NamedTuple):
    """What a backward needs: (n,) values, and with the conservative term q itself, without a copy."""

    td_error: Tensor  # N
    actions: Tensor  # (n,)
    weights: Tensor | None  # (n,)
    # Only with the conservative term, as the two below: (2, N), the largest legal q and the log of the sum of
    # exp(q - largest). Their sum, logsumexp(q), would give exp(q - sum) a rounding error of |q| eps.
    normaliser: Tensor | None
    q: Tensor | None  # (n, A) or (outer, inner, A)
    action_mask: Tensor | None  # as q
    q_shape: torch.Size
    q_dtype: torch.dtype

    @classmethod
    def of(cls, batch: Batch, spec: LossSpec, td_error: Tensor, normaliser: Tensor | None) -> "Saved":
        """What a backward needs right after the forward of a batch."""
        q, shape = batch.q, torch.Size((*td_error.shape, batch.q.shape[-1]))
        if not spec.dense_gradient():
            return cls(td_error, batch.saved_actions(), batch.weights, None, None, None, shape, q.dtype)
        return cls(td_error, batch.saved_actions(), batch.weights, normaliser, q, batch.action_mask, shape, q.dtype)


def td_loss(batch: Batch, spec: LossSpec, backend: ModuleType, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a backend's forward, through TDLoss where q, whose rows batch.q holds, requires a gradient."""
    # In forward mode, too: TDLoss has no rule for it and says so, whereas a backend would silently drop the tangent.
    forward_mode = forward_ad._current_level >= 0
    if forward_mode and torch.compiler.is_compiling():
        refuse_forward_mode()
    if (q.requires_grad and torch.is_grad_enabled()) or forward_mode:
        loss, td_error, *normaliser = TDLoss.apply(q, batch, spec, backend)
        return loss, td_error, normaliser[0] if normaliser else None
    outputs: tuple[Tensor, Tensor, Tensor | None] = backend.forward(batch, spec)
    return outputs


def apart(td_error: Tensor) -> Tensor:
    """TD errors for the user, without gradient.

    In a graph of torch.compile they are a copy: there autograd does not notice when what a backward needs is changed in
    place.
    """
    return td_error.detach().clone() if torch.compiler.is_compiling() else td_error.detach()


def refuse_tangent(x: Tensor) -> None:
    """Raise where forward mode differentiates by x, which no rule of autograd would notice."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        refuse_forward_mode()


def refuse_forward_mode() -> NoReturn:
    """Raise where a tangent would be silently dropped."""
    raise NotImplementedError("forward mode (jvp) is not implemented; reverse mode is: backward, torch.func.grad")


class TDLoss(torch.autograd.Function):
    """(loss, td_error) of a batch, and the normaliser if it is asked for; only q receives a gradient.

    loss and td_error are differentiable inside the graph. An ordinary backward runs the backend's kernel. A backward
    that is itself recorded (create_graph) consists of differentiable operations on the saved td_error, whose own
    derivative leads back here. So the second order is right, and only the conservative term needs q to be saved.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, batch: Batch, spec: LossSpec, backend: ModuleType) -> tuple[Tensor, ...]:
        """Run the backend's forward; save (n,) values."""
        loss, td_error, normaliser = backend.forward(batch, spec)
        save(ctx, q, batch, spec, backend, td_error, normaliser)
        return (loss, td_error) if normaliser is None else (loss, td_error, normaliser)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Dense gradient of q: zero except at the action taken in each row, plus that of the conservative term."""
        grad_loss, grad_td_error, *_ = grads
        q_shape, q_dtype, spec, backend = ctx.about
        normaliser = q = mask = None
        if spec.dense_gradient():
            td_error, actions, weights, normaliser, q, mask = ctx.saved_tensors
        else:
            td_error, actions, *given = ctx.saved_tensors
            weights = given[0] if given else None
        saved = Saved(td_error, actions, weights, normaliser, q, mask, q_shape, q_dtype)
        # While torch.compile traces, grad mode is on and grad_td_error is zeros; PyTorch refuses a second order there.
        recorded = torch.is_grad_enabled() or grad_td_error is not None or inside_transform()
        if recorded and not torch.compiler.is_compiling():
            return differentiable_backward(grad_loss, grad_td_error, saved, spec), None, None, None
        if grad_loss is None:
            return None, None, None, None
        if saved.q is not None:
            saved = saved._replace(q=rows(saved.q))
        return backend.backward(grad_loss.contiguous(), saved, spec), None, None, None


def save(
    ctx: Any, q: Tensor, batch: Batch, spec: LossSpec, backend: ModuleType, td_error: Tensor, normaliser: Tensor | None
) -> None:
    """Keep (n,) values for the backward, and with the conservative term a reference to q."""
    ctx.set_materialize_grads(False)
    ctx.about = q.shape, q.dtype, spec, backend
    if spec.dense_gradient():
        ctx.save_for_backward(td_error, batch.saved_actions(), batch.weights, normaliser, q, batch.action_mask)
    elif batch.weights is None:
        ctx.save_for_backward(td_error, batch.saved_actions())
    else:
        ctx.save_for_backward(td_error, batch.saved_actions(), batch.weights)
    if normaliser is not None:
        ctx.mark_non_differentiable(normaliser)


def differentiable_backward(
    grad_loss: Tensor | None, grad_td_error: Tensor | None, saved: Saved, spec: LossSpec
) -> Tensor | None:
    """Gradient of q for the upstream gradients of the loss and the TD errors, in differentiable operations."""
    terms = [] if grad_td_error is None else [scatter_taken(grad_td_error, saved)]
    if grad_loss is not None:
        terms.append(loss_gradient(grad_loss, saved, spec))
    if not terms:
        return None
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def loss_gradient(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """Gradient of the reduced loss by q, of q's shape, in differentiable operations."""
    td = saved.td_error
    scale = _scale(grad_loss, saved, spec)
    coefficient = td_loss_slope(td, spec) * scale
    if saved.q is None:
        return scatter_taken(coefficient, saved)
    dtype = accumulation_dtype(saved.q)
    scale = scale.expand(td.shape) * spec.cql_alpha
    policy = torch.softmax(legal_values(saved.q.to(dtype), saved.action_mask), -1).view(saved.q_shape)
    if saved.action_mask is not None:
        policy = torch.where(saved.action_mask.reshape(saved.q_shape), policy, 0)  # none legal: the softmax is NaN
    legal = legal_actions(saved.actions, saved.q_shape[-1])[1]
    if legal is not None:
        policy = torch.where(legal.view(*td.shape, 1), policy, 0)
    policy = policy * scale.unsqueeze(-1)
    gradient = scatter_taken(coefficient - scale, saved, dtype) + policy
    return gradient.to(saved.q_dtype).contiguous()


def td_loss_slope(td: Tensor, spec: LossSpec) -> Tensor:
    """Derivative of a sample's loss by its TD error."""
    if spec.loss == "mse":
        return 2 * td
    if spec.loss == "huber":
        return td.clamp(-spec.delta, spec.delta)
    if spec.delta > 0:
        return (td / spec.delta).clamp(-1, 1)
    return torch.where(td.isnan(), td, td.sgn())  # the sign of NaN is 0


def _scale(grad_loss: Tensor, saved: Saved, spec: LossSpec) -> Tensor:
    """The upstream gradient times the factors of the reduction and the weights, N or ()."""
    td = saved.td_error
    scale = grad_loss / max(td.numel(), 1) if spec.reduction == "mean" else grad_loss
    return scale if saved.weights is None else scale * saved.weights.detach().to(td.dtype).view(td.shape)


def _stores_densely(saved: Saved) -> bool:
    """Whether a graph writes the gradient in one pass: a scatter takes a second one, after that of the zeros.

    On a CPU, comparing each action of a long row takes longer than writing zeros.
    """
    return saved.q_shape[-1] <= NARROW or saved.td_error.device.type != "cpu"


def scatter_taken(coefficient: Tensor, saved: Saved, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of q's shape with the coefficient at each action taken; a row with an illegal action stays zero."""
    q_shape = saved.q_shape
    if torch.compiler.is_compiling() and _stores_densely(saved):
        taken = torch.arange(q_shape[-1], device=coefficient.device) == saved.actions.view(*q_shape[:-1], 1)
        return torch.where(taken, coefficient.to(dtype or saved.q_dtype).unsqueeze(-1), 0)
    index, legal = legal_actions(saved.actions, q_shape[-1])
    if legal is not None:
        coefficient = torch.where(legal.view(coefficient.shape), coefficient, 0)
    index = index.view(*q_shape[:-1], 1)
    value = coefficient.to(dtype or saved.q_dtype).view(index.shape)
    zeros = value.new_zeros(q_shape)
    # In place nothing is copied, but vmap has no rule for that.
    return zeros.scatter(-1, index, value) if inside_transform() else zeros.scatter_(-1, index, value)
