"""Network and loss as one graph of torch.compile, forward and backward: what the loss adds, by each backend.

Without the optimizer, which a graph leaves as it is, so that a share of this time is less of a whole update.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import machine
from bench.measure import update as whole
from bench.measure.gate import passed
from bench.measure.loss import SIZES
from bench.measure.providers import Provider, can_compile
from bench.measure.timing import figures, interleaved, spread
from bench.measure.update import EAGER, NOTHING
from bench.measure.variants import GAMMA, VARIANTS, random_arguments
from bench.reporting.results import Row
from dqn_fused import fused_dqn_loss
from dqn_fused._backends import serving

FAMILY_SIZES = [(32, 18), (1024, 18), (1024, 512)]
SERIAL = 2**16  # elements of q: below, one thread, as the layers are too small to share out


class Work(NamedTuple):
    variant: str
    n: int
    A: int

    def __str__(self) -> str:
        return f"{self.variant} {self.n} x {self.A} in a graph"


def quick(device: str, variants: list[str]) -> list[Work]:
    return []  # compiling alone takes longer


def full(device: str, variants: list[str]) -> list[Work]:
    work = [Work("dqn", n, A) for n, A in SIZES]
    work += [Work(name, n, A) for name in VARIANTS if name != "dqn" for n, A in FAMILY_SIZES]
    return [piece for piece in work if piece.variant in variants]


def kinds(device: str) -> list[str]:
    """Eager first, whose result the others must have."""
    named = [name for name in serving(torch.device(device)) if device == "cuda" or name != "triton"]
    return [EAGER, "fused", *(f"fused[{name}]" for name in named)]


def provider(work: Work, device: str, kind: str) -> Provider:
    """A network, its target and the loss between them; the gradients of the network and, of a loss, its value."""
    variant = VARIANTS[work.variant]
    given = random_arguments(variant, work.n, work.A, torch.float32, device)
    del given["q"], given["next_q"]
    some_grad = torch.randn(work.n, work.A, device=device) / work.n
    mlp = whole.Work(whole.CARTPOLE.network, work.n, work.A, None)
    (online, observations), (target, _) = whole.network(mlp), whole.network(mlp)
    online, target = online.to(device), target.to(device)
    obs, next_obs = observations().to(device), observations().to(device)
    backend = kind.partition("[")[2].rstrip("]") or "auto"

    def loss() -> Tensor:
        with torch.no_grad():
            next_q = target(next_obs)
        q = online(obs)
        if kind == NOTHING:  # and the sum of next_q, lest the compiler leave the target network out
            return (q * some_grad).sum() + next_q.sum()
        if kind == EAGER:
            result = variant.eager(q, next_q=next_q, **given)
        else:
            result = fused_dqn_loss(q, next_q=next_q, gamma=GAMMA, **given, **variant.options, backend=backend)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    compiled: Callable[[], Tensor] = torch.compile(loss, fullgraph=True, dynamic=False)

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
    if work.n * work.A < SERIAL:
        torch.set_num_threads(1)
    torch._dynamo.reset()
    try:
        found: dict[str, Provider] = {}
        for names in (kinds(device), [NOTHING]):  # without a loss there are other gradients
            found |= passed(
                {name: partial(provider, work, device, name) for name in names}, torch.float32, work, problems
            )
        if EAGER not in found or NOTHING not in found:
            return []
        return rows(work, device, found, seconds)
    finally:
        torch.set_num_threads(threads)


def rows(work: Work, device: str, found: dict[str, Provider], seconds: float) -> list[Row]:
    names = [NOTHING, *(name for name in found if name != NOTHING)]
    times = interleaved({name: found[name].timer for name in names}, 2 * seconds, rounds=31)
    result = []
    for name in names:
        values = times[name]
        row: Row = {"variant": work.variant, "n": work.n, "A": work.A, "dtype": "float32", "provider": name}
        row |= figures(values, times[EAGER])._asdict()
        if name != NOTHING:
            low, adds, high = spread([v - w for v, w in zip(values, times[NOTHING], strict=True)])
            row |= {"adds_us": round(1e6 * adds, 2), "adds_p20": round(1e6 * low, 2), "adds_p80": round(1e6 * high, 2)}
            # Of eager's graph: how much longer this one takes.
            behind = median(v / e - 1 for v, e in zip(values, times[EAGER], strict=True))
            row["behind"] = round(behind, 4)
        result.append(machine.about("graph", device) | row)
    return result
