"""The same loss, forward and backward, by each way there is to compute it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad
from dqn_fused._backends import serving
from dqn_fused.arguments import check_loss

GAMMA = 0.99
Arguments = dict[str, Any]


def random_batch(n: int, A: int, dtype: torch.dtype, device: str) -> Arguments:
    """Arguments of the loss; q requires a gradient."""
    return {
        "q": torch.randn(n, A, dtype=dtype, device=device, requires_grad=True),
        "actions": torch.randint(A, (n,), device=device),
        "rewards": torch.randn(n, device=device),
        "next_q": torch.randn(n, A, dtype=dtype, device=device),
        "terminated": torch.rand(n, device=device) < 0.1,
    }


def eager_loss(q: Tensor, actions: Tensor, rewards: Tensor, next_q: Tensor, terminated: Tensor) -> Tensor:
    """The lines a DQN script writes: max, target, gather, mean squared error."""
    with torch.no_grad():
        target_max, _ = next_q.max(dim=1)
        target = rewards + GAMMA * target_max * (1 - terminated.float())
    taken = q.gather(1, actions.unsqueeze(1)).squeeze(1)
    return F.mse_loss(taken.float(), target.float())


def losses(device: str, eager: Callable[..., Any], **options: Any) -> dict[str, Callable[..., Any]]:
    """Name -> loss of a batch, for every road that runs on this device; eager first."""
    found: dict[str, Callable[..., Any]] = {"eager": eager}
    if device == "cuda" or _can_compile():
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    spec = check_loss(**{k: x for k, x in options.items() if k in ("target", "cql_alpha")})
    for name in serving(torch.device(device), spec):
        found[f"fused[{name}]"] = partial(fused_dqn_loss, gamma=GAMMA, backend=name, **options)
    return found


def step(loss: Callable[..., Any], batch: Arguments) -> Callable[[], Any]:
    """One forward and backward; returns (loss, dq)."""

    def run() -> tuple[Tensor, Tensor]:
        value = loss(**batch)
        if isinstance(value, tuple):  # with the TD errors
            value = value[0]
        return value, torch.autograd.grad(value, batch["q"])[0]

    return run


class Floor(torch.autograd.Function):
    """The least there is to do: the matrices read once and zeros written once, in an autograd.Function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *matrices: Tensor) -> Tensor:
        ctx.q_shape, ctx.count = q.shape, len(matrices)
        largest = [x.amax(1) for x in matrices]
        return largest[0][0]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[0].new_zeros(ctx.q_shape), *(None,) * ctx.count


def floor(batch: Arguments, *matrices: str) -> Callable[[], Any]:
    """What PyTorch's own operations take for the least there is to do; its result is none."""
    inputs = [batch[name].detach() for name in matrices]
    return lambda: torch.autograd.grad(Floor.apply(batch["q"], *inputs), batch["q"])


def steps(device: str, batch: Arguments, eager: Callable[..., Any], **options: Any) -> dict[str, Callable[[], Any]]:
    """Name -> one forward and backward; last the one call that gives both without autograd."""
    found = {name: step(loss, batch) for name, loss in losses(device, eager, **options).items()}
    found["fused_dqn_loss_and_grad"] = partial(fused_dqn_loss_and_grad, **batch, gamma=GAMMA, **options)
    return found


def _can_compile() -> bool:
    """Inductor needs a C++ compiler on the CPU."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(2))
    except Exception:
        return False
    return True
