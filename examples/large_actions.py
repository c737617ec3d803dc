"""Q-learning over a catalogue of tens of thousands of items: the fused linear head and the eager one, side by side.

    python examples/large_actions.py                  # both, learning curves in large_actions.png
    python examples/large_actions.py --items 50000 --steps 1000

The catalogue is synthetic. An item is a point on a sphere, in one of many genres; a user is another such point, and
likes what is near. In a session of three recommendations each reward is how well the item fits, and the user drifts
towards what was recommended. The log was written by a policy that half of the time recommends an item of the user's
favourite genre, and otherwise a popular item. A Q-network of two layers learns only from that log, by double DQN, and
knows nothing of items or genres; then its greedy recommendations to new users are compared with the logged and with the
best possible ones.

Needs matplotlib, numpy and tqdm besides dqn_fused.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dqn_fused import fused_linear_dqn_loss
from dqn_fused.reference import dqn_loss

GENRES, TASTE, SESSION = 200, 8, 3


@dataclass
class Args:
    items: int = 20_000
    features: int = 128
    steps: int = 1_500
    batch_size: int = 256
    learning_rate: float = 3e-4
    gamma: float = 0.5
    tau: float = 0.02
    seed: int = 1
    plot: str = "large_actions.png"


class Catalogue:
    """Items and the users who like them."""

    def __init__(self, items: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.centres = self.users(GENRES)
        self.genre = torch.arange(items) % GENRES
        noise = 0.3 * torch.randn(items, TASTE, generator=generator)
        self.items = F.normalize(self.centres[self.genre] + noise, dim=1)
        self.popularity = 1 / torch.arange(1, items + 1)[torch.randperm(items, generator=generator)]

    def users(self, n: int) -> Tensor:
        return F.normalize(torch.randn(n, TASTE, generator=self.generator), dim=1)

    def fit(self, users: Tensor, actions: Tensor) -> Tensor:
        """Reward: 1 for an item right where the user is, nearly 0 for one far away."""
        return torch.exp(2 * ((users * self.items[actions]).sum(1) - 1))

    def drift(self, users: Tensor, actions: Tensor) -> Tensor:
        return F.normalize(users + 0.2 * self.items[actions], dim=1)

    def logged_action(self, users: Tensor) -> Tensor:
        n = len(users)
        per_genre = len(self.items) // GENRES
        favourite = (users @ self.centres.t()).argmax(1)
        similar = favourite + GENRES * torch.randint(per_genre, (n,), generator=self.generator)
        popular = torch.multinomial(self.popularity, n, replacement=True, generator=self.generator)
        return torch.where(torch.rand(n, generator=self.generator) < 0.5, similar, popular)

    def best_action(self, users: Tensor) -> Tensor:
        return (users @ self.items.t()).argmax(1)

    def mean_reward(self, policy: Any, sessions: int = 2_000) -> float:
        users, total = self.users(sessions), 0.0
        for _ in range(SESSION):
            actions = policy(users)
            total += self.fit(users, actions).mean().item()
            users = self.drift(users, actions)
        return total / SESSION

    def log(self, n: int) -> tuple[Tensor, ...]:
        """Transitions: users, actions, rewards, users afterwards, and whether the session ended."""
        users, position = self.users(n), torch.randint(SESSION, (n,), generator=self.generator)
        actions = self.logged_action(users)
        return users, actions, self.fit(users, actions), self.drift(users, actions), position == SESSION - 1


class QNetwork(nn.Module):
    """Two layers; the second one has a row for each item."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(TASTE, args.features), nn.ReLU())
        self.head = nn.Linear(args.features, args.items)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def greedy(self, users: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(self.body(users)).argmax(1)


Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def eager_loss(network: QNetwork, target: QNetwork, batch: Batch, gamma: float) -> Any:
    users, actions, rewards, next_users, terminated = batch
    with torch.no_grad():
        next_q = target.head(target.body(next_users))
        online = network.head(network.body(next_users))
    q = network.head(network.body(users))
    return dqn_loss(q, actions, rewards, next_q, terminated, gamma, next_q_online=online, loss="huber")


def fused_loss(network: QNetwork, target: QNetwork, batch: Batch, gamma: float) -> Any:
    users, actions, rewards, next_users, terminated = batch
    with torch.no_grad():
        next_hidden, online = target.body(next_users), network.body(next_users)
    return fused_linear_dqn_loss(
        network.body(users), network.head.weight, actions, rewards, next_hidden, target.head.weight,
        terminated, gamma, bias=network.head.bias, next_bias=target.head.bias,
        next_hidden_online=online, loss="huber",
    )  # fmt: skip


class Run(NamedTuple):
    """Results of training with one of the losses."""

    losses: list[float]
    seconds: float  # of losses, forward and backward
    peak_bytes: int  # held by one of them, gradients included
    mean_reward: float


def train(loss_of: Any, args: Args, name: str) -> Run:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    catalogue = Catalogue(args.items, generator)
    network = QNetwork(args)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    losses, seconds = [], 0.0
    for _ in tqdm(range(args.steps), desc=name, leave=False):
        batch = catalogue.log(args.batch_size)
        optimizer.zero_grad()
        start = time.perf_counter()
        loss = loss_of(network, target, batch, args.gamma)
        loss.backward()
        seconds += time.perf_counter() - start
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), args.tau)
        losses.append(loss.item())
    optimizer.zero_grad()
    peak = peak_bytes(lambda: loss_of(network, target, batch, args.gamma).backward())
    return Run(losses, seconds, peak, catalogue.mean_reward(network.greedy))


