"""DQN on CartPole-v1 in one file, trained with the fused loss.

    python examples/cartpole.py                        # fused loss, seed 1, learning curve in cartpole.png
    python examples/cartpole.py --loss eager --seed 7  # the same agent on the plain PyTorch loss
    python examples/cartpole.py --quantiles 50         # QR-DQN: the return's quantiles instead of its mean
    python examples/cartpole.py --atoms 51             # C51: its distribution on 51 atoms
    python examples/cartpole.py --compile              # networks and loss in one graph of torch.compile
    python examples/cartpole.py --cuda-graph           # on a GPU, with the whole update captured and replayed

Needs gymnasium, matplotlib, numpy and tqdm beside dqn_fused.
"""

import argparse
import copy
import random
import time
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from dqn_fused import fused_categorical_loss, fused_dqn_loss, fused_quantile_loss
from dqn_fused.categorical_reference import categorical_loss
from dqn_fused.quantile_reference import quantile_loss
from dqn_fused.reference import dqn_loss

LOSSES: dict[str, Any] = {"fused": fused_dqn_loss, "eager": dqn_loss}
QUANTILE_LOSSES: dict[str, Any] = {"fused": fused_quantile_loss, "eager": quantile_loss}
CATEGORICAL_LOSSES: dict[str, Any] = {"fused": fused_categorical_loss, "eager": categorical_loss}
GOAL = 475.0  # the mean return at which CartPole-v1 counts as solved; an episode yields 500 at most
# First seeds of two sets of evaluation episodes, disjoint so that no episode that helped to choose
# the checkpoint also grades it.
SELECTION_SEEDS, FINAL_SEEDS = 1_000_000, 2_000_000


