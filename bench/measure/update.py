"""The whole update, of which the loss is a part: two networks forward, loss, backward, Adam."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.measure import cuda, machine
from bench.measure.gate import passed
from bench.measure.memory import peak_memory
from bench.measure.providers import Provider, can_compile
from bench.measure.timing import figures, interleaved, spread
from bench.measure.variants import GAMMA, eager_loss
from bench.reporting.results import Row
from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad

NOTHING, EAGER, FUSED, BOTH = "no loss", "eager", "fused_dqn_loss", "fused_dqn_loss_and_grad"
PLAIN, COMPILED, GRAPH = "eager", "torch.compile", "CUDA graph"  # how network and loss are run


class Work(NamedTuple):
    """One network of the literature and its batch."""

    network: str
    n: int
    A: int
    threads: int | None  # of PyTorch; None: its default

    def __str__(self) -> str:
        return f"{self.network} {self.n} x {self.A}"


CARTPOLE = Work("CartPole MLP 120-84", 128, 2, 1)  # its layers are too small for several threads
ATARI = Work("Atari CNN", 32, 18, None)


def quick(device: str, variants: list[str]) -> list[Work]:
    return [CARTPOLE]


def full(device: str, variants: list[str]) -> list[Work]:
    return [CARTPOLE, ATARI]


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 255  # uint8, as a replay buffer keeps them


def network(work: Work) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network and what makes observations for it; Atari's is that of Mnih et al., 2015."""
    if work.network == CARTPOLE.network:
        layers = nn.Linear(4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, work.A)
        return nn.Sequential(*layers), lambda: torch.randn(work.n, 4)
    convolutions = (
        nn.Conv2d(4, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
    )
    head = nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, work.A)
    return nn.Sequential(Pixels(), *convolutions, *head), lambda: torch.randint(
        256, (work.n, 4, 84, 84), dtype=torch.uint8
    )


class Learner:
    """A network with its target, its optimizer and one batch, the same for every learner of a seed."""

    def __init__(self, work: Work, device: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        online, observations = network(work)
        target = network(work)[0]
        self.obs, self.next_obs = observations().to(device), observations().to(device)
        self.samples = torch.randint(work.A, (work.n,)).to(device), torch.randn(work.n).to(device)
        self.terminated = (torch.rand(work.n) < 0.1).to(device)
        self.some_grad = torch.randn(work.n, work.A).to(device) / work.n
        self.online, self.target = online.to(device), target.to(device)
        self.first = copy.deepcopy(self.online.state_dict())
        self.optimizer = torch.optim.Adam(self.online.parameters(), capturable=device == "cuda")

    def q_values(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            next_q = self.target(self.next_obs)
        return self.online(self.obs), next_q

    def loss(self, kind: str) -> Tensor:
        """The value whose backward gives the gradients; without a loss, a product with some gradient of q.

        The sum of next_q is added to the product, so that a compiler keeps the target network.
        """
        q, next_q = self.q_values()
        if kind == NOTHING:
            return (q * self.some_grad).sum() + next_q.sum()
        if kind == EAGER:
            return eager_loss(q, *self.samples, next_q, self.terminated)
        loss = fused_dqn_loss(q, *self.samples, next_q, self.terminated, GAMMA)
        assert isinstance(loss, Tensor)
        return loss

    def update(self, kind: str, compiled: Callable[[], Tensor] | None = None) -> list[Tensor]:
        """One update; returns the gradients, of the parameters as they were before it."""
        self.optimizer.zero_grad()
        if compiled is not None:
            compiled().backward()
        elif kind in (NOTHING, BOTH):
            q, next_q = self.q_values()
            q.backward(self.some_grad if kind == NOTHING else self._grad(q, next_q))
        else:
            self.loss(kind).backward()
        self.optimizer.step()
        return [p.grad for p in self.online.parameters() if p.grad is not None]

    def reset(self) -> None:
        with torch.no_grad():
            for name, x in self.online.state_dict().items():
                x.copy_(self.first[name])

    def _grad(self, q: Tensor, next_q: Tensor) -> Tensor:
        return fused_dqn_loss_and_grad(q, *self.samples, next_q, self.terminated, GAMMA)[1]


def provider(work: Work, device: str, mode: str, kind: str) -> Provider:
    learner = Learner(work, device)
    call: Callable[[], list[Tensor]] = partial(learner.update, kind)
    if mode == COMPILED:
        call = partial(learner.update, kind, torch.compile(partial(learner.loss, kind), fullgraph=True, dynamic=False))
    elif mode == GRAPH:
        call = cuda.captured(call)
    learner.reset()  # a capture has run updates before
    return Provider(call, replays=mode == GRAPH)


def measure(work: Work, device: str, seconds: float, problems: list[str]) -> list[Row]:
    """Each mode's losses against eager in the plain mode; what a loss adds, to the same mode without one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads or threads)
    torch._dynamo.reset()
    try:
        found: dict[tuple[str, str], Provider] = {}
        for kinds in ((EAGER, FUSED, BOTH), (NOTHING,)):  # without a loss there are other gradients
            makers = {(m, k): partial(provider, work, device, m, k) for k in kinds for m in modes(device, k)}
            found |= passed(makers, torch.float32, work, problems)
        if (PLAIN, EAGER) not in found:
            return []
        return rows(work, device, found, seconds)
    finally:
        torch.set_num_threads(threads)


def modes(device: str, kind: str) -> list[str]:
    """fused_dqn_loss_and_grad has no loss for autograd, so a compiled one would break the graph."""
    compiled = [COMPILED] if kind != BOTH and (device == "cuda" or can_compile()) else []
    return [PLAIN, *compiled, *([GRAPH] if device == "cuda" else [])]


def rows(work: Work, device: str, found: dict[tuple[str, str], Provider], seconds: float) -> list[Row]:
    order = [(m, k) for m in (PLAIN, COMPILED, GRAPH) for k in (NOTHING, EAGER, FUSED, BOTH) if (m, k) in found]
    times = interleaved({str(key): found[key].timer for key in order}, 2 * seconds, rounds=31)
    about = machine.about("update", device)
    result = []
    for mode, kind in order:
        values = times[str((mode, kind))]
        row: Row = {"network": work.network, "n": work.n, "A": work.A, "dtype": "float32", "mode": mode}
        row |= {"provider": kind} | figures(values, times[str((PLAIN, EAGER))])._asdict()
        if kind != NOTHING and (mode, NOTHING) in found:
            without = times[str((mode, NOTHING))]
            low, adds, high = spread([v - w for v, w in zip(values, without, strict=True)])
            row |= {"adds_us": round(1e6 * adds, 2), "adds_p20": round(1e6 * low, 2), "adds_p80": round(1e6 * high, 2)}
            row["share"] = round(adds / median(values), 4)
        if not found[mode, kind].replays:
            row["peak_bytes"] = peak_memory(found[mode, kind].call)
        result.append(about | row)
    return result
