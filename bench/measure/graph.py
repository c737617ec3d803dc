"""Network and loss as one graph of torch.compile, forward and backward: what the loss adds, by each backend.

The optimizer is left out, because the graph does not change it: a share of this time is less of a whole update.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import machine
from bench.measure import update as whole
from bench.measure.distributional import FAMILIES
from bench.measure.gate import passed
from bench.measure.loss import SIZES
from bench.measure.providers import Provider, can_compile
from bench.measure.timing import figures, interleaved, spread
from bench.measure.update import EAGER, NOTHING
from bench.measure.variants import GAMMA, VARIANTS, random_arguments
from bench.reporting.results import Row
from bench.reporting.tables import AGAIN
from dqn_fused import fused_dqn_loss
from dqn_fused._backends import serving

FAMILY_SIZES = [(32, 18), (1024, 18), (1024, 512)]
# From sizes at which the call costs more than the loss to sizes at which the loss dominates.
DISTRIBUTIONAL_SIZES = {
    "QR-DQN": [(32, 4, 8), (128, 2, 50), (32, 18, 200)],
    "IQN": [(32, 18, 8), (32, 18, 64)],
    "C51": [(32, 4, 8), (32, 18, 51), (128, 2, 101), (512, 18, 51)],
    "two-hot": [(32, 4, 8), (32, 18, 51)],
    "HL-Gauss": [(32, 4, 8), (32, 18, 51), (512, 18, 51)],
}
SERIAL = 2**16  # elements of q: below, one thread, as the layers are too small for several

# A loss of the outputs of the two networks, q and next_q.
Loss = Callable[[Tensor, Tensor], Any]


class Work(NamedTuple):
    variant: str
    n: int
    A: int
    K: int | None = None  # of a distributional loss

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.A) if self.K is None else (self.n, self.A, self.K)

    def __str__(self) -> str:
        return f"{self.variant} {' x '.join(map(str, self.shape))} in a graph"


def quick(device: str, variants: list[str]) -> list[Work]:
    return []  # compiling alone takes longer


def full(device: str, variants: list[str]) -> list[Work]:
    work = [Work("dqn", n, A) for n, A in SIZES]
    work += [Work(name, n, A) for name in VARIANTS if name != "dqn" for n, A in FAMILY_SIZES]
    distributions = [Work(name, *size) for name, sizes in DISTRIBUTIONAL_SIZES.items() for size in sizes]
    return [piece for piece in work if piece.variant in variants] + distributions


def kinds(work: Work, device: str) -> list[str]:
    """Eager first, whose result the others must have."""
    family = None if work.K is None else FAMILIES[work.variant].backends
    named = [name for name in serving(torch.device(device), family) if device == "cuda" or name != "triton"]
    return [EAGER, "fused", *(f"fused[{name}]" for name in named)]


def loss_of(work: Work, device: str, kind: str) -> Loss:
    """The loss of q and next_q by a kind of provider; all other arguments are drawn here."""
    torch.manual_seed(0)
    options: Mapping[str, Any]
    by_hand: tuple[str, ...] = ()
    if work.K is None:
        variant = VARIANTS[work.variant]
        given = random_arguments(variant, work.n, work.A, torch.float32, device)
        x, eager, fused, options = "q", variant.eager, fused_dqn_loss, {"gamma": GAMMA, **variant.options}
    else:
        family = FAMILIES[work.variant]
        given = family.arguments(work.n, work.A, work.K, torch.float32, device)
        x, eager, fused, options, by_hand = family.input, family.eager, family.fused, family.options, family.by_hand
    names = [x] if given.get(f"next_{x}") is None else [x, f"next_{x}"]
    others = given[names[-1]][1:] if isinstance(given[names[-1]], list) else []  # of more target networks than one
    given = {name: value for name, value in given.items() if name not in names}
    if kind == NOTHING:  # and the sum of next_q, so that the compiler keeps the target network
        some_grad = torch.randn(work.shape, device=device) / work.n
        return lambda q, next_q: (q * some_grad).sum() + (next_q.sum() if len(names) > 1 else 0)
    if kind == EAGER:
        loss = partial(eager, **given)
    else:
        ours = {name: value for name, value in given.items() if name not in by_hand}
        loss = partial(fused, **ours, **options, backend=kind.partition("[")[2].rstrip("]") or "auto")

    def loss_of_outputs(q: Tensor, next_q: Tensor) -> Any:
        both = (q, [next_q, *others] if others else next_q)
        return loss(**dict(zip(names, both, strict=False)))

    return loss_of_outputs


def provider(work: Work, device: str, kind: str) -> Provider:
    """A network, its target and the loss between them; the gradients of the network and, of a loss, its value."""
    loss = loss_of(work, device, kind)
    mlp = whole.Work(whole.CARTPOLE.network, work.n, math.prod(work.shape[1:]), None)
    (online, observations), (target, _) = whole.network(mlp), whole.network(mlp)
    online, target = online.to(device), target.to(device)
    obs, next_obs = observations().to(device), observations().to(device)

    def forward() -> Tensor:
        with torch.no_grad():
            next_q = target(next_obs).view(work.shape)
        result = loss(online(obs).view(work.shape), next_q)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    compiled: Callable[[], Tensor] = torch.compile(forward, fullgraph=True, dynamic=False)

    def call() -> list[Tensor]:
        online.zero_grad()
        value = compiled()
        value.backward()
        return [value, *(p.grad for p in online.parameters() if p.grad is not None)]

    return Provider(call)


def measure(work: Work, device: str, seconds: float, problems: list[str]) -> list[Row]:
    """What each loss adds to the graph without one, the difference taken within a round."""
    if device != "cuda" and not can_compile():
        problems.append(f"{work}: no compiler")
        return []
    threads = torch.get_num_threads()
    if math.prod(work.shape) < SERIAL:
        torch.set_num_threads(1)
    torch._dynamo.reset()
    try:
        found: dict[str, Provider] = {}
        for names in (kinds(work, device), [NOTHING]):  # without a loss there are other gradients
            found |= passed(
                {name: partial(provider, work, device, name) for name in names}, torch.float32, work, problems
            )
        if EAGER not in found or NOTHING not in found:
            return []
        return rows(work, device, found, seconds)
    finally:
        torch.set_num_threads(threads)


def rows(work: Work, device: str, found: dict[str, Provider], seconds: float) -> list[Row]:
    names = [NOTHING, *(name for name in found if name != NOTHING), AGAIN]
    timed = {**found, AGAIN: found[EAGER]}
    times = interleaved({name: timed[name].timer for name in names}, 2 * seconds, rounds=31)
    result = []
    for name in names:
        values = times[name]
        row: Row = {"variant": work.variant, "n": work.n, "A": work.A, "K": "" if work.K is None else work.K}
        row |= {"dtype": "float32", "provider": name}
        row |= figures(values, times[EAGER])._asdict()
        if name != NOTHING:
            low, adds, high = spread([v - w for v, w in zip(values, times[NOTHING], strict=True)])
            row |= {"adds_us": round(1e6 * adds, 2), "adds_p20": round(1e6 * low, 2), "adds_p80": round(1e6 * high, 2)}
            # Of eager's graph: how much longer this one takes.
            behind = median(v / e - 1 for v, e in zip(values, times[EAGER], strict=True))
            row["behind"] = round(behind, 4)
        result.append(machine.about("graph", device) | row)
    return result
