"""The distributional losses against the lines people write for them. One row a loss, size, dtype and provider."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import cuda, machine
from bench.measure.gate import passed
from bench.measure.memory import peak_memory
from bench.measure.providers import Provider, can_compile
from bench.measure.timing import figures, interleaved
from bench.measure.variants import GAMMA, Arguments, dtype_name
from bench.reporting.results import Row
from dqn_fused import (
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
)
from dqn_fused._backends import serving


class Family(NamedTuple):
    """A loss: written by hand, fused, and fused with its gradient."""

    eager: Callable[..., Tensor]
    fused: Callable[..., Any]
    both: Callable[..., Any]
    backends: str  # the name of the family in dqn_fused._backends
    input: str  # the argument that has a gradient
    arguments: Callable[[int, int, int, torch.dtype, str], Arguments]
    options: Mapping[str, Any] = MappingProxyType({})  # of the fused losses
    by_hand: tuple[str, ...] = ()  # arguments that only the eager loss takes


LOW, HIGH = -10.0, 10.0  # of the support of C51 and HL-Gauss, as Atari agents have it
SIGMA = 0.75


class Work(NamedTuple):
    variant: str
    n: int
    A: int
    K: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.variant} {self.n} x {self.A} x {self.K} {dtype_name(self.dtype)}"


def eager_quantile(
    quantiles: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_quantiles: Tensor,
    terminated: Tensor,
    taus: Tensor | None = None,
) -> Tensor:
    """The lines of QR-DQN scripts, and of IQN's, whose fractions are sampled: every pair is an element of a tensor."""
    n, _, K = quantiles.shape
    samples = torch.arange(n, device=quantiles.device)
    with torch.no_grad():
        best = next_quantiles.mean(2).argmax(1)
        target = rewards[:, None] + GAMMA * next_quantiles[samples, best] * (1 - terminated.float())[:, None]
    if taus is None:
        taus = (torch.arange(K, device=quantiles.device, dtype=quantiles.dtype) + 0.5) / K
    u = target[:, None, :] - quantiles[samples, actions][:, :, None]  # (n, K, K')
    huber = torch.where(u.abs() <= 1, 0.5 * u.pow(2), u.abs() - 0.5)
    return ((taus[..., None] - (u.detach() < 0).float()).abs() * huber).mean(2).sum(1).mean()


def quantile_arguments(n: int, A: int, K: int, dtype: torch.dtype, device: str) -> Arguments:
    return {
        "quantiles": torch.randn(n, A, K, dtype=dtype, device=device, requires_grad=True),
        "actions": torch.randint(A, (n,), device=device),
        "rewards": torch.randn(n, device=device),
        "next_quantiles": torch.randn(n, A, K, dtype=dtype, device=device),
        "terminated": torch.rand(n, device=device) < 0.1,
    }


def sampled_arguments(n: int, A: int, K: int, dtype: torch.dtype, device: str) -> Arguments:
    return {**quantile_arguments(n, A, K, dtype, device), "taus": torch.rand(n, K, device=device)}


def eager_categorical(
    logits: Tensor, actions: Tensor, rewards: Tensor, next_logits: Tensor, terminated: Tensor, atoms: Tensor
) -> Tensor:
    """The lines of C51 scripts."""
    n, _, K = logits.shape
    samples, step = torch.arange(n, device=logits.device), (HIGH - LOW) / (K - 1)
    with torch.no_grad():
        p = torch.softmax(next_logits, 2)
        p = p[samples, (p * atoms).sum(2).argmax(1)]
        locations = rewards[:, None] + GAMMA * atoms * (1 - terminated.float())[:, None]
        b = (locations.clamp(LOW, HIGH) - LOW) / step
        lower, upper = b.floor().clamp(0, K - 1), b.ceil().clamp(0, K - 1)
        target = torch.zeros_like(p)
        target.scatter_add_(1, lower.long(), p * (upper + (lower == upper).float() - b))
        target.scatter_add_(1, upper.long(), p * (b - lower))
    log_p = torch.log_softmax(logits[samples, actions], 1)
    return -(target * log_p).sum(1).mean()


def eager_hl_gauss(logits: Tensor, actions: Tensor, target: Tensor, edges: Tensor) -> Tensor:
    """The listing of Farebrother et al. (2024)."""
    n, _, K = logits.shape
    with torch.no_grad():
        width = SIGMA * (HIGH - LOW) / (K - 1)
        cumulative = torch.erf((edges - target.clamp(LOW, HIGH)[:, None]) / (2**0.5 * width))
        p = cumulative.diff(dim=1) / (cumulative[:, -1:] - cumulative[:, :1])
    return torch.nn.functional.cross_entropy(logits[torch.arange(n, device=logits.device), actions], p)


