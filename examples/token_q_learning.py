"""Q-learning over tokens: ILQL's loss with the conservative term over a vocabulary of 50,257, fused and eager.

    python examples/token_q_learning.py                  # both, learning curves in token_q_learning.png
    python examples/token_q_learning.py --vocabulary 100000 --steps 300

The task is synthetic. A sequence begins with a token that sets its topic; each token after it earns 1 if it is on
topic, otherwise 0. The log was written by a policy that is on topic three times out of ten, and has favourite words. A
GRU reads the tokens, and a linear head with one row per token gives the Q-values: Q is fitted to r + gamma V(s') with
the conservative term, logsumexp Q - Q[a], and V to an upper expectile of the target network's Q (Snell et al., 2023,
"Offline RL for Natural Language Generation with Implicit Language Q Learning", without its second Q). Then the greedy
tokens of the network are compared with those of the log.

Needs matplotlib and tqdm besides dqn_fused.
"""

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dqn_fused import fused_linear_td_loss

TOPICS = 32


@dataclass
class Args:
    vocabulary: int = 50_257
    features: int = 128
    length: int = 16
    batch_size: int = 16
    steps: int = 100
    learning_rate: float = 3e-3
    gamma: float = 0.8
    cql_alpha: float = 0.1
    expectile: float = 0.7
    tau: float = 0.05
    seed: int = 1
    plot: str = "token_q_learning.png"


class Log:
    """Sequences of tokens, each of one topic, and how they were rewarded."""

    def __init__(self, args: Args) -> None:
        self.args, self.generator = args, torch.Generator().manual_seed(args.seed)
        self.words = args.vocabulary // TOPICS  # of a topic; token = word * TOPICS + topic
        self.favour = 1 / torch.arange(1, self.words + 1) ** 1.5

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens, (B, T + 1), the first of them given, and rewards of those that follow, (B, T)."""
        B, T, g = self.args.batch_size, self.args.length, self.generator
        topic = torch.randint(TOPICS, (B, 1), generator=g)
        word = torch.multinomial(self.favour, B * (T + 1), replacement=True, generator=g).view(B, T + 1)
        on_topic = torch.rand(B, T + 1, generator=g) < 0.3
        on_topic[:, 0] = True
        strayed = torch.randint(TOPICS, (B, T + 1), generator=g)
        tokens = word * TOPICS + torch.where(on_topic, topic, strayed)
        return tokens, (tokens[:, 1:] % TOPICS == topic).float()


class Network(nn.Module):
    """A GRU over tokens, and on its states a Q-value for each token and the value of the state."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.embedding = nn.Embedding(args.vocabulary, args.features)
        self.body = nn.GRU(args.features, args.features, batch_first=True)
        self.head = nn.Linear(args.features, args.vocabulary)
        self.value = nn.Linear(args.features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def hidden(self, tokens: Tensor) -> Tensor:
        """States after each token, (B, T + 1, D)."""
        states: Tensor = self.body(self.embedding(tokens))[0]
        return states

    def greedy(self, tokens: Tensor) -> Tensor:
        """Next token of the largest Q-value, (B,)."""
        with torch.no_grad():
            best: Tensor = self.head(self.hidden(tokens)[:, -1]).argmax(1)
        return best


def eager_q_loss(head: nn.Linear, hidden: Tensor, actions: Tensor, target: Tensor, args: Args) -> Any:
    q = head(hidden)  # (B, T, vocabulary)
    taken = q.gather(2, actions.unsqueeze(2)).squeeze(2)
    conservative = q.logsumexp(2) - taken
    return F.mse_loss(taken, target) + args.cql_alpha * conservative.mean()


def fused_q_loss(head: nn.Linear, hidden: Tensor, actions: Tensor, target: Tensor, args: Args) -> Any:
    return fused_linear_td_loss(hidden, head.weight, actions, target, bias=head.bias, cql_alpha=args.cql_alpha)


def value_loss(value: Tensor, target: Network, hidden: Tensor, actions: Tensor, args: Args) -> Tensor:
    """Expectile regression to the target network's Q-values of the tokens that were written."""
    with torch.no_grad():
        taken = (hidden * target.head.weight[actions]).sum(-1) + target.head.bias[actions]
    difference = taken - value
    weight = torch.where(difference > 0, args.expectile, 1 - args.expectile)
    return (weight * difference.square()).mean()


class Run(NamedTuple):
    """Results of training with one of the losses."""

    losses: list[float]  # of Q
    milliseconds: float  # of one of them, the median, forward and backward
    peak_bytes: int  # held during one of them, gradients included
    mean_reward: float  # of the greedy tokens


def train(q_loss: Any, args: Args, name: str) -> Run:
    torch.manual_seed(args.seed)
    log, network = Log(args), Network(args)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    losses, seconds = [], []
    for _ in tqdm(range(args.steps), desc=name, leave=False):
        tokens, rewards = log.sample()
        actions, hidden = tokens[:, 1:], network.hidden(tokens)
        value = network.value(hidden).squeeze(2)
        with torch.no_grad():
            next_value = value[:, 1:].clone()
            next_value[:, -1] = 0  # the sequence ends
            y, of_target = rewards + args.gamma * next_value, target.hidden(tokens)[:, :-1]
        optimizer.zero_grad()
        state = hidden[:, :-1].detach().requires_grad_()
        start = time.perf_counter()
        loss = q_loss(network.head, state, actions, y, args)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        of_value = value_loss(value[:, :-1], target, of_target, actions, args)
        torch.autograd.backward([hidden[:, :-1], of_value], [state.grad, None])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), args.tau)
        losses.append(loss.item())
    optimizer.zero_grad()
    peak = peak_bytes(lambda: q_loss(network.head, state, actions, y, args).backward())
    return Run(losses, 1e3 * statistics.median(seconds), peak, mean_reward(network, args))