def peak_bytes(call: Any) -> int:
    """Largest sum of live allocations during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def plot(runs: dict[str, Run], args: Args) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")  # without pyplot, so no display is needed
    curves, times, memory = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        smooth = torch.tensor(run.losses).unfold(0, 25, 25).mean(1)
        curves.plot([25 * (i + 1) for i in range(len(smooth))], smooth, style, label=name, linewidth=2)
    curves.set(xlabel="update", ylabel="loss, mean of 25", yscale="log", title="the same curve")
    curves.legend(frameon=False)
    milliseconds = [1e3 * run.seconds / args.steps for run in runs.values()]
    megabytes = [run.peak_bytes / 1e6 for run in runs.values()]
    for axes, values, title in (
        (times, milliseconds, "ms a loss, with backward"),
        (memory, megabytes, "MB at the peak"),
    ):
        bars = axes.bar(list(runs), values, color=["tab:blue", "tab:orange"])
        axes.bar_label(bars, fmt="%.1f")
        axes.set_title(title)
    for axes in (curves, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Q-learning over {args.items:,} items, {args.features} features, batch {args.batch_size}")
    figure.savefig(args.plot, dpi=150)


def parse_args() -> Args:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in vars(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help="%(default)s")
    return Args(**vars(parser.parse_args()))


def main() -> None:
    args = parse_args()
    runs = {"fused": train(fused_loss, args, "fused"), "eager": train(eager_loss, args, "eager")}
    catalogue = Catalogue(args.items, torch.Generator().manual_seed(args.seed))
    best, logged = (catalogue.mean_reward(policy) for policy in (catalogue.best_action, catalogue.logged_action))
    print("| loss | ms a loss | MB at the peak | last losses | mean reward of its recommendations |")
    print("|---|---:|---:|---:|---:|")
    for name, run in runs.items():
        last = sum(run.losses[-100:]) / len(run.losses[-100:])
        print(
            f"| {name} | {1e3 * run.seconds / args.steps:.1f} | {run.peak_bytes / 1e6:.1f} | {last:.5f} "
            f"| {run.mean_reward:.3f} |"
        )
    print(f"\nthe log's recommendations: {logged:.3f}; the best: {best:.3f}")
    plot(runs, args)
    print(f"learning curves: {args.plot}")


if __name__ == "__main__":
    main()
