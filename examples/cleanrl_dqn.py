"""DQN in one file with CleanRL's arguments, on its own loss lines or on the fused loss.

    python examples/cleanrl_dqn.py                # fused
    python examples/cleanrl_dqn.py --loss eager   # the lines of CleanRL's dqn.py

Needs gymnasium beside dqn_fused.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqn_fused import fused_dqn_loss

Loss = Callable[[nn.Module, nn.Module, dict[str, Tensor], float], Tensor]


def eager_loss(q_network: nn.Module, target_network: nn.Module, data: dict[str, Tensor], gamma: float) -> Tensor:
    with torch.no_grad():
        target_max, _ = target_network(data["next_observations"]).max(dim=1)
        td_target = data["rewards"].flatten() + gamma * target_max * (1 - data["dones"].flatten())
    old_val = q_network(data["observations"]).gather(1, data["actions"]).squeeze()
    return F.mse_loss(td_target, old_val)


def fused_loss(q_network: nn.Module, target_network: nn.Module, data: dict[str, Tensor], gamma: float) -> Tensor:
    with torch.no_grad():
        next_q = target_network(data["next_observations"])
    q = q_network(data["observations"])
    return fused_dqn_loss(q, data["actions"], data["rewards"], next_q, data["dones"], gamma)  # type: ignore[return-value]


LOSSES: dict[str, Loss] = {"fused": fused_loss, "eager": eager_loss}


class QNetwork(nn.Sequential):
    def __init__(self, observations: int, actions: int) -> None:
        super().__init__(nn.Linear(observations, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, actions))


class ReplayBuffer:
    """Rows of (1,) and (D,), as Stable-Baselines3's buffer gives them to CleanRL."""

    def __init__(self, size: int, observations: int) -> None:
        self.size, self.count = size, 0
        self.data = {
            "observations": torch.zeros(size, observations),
            "next_observations": torch.zeros(size, observations),
            "actions": torch.zeros(size, 1, dtype=torch.int64),
            "rewards": torch.zeros(size, 1),
            "dones": torch.zeros(size, 1),
        }

    def add(self, **transition: Any) -> None:
        for name, value in transition.items():
            self.data[name][self.count % self.size] = torch.as_tensor(value)
        self.count += 1

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        rows = torch.randint(min(self.count, self.size), (batch_size,))
        return {name: column[rows] for name, column in self.data.items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="DQN with CleanRL's arguments.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--loss", choices=tuple(LOSSES), default="fused", help="whose lines")
    add("--env-id", default="CartPole-v1", help="with a Box of one dimension and Discrete actions")
    add("--seed", type=int, default=1, help="of everything random")
    add("--total-timesteps", type=int, default=50_000, help="environment steps")
    add("--learning-rate", type=float, default=2.5e-4, help="of Adam")
    add("--buffer-size", type=int, default=10_000, help="transitions kept for replay")
    add("--gamma", type=float, default=0.99, help="discount")
    add("--tau", type=float, default=1.0, help="of the target network's update")
    add("--target-network-frequency", type=int, default=500, help="steps between them")
    add("--batch-size", type=int, default=128, help="transitions a gradient step")
    add("--start-e", type=float, default=1.0, help="epsilon at the start")
    add("--end-e", type=float, default=0.05, help="epsilon at the end")
    add("--exploration-fraction", type=float, default=0.5, help="of all steps, to reach it")
    add("--learning-starts", type=int, default=10_000, help="environment steps before the first gradient step")
    add("--train-frequency", type=int, default=10, help="steps a gradient step")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, report: Callable[[str], object] = print) -> list[float]:
    """Train; return the loss of every gradient step."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))
    assert isinstance(env.action_space, gym.spaces.Discrete)
    assert env.observation_space.shape is not None
    size, actions = env.observation_space.shape[0], int(env.action_space.n)
    q_network, target_network = QNetwork(size, actions), QNetwork(size, actions)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate)
    buffer = ReplayBuffer(args.buffer_size, size)
    losses: list[float] = []

    obs, _ = env.reset(seed=args.seed)
    for step in range(args.total_timesteps):
        share = min(step / (args.exploration_fraction * args.total_timesteps), 1.0)
        if random.random() < args.start_e + share * (args.end_e - args.start_e):
            action = random.randrange(actions)
        else:
            with torch.inference_mode():
                action = int(q_network(torch.as_tensor(obs)).argmax())
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(
            observations=obs, next_observations=next_obs, actions=action, rewards=float(reward), dones=terminated
        )
        obs = next_obs
        if terminated or truncated:
            if losses and step % 10 == 0:
                report(f"step {step}: episodic return {float(info['episode']['r']):.0f}, loss {losses[-1]:.3g}")
            obs, _ = env.reset()

        if step > args.learning_starts:
            if step % args.train_frequency == 0:
                loss = LOSSES[args.loss](q_network, target_network, buffer.sample(args.batch_size), args.gamma)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if step % args.target_network_frequency == 0:
                with torch.no_grad():
                    for slow, fast in zip(target_network.parameters(), q_network.parameters(), strict=True):
                        slow.lerp_(fast, args.tau)
    env.close()
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)  # the layers are too small to share out among threads
    train(parse_args())