def mean_reward(network: Network, args: Args, sequences: int = 4) -> float:
    """Mean reward of the tokens that the network writes, over all topics."""
    topic = torch.arange(TOPICS).repeat(sequences)
    tokens, length = topic.unsqueeze(1), min(args.length, 8)
    for _ in range(length):
        tokens = torch.cat([tokens, network.greedy(tokens).unsqueeze(1)], 1)
    return (tokens[:, 1:] % TOPICS == topic.unsqueeze(1)).float().mean().item()


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


def plot(runs: dict[str, Run], logged: float, args: Args) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")  # without pyplot, so no display is needed
    curves, times, memory = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        curves.plot(range(1, args.steps + 1), run.losses, style, label=name, linewidth=2)
    reward = f"reward a token {runs['fused'].mean_reward:.2f}, in the log {logged:.2f}"
    curves.set(xlabel="update", ylabel="loss of Q", title=f"the same curve; {reward}")
    curves.legend(frameon=False)
    milliseconds = [run.milliseconds for run in runs.values()]
    megabytes = [run.peak_bytes / 1e6 for run in runs.values()]
    for axes, values, title in (
        (times, milliseconds, "ms a loss, with backward"),
        (memory, megabytes, "MB at the peak"),
    ):
        bars = axes.bar(list(runs), values, color=["tab:blue", "tab:orange"])
        axes.bar_label(bars, fmt="%.1f")
        axes.margins(y=0.1)
        axes.set_title(title)
    for axes in (curves, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    shape = f"{args.batch_size} x {args.length} tokens, {args.features} features, threads: {torch.get_num_threads()}"
    figure.suptitle(f"Q-learning over {args.vocabulary:,} tokens with the conservative term, {shape}")
    figure.savefig(args.plot, dpi=150)


def parse_args() -> Args:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in vars(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help="%(default)s")
    return Args(**vars(parser.parse_args()))


def main() -> None:
    args = parse_args()
    runs = {"fused": train(fused_q_loss, args, "fused"), "eager": train(eager_q_loss, args, "eager")}
    gradient = 4 * args.vocabulary * (args.features + 1) / 1e6
    logged = torch.stack([Log(args).sample()[1].mean() for _ in range(20)]).mean().item()
    print("| loss | ms a loss | MB at the peak | beside the gradient of the head | last losses | reward a token |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, run in runs.items():
        last, peak = sum(run.losses[-10:]) / len(run.losses[-10:]), run.peak_bytes / 1e6
        print(
            f"| {name} | {run.milliseconds:.1f} | {peak:.1f} | {peak - gradient:.1f} | {last:.5f} "
            f"| {run.mean_reward:.3f} |"
        )
    apart = max(abs(x - y) / abs(y) for x, y in zip(*(run.losses for run in runs.values()), strict=True))
    print(f"\nfurthest apart: {apart:.1e} of a loss; reward a token of the log: {logged:.3f}")
    plot(runs, logged, args)
    print(f"learning curves: {args.plot}")


if __name__ == "__main__":
    main()