def eager_two_hot(logits: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    """A scalar shared between the two atoms beside it, as MuZero and its successors have it."""
    n, _, K = logits.shape
    with torch.no_grad():
        b = (target.clamp(LOW, HIGH)[:, None] - LOW) / ((HIGH - LOW) / (K - 1))
        lower = b.floor().clamp(max=K - 2)
        p = torch.zeros(n, K, device=logits.device)
        p.scatter_(1, lower.long(), 1 - (b - lower)).scatter_(1, lower.long() + 1, b - lower)
    return torch.nn.functional.cross_entropy(logits[torch.arange(n, device=logits.device), actions], p)


def categorical_arguments(n: int, A: int, K: int, dtype: torch.dtype, device: str) -> Arguments:
    a = quantile_arguments(n, A, K, dtype, device)
    named = {"logits": a.pop("quantiles"), "next_logits": a.pop("next_quantiles")}
    return {**a, **named, "atoms": torch.linspace(LOW, HIGH, K, device=device)}


def ready_arguments(n: int, A: int, K: int, dtype: torch.dtype, device: str) -> Arguments:
    return {
        "logits": torch.randn(n, A, K, dtype=dtype, device=device, requires_grad=True),
        "actions": torch.randint(A, (n,), device=device),
        "target": 3 * torch.randn(n, device=device),
    }


def binned_arguments(n: int, A: int, K: int, dtype: torch.dtype, device: str) -> Arguments:
    half = (HIGH - LOW) / (K - 1) / 2
    edges = torch.linspace(LOW - half, HIGH + half, K + 1, device=device)
    return {**ready_arguments(n, A, K, dtype, device), "edges": edges}


_quantile = Family(
    eager_quantile,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
    "quantile",
    "quantiles",
    quantile_arguments,
    {"gamma": GAMMA},
)
_ready = Family(
    eager_two_hot,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
    "categorical",
    "logits",
    ready_arguments,
    {"support": (LOW, HIGH)},
)
FAMILIES = {
    "QR-DQN": _quantile,
    "IQN": _quantile._replace(arguments=sampled_arguments),
    "C51": Family(
        eager_categorical,
        fused_categorical_loss,
        fused_categorical_loss_and_grad,
        "categorical",
        "logits",
        categorical_arguments,
        {"gamma": GAMMA, "support": (LOW, HIGH)},
        ("atoms",),
    ),
    "two-hot": _ready,
    "HL-Gauss": _ready._replace(
        eager=eager_hl_gauss,
        arguments=binned_arguments,
        options={"support": (LOW, HIGH), "projection": "hl_gauss", "sigma": SIGMA},
        by_hand=("edges",),
    ),
}
SIZES = {
    "QR-DQN": [(32, 18, 200), (512, 18, 200), (128, 2, 50)],
    "IQN": [(32, 18, 64), (32, 18, 8)],
    "C51": [(32, 18, 51), (512, 18, 51), (128, 2, 101)],
    "two-hot": [(32, 18, 51), (512, 18, 51)],
    "HL-Gauss": [(32, 18, 51), (512, 18, 51)],
}
QUICK = [Work("QR-DQN", 128, 2, 50), Work("IQN", 32, 18, 64), Work("C51", 128, 2, 101), Work("HL-Gauss", 32, 18, 51)]


def quick(device: str, variants: list[str]) -> list[Work]:
    return QUICK


def full(device: str, variants: list[str]) -> list[Work]:
    return [Work(name, *size) for name, sizes in SIZES.items() for size in sizes]


def providers(work: Work, batch: Arguments, device: str) -> Iterator[tuple[str, Callable[[], Provider]]]:
    """Name and how to make the provider, of all that can run here; eager first."""
    family = FAMILIES[work.variant]

    given = {name: x for name, x in batch.items() if name not in family.by_hand}

    def step(loss: Callable[..., Any], arguments: Arguments = batch) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            value = loss(**arguments)
            return value, torch.autograd.grad(value, arguments[family.input])[0]

        return run

    yield "eager", lambda: Provider(step(family.eager))
    if device == "cuda" or can_compile():
        yield "torch.compile", lambda: Provider(step(torch.compile(family.eager, dynamic=False)))
    for backend in serving(torch.device(device), family.backends):
        options = {**family.options, "backend": backend}
        yield f"fused[{backend}]", partial(Provider, step(partial(family.fused, **options), given))
        yield f"loss_and_grad[{backend}]", partial(Provider, partial(family.both, **given, **options))


def measure(work: Work, device: str, seconds: float, problems: list[str]) -> list[Row]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch = FAMILIES[work.variant].arguments(work.n, work.A, work.K, work.dtype, device)
    found = passed(dict(providers(work, batch, device)), work.dtype, work, problems)
    if not found:
        return []
    peaks = {name: peak_memory(provider.call) for name, provider in found.items()}
    times = interleaved({name: provider.timer for name, provider in found.items()}, seconds)
    rows = []
    for name, provider in found.items():
        on_device = cuda.device_us(provider.call) if device == "cuda" else None
        rows.append(
            machine.about("distributional", device)
            | {"variant": work.variant, "n": work.n, "A": work.A, "K": work.K, "dtype": dtype_name(work.dtype)}
            | {"provider": name, "device_us": "" if on_device is None else on_device, "peak_bytes": peaks[name]}
            | figures(times[name], times["eager"])._asdict()
        )
    return rows