def option(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": f"{text} (default: {default})", **kwargs})


@dataclass
class Args:
    seed: int = option(1, "seeds the environment, the networks, the replay and the exploration")
    total_steps: int = option(80_000, "environment steps at most")
    loss: str = option("fused", "implementation of the loss", choices=tuple(LOSSES))
    quantiles: int = option(0, "of the return of each action, for QR-DQN; 0 for DQN")
    atoms: int = option(0, "that the return of each action is distributed on, for C51; 0 for DQN")
    plot: str = option("cartpole.png", "where to save the learning curve")
    quiet: bool = option(False, "hide the progress bar")
    compile: bool = option(False, "compile the online network and the loss, fullgraph=True")
    cuda_graph: bool = option(False, "capture the whole update in a CUDA graph; implies --device cuda")
    device: str = option("cpu", "where networks and replay live")
    eval_episodes: int = option(100, "episodes of the final evaluation")
    learning_rate: float = option(2.3e-3, "of Adam at the start; falls linearly to a twentieth")
    gamma: float = option(0.99, "discount factor")
    batch_size: int = option(128, "transitions per gradient step")
    buffer_size: int = option(50_000, "transitions kept for replay")
    learning_starts: int = option(1_000, "environment steps before the first gradient step")
    train_every: int = option(2, "environment steps per gradient step")
    tau: float = option(0.01, "share of the way the target network moves to the online one at each gradient step")
    exploration_steps: int = option(10_000, "environment steps over which epsilon falls from 1")
    final_epsilon: float = option(0.05, "epsilon from then on")
    check_every: int = option(2_000, "environment steps between evaluations during training")
    check_episodes: int = option(20, "greedy episodes of each of them")
    check_goal: float = option(490.0, "training stops after three of them in a row with this mean return")


class QNetwork(nn.Sequential):
    """Q-values (*N, A), or of each action's return quantiles or the logits of its atoms, (*N, A, K)."""

    def __init__(self, obs_dim: int, n_actions: int, quantiles: int = 0, atoms: int = 0) -> None:
        K = max(quantiles, atoms)
        head = [nn.Linear(84, n_actions * max(K, 1))]
        super().__init__(nn.Linear(obs_dim, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), *head)
        self.quantiles, self.atoms = quantiles, atoms
        if K:
            self.append(nn.Unflatten(-1, (n_actions, K)))

    @torch.inference_mode()
    def greedy(self, obs: np.ndarray) -> int:
        q = self(torch.from_numpy(obs).to(next(self.parameters()).device))
        if self.quantiles:
            q = q.mean(-1)
        if self.atoms:  # the largest expectation, whatever the ends of the support
            q = (q.softmax(-1) * torch.linspace(0, 1, self.atoms, device=q.device)).sum(-1)
        return int(q.argmax())


class Batch(NamedTuple):
    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminated: Tensor


class ReplayBuffer:
    """A ring of transitions in preallocated tensors."""

    def __init__(self, capacity: int, obs_dim: int, device: str) -> None:
        self.capacity, self.size, self.head, self.device = capacity, 0, 0, device
        self.data = Batch(
            obs=torch.zeros(capacity, obs_dim, device=device),
            actions=torch.zeros(capacity, dtype=torch.int64, device=device),
            rewards=torch.zeros(capacity, device=device),
            next_obs=torch.zeros(capacity, obs_dim, device=device),
            terminated=torch.zeros(capacity, dtype=torch.bool, device=device),
        )

    def add(self, obs: np.ndarray, action: int, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        row = (obs, action, reward, next_obs, terminated)
        for column, value in zip(self.data, row, strict=True):
            column[self.head] = torch.as_tensor(value)
        self.head = (self.head + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        rows = torch.randint(self.size, (batch_size,), device=self.device)
        return Batch(*(column[rows] for column in self.data))


class Update:
    """A gradient step on a batch and the move of the target network towards the online one."""

    def __init__(self, args: Args, q_network: QNetwork, target_network: QNetwork) -> None:
        self.q_network, self.target_network, self.tau = q_network, target_network, args.tau
        # A captured step reads the learning rate from memory, where it can be changed between two replays.
        rate = torch.tensor(args.learning_rate, device=args.device) if args.cuda_graph else args.learning_rate
        self.optimizer = torch.optim.Adam(q_network.parameters(), lr=rate, fused=True, capturable=args.cuda_graph)
        loss_fn, gamma = (QUANTILE_LOSSES if args.quantiles else LOSSES)[args.loss], args.gamma
        if args.atoms:  # a reward of one at each step: no return is larger than their discounted sum
            loss_fn = partial(CATEGORICAL_LOSSES[args.loss], support=(0.0, 1 / (1 - gamma)))

        def loss(batch: Batch, next_q: Tensor) -> Tensor:
            q = q_network(batch.obs)
            value: Tensor = loss_fn(q, batch.actions, batch.rewards, next_q, batch.terminated, gamma)
            return value

        self.loss = torch.compile(loss, fullgraph=True) if args.compile else loss

    def set_learning_rate(self, rate: float) -> None:
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def __call__(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            next_q = self.target_network(batch.next_obs)
        loss = self.loss(batch, next_q)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target_network.parameters(), self.q_network.parameters(), strict=True):
                slow.lerp_(fast, self.tau)
        return loss.detach()


class GraphedUpdate:
    """An update captured in a CUDA graph, as in LeanRL: some calls run as they are, and from then on it is replayed.

    The graph reads the batch from where the first one lay, and leaves its loss where the next call overwrites it.
    """

    WARM_UP = 3

    def __init__(self, update: Update) -> None:
        self.update, self.calls = update, 0
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.batch: Batch | None = None
        self.loss = torch.empty(0)

    def __call__(self, batch: Batch) -> Tensor:
        if self.batch is None:
            self.batch = Batch(*(x.clone() for x in batch))
        for static, fresh in zip(self.batch, batch, strict=True):
            static.copy_(fresh)
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.loss = self.update(self.batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.loss
        if self.calls == self.WARM_UP + 1:
            with torch.cuda.graph(self.graph):  # which records and does not run
                self.loss = self.update(self.batch)
        self.graph.replay()
        return self.loss


class Run(NamedTuple):
    args: Args
    q_network: QNetwork  # holds the best checkpoint
    target_network: QNetwork  # as training left it
    buffer: ReplayBuffer
    episodes: list[tuple[int, float]]  # (env step at the end, return), while exploring
    evaluations: list[tuple[int, float]]  # (env step, mean return), greedy
    best_step: int
    steps: int
    seconds: float  # of training, evaluations during it included
    final_returns: list[float]  # of the best checkpoint, in episodes nothing was selected by


def evaluate(q_network: QNetwork, episodes: int, first_seed: int) -> list[float]:
    """Returns of greedy episodes, each from a seed of its own and in an environment apart from training."""
    env = gym.make("CartPole-v1")
    returns = []
    for seed in range(first_seed, first_seed + episodes):
        obs, _ = env.reset(seed=seed)
        episode_return, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(q_network.greedy(obs))
            episode_return += float(reward)
            done = terminated or truncated
        returns.append(episode_return)
    env.close()
    return returns


def train(args: Args) -> Run:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    env = gym.make("CartPole-v1")
    obs_dim, n_actions = env.observation_space.shape[0], int(env.action_space.n)
    q_network = QNetwork(obs_dim, n_actions, args.quantiles, args.atoms).to(args.device)
    target_network = copy.deepcopy(q_network)
    plain_update = Update(args, q_network, target_network)
    update = GraphedUpdate(plain_update) if args.cuda_graph else plain_update
    buffer = ReplayBuffer(args.buffer_size, obs_dim, args.device)

    episodes: list[tuple[int, float]] = []
    evaluations: list[tuple[int, float]] = []
    best_step, best_mean, best_weights = 0, 0.0, q_network.state_dict()
    episode_return, loss = 0.0, torch.tensor(float("nan"))

    started = time.perf_counter()
    obs, _ = env.reset(seed=args.seed)
    progress = tqdm(range(1, args.total_steps + 1), disable=args.quiet, unit="step", mininterval=0.5)
    for step in progress:
        epsilon = max(args.final_epsilon, 1 - (1 - args.final_epsilon) * step / args.exploration_steps)
        action = random.randrange(n_actions) if random.random() < epsilon else q_network.greedy(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # Running out of time is no property of the state: only a fall cuts the bootstrap off, so
        # `truncated` is not stored, and next_obs is the observation before the reset.
        buffer.add(obs, action, float(reward), next_obs, terminated)
        obs = next_obs
        episode_return += float(reward)
        if terminated or truncated:
            episodes.append((step, episode_return))
            episode_return = 0.0
            obs, _ = env.reset()
            recent = fmean(r for _, r in episodes[-10:])
            progress.set_postfix_str(f"return {recent:.0f}, epsilon {epsilon:.2f}, loss {loss:.3g}", refresh=False)

        if step >= args.learning_starts and step % args.train_every == 0:
            # A falling rate keeps the policy from being unlearnt once it balances.
            plain_update.set_learning_rate(args.learning_rate * max(0.05, 1 - step / args.total_steps))
            loss = update(buffer.sample(args.batch_size))

        if step % args.check_every == 0 or step == args.total_steps:
            mean = fmean(evaluate(q_network, args.check_episodes, SELECTION_SEEDS))
            evaluations.append((step, mean))
            if mean >= best_mean:  # of equals the latest, which has learnt from more
                best_step, best_mean, best_weights = step, mean, copy.deepcopy(q_network.state_dict())
            # One perfect evaluation is often luck followed by a relapse; three in a row rarely are.
            if len(evaluations) >= 3 and min(m for _, m in evaluations[-3:]) >= args.check_goal:
                break
    progress.close()
    env.close()
    seconds = time.perf_counter() - started

    q_network.load_state_dict(best_weights)
    final_returns = evaluate(q_network, args.eval_episodes, FINAL_SEEDS)
    return Run(args, q_network, target_network, buffer, episodes, evaluations, best_step, step, seconds, final_returns)


def plot(run: Run, path: str) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # without pyplot, so no display is needed
    axes = figure.add_subplot()
    axes.axhline(GOAL, color="0.35", linestyle="--", linewidth=1, label=f"goal: {GOAL:.0f}")
    if run.episodes:
        steps, returns = zip(*run.episodes, strict=True)
        running = [fmean(returns[max(0, i - 9) : i + 1]) for i in range(len(returns))]
        axes.plot(steps, returns, color="tab:blue", alpha=0.25, linewidth=0.8, label="training episode")
        axes.plot(steps, running, color="tab:blue", linewidth=1.8, label="mean of the last 10")
    steps, means = zip(*run.evaluations, strict=True)
    label = f"greedy evaluation, mean of {run.args.check_episodes} episodes"
    axes.plot(steps, means, "o", color="tab:orange", markersize=5, label=label)
    axes.set(xlabel="environment steps", ylabel="episode return", xlim=(0, None), ylim=(0, 520))
    final = f"final mean return {fmean(run.final_returns):.1f}"
    name = "QR-DQN" if run.args.quantiles else "C51" if run.args.atoms else "DQN"
    axes.set_title(f"{name} on CartPole-v1, {run.args.loss} loss, seed {run.args.seed}: {final}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def report(run: Run) -> None:
    print(f"trained with the {run.args.loss} loss, seed {run.args.seed}: {run.steps} steps in {run.seconds:.0f} s")
    which = "last" if run.best_step == run.steps else f"best of {len(run.evaluations)}, not the last"
    print(f"evaluated: the checkpoint of step {run.best_step} ({which}), greedily, in episodes not used to choose it")
    mean = fmean(run.final_returns)
    verdict = "solved" if mean >= GOAL else "NOT solved"
    print(
        f"{verdict}: mean return {mean:.1f} over the last {len(run.final_returns)} evaluation episodes "
        f"(goal {GOAL:.0f})"
    )


def parse_args() -> Args:
    parser = argparse.ArgumentParser(description="Train a DQN agent on CartPole-v1 with the fused loss.")
    for f in fields(Args):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "default": f.default}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, **f.metadata)
    args = Args(**vars(parser.parse_args()))
    if min(args.quantiles, args.atoms) < 0 or args.atoms == 1 or (args.quantiles and args.atoms):
        parser.error("--quantiles or --atoms, not both: at least 0, and not one atom")
    if min(args.total_steps, args.eval_episodes, args.check_episodes) < 1:
        parser.error("--total-steps, --eval-episodes and --check-episodes must be at least 1")
    if args.cuda_graph:
        args.device = "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--cuda-graph and --device cuda need a CUDA device, and there is none")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the layers are too small to share out among threads
    run = train(args)
    report(run)
    plot(run, args.plot)
    print(f"learning curve: {args.plot}")


if __name__ == "__main__":
    main()
