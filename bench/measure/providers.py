"""The same loss, forward and backward, computed in every way that can run here."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import cuda, torchrl_loss
from bench.measure.rlax_process import RlaxProcess
from bench.measure.timing import Timer, timer
from bench.measure.variants import GAMMA, VARIANTS, Arguments, Variant, matrix
from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad, node
from dqn_fused._backends import serving

FLOOR = "floor"


class Provider(NamedTuple):
    call: Callable[[], Sequence[Tensor]]  # one forward and backward: (loss, dq, ...), or gradients
    elsewhere: Timer | None = None  # its timer, where it runs in a process of its own
    capturable: bool = False  # in a CUDA graph
    replays: bool = False  # one already, whose memory is its own

    @property
    def timer(self) -> Timer:
        return self.elsewhere or timer(self.call)


def step(loss: Callable[..., Any], batch: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward and backward; returns (loss, dq)."""

    def run() -> tuple[Tensor, Tensor]:
        value = loss(**batch)
        if isinstance(value, tuple):  # with the TD errors
            value = value[0]
        return value, torch.autograd.grad(value, batch["q"])[0]

    return run


def providers(
    name: str, batch: Arguments, device: str, compiled: bool = True, rlax: RlaxProcess | None = None
) -> dict[str, Callable[[], Provider]]:
    """Name -> how to make the provider, for all that can run here; eager first."""
    variant = VARIANTS[name]
    eager = step(variant.eager, batch)
    found: dict[str, Callable[[], Provider]] = {"eager": lambda: Provider(eager, capturable=True)}
    if device == "cuda":
        found["eager, CUDA graph"] = lambda: Provider(cuda.captured(eager), replays=True)
    if compiled and (device == "cuda" or can_compile()):
        found["torch.compile"] = lambda: Provider(step(torch.compile(variant.eager, dynamic=False), batch))
        if device == "cuda":
            found["torch.compile, reduce-overhead"] = lambda: Provider(
                cuda.reduce_overhead(variant.eager, batch, step), replays=True
            )
    if name == "dqn" and batch["q"].dtype is torch.float32 and torchrl_loss.installed():
        found["TorchRL"] = lambda: Provider(torchrl_loss.step(batch))
    if rlax is not None and rlax.serves(name, batch):
        found["rlax"] = lambda: Provider(rlax.load(name, batch), rlax.seconds)
    return found | ours(variant, batch, device)


def ours(variant: Variant, batch: Arguments, device: str) -> dict[str, Callable[[], Provider]]:
    """Each backend of this project that serves the device, with autograd and without."""
    found: dict[str, Callable[[], Provider]] = {}
    for backend in serving(torch.device(device)):
        options = {"gamma": GAMMA, "backend": backend, **variant.options}
        fused = step(partial(fused_dqn_loss, **options), batch)
        both = partial(fused_dqn_loss_and_grad, **batch, **options)
        found[f"fused[{backend}]"] = partial(Provider, fused, capturable=True)
        if backend == "compiled" and node.MODULE is not None:
            found["fused[compiled], without node"] = partial(Provider, node.without(fused), capturable=True)
        found[f"loss_and_grad[{backend}]"] = partial(Provider, both, capturable=True)
    return found


def floor(variant: Variant, batch: Arguments, size: int) -> Provider:
    """The least work possible with PyTorch's own operations, without a loss.

    On the CPU each matrix is read once, by amax, and one of zeros is written; on a GPU `size` bytes are copied.
    """
    if batch["q"].is_cuda:
        source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device="cuda")
        return Provider(partial(_copy, torch.empty_like(source), source), capturable=True)
    matrices = [matrix(batch, name).detach() for name in dict.fromkeys(variant.reads)]
    return Provider(partial(_read_and_write, matrices, batch["q"].detach()))


def _read_and_write(matrices: list[Tensor], q: Tensor) -> tuple[Tensor, ...]:
    return *(x.amax(1) for x in matrices), torch.zeros_like(q)


def _copy(to: Tensor, source: Tensor) -> tuple[Tensor]:
    return (to.copy_(source),)


@cache
def can_compile() -> bool:
    """Inductor needs a C++ compiler on the CPU."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(2))
    except Exception:
        return False
    return True
