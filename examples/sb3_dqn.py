"""Stable-Baselines3's DQN on the fused loss, with double DQN, which it has not.

    python examples/sb3_dqn.py                   # CartPole-v1
    python examples/sb3_dqn.py --double --steps 20000

``FusedDQN`` takes the place of ``DQN``: its arguments, its buffers, its callbacks and its files. Needs
stable-baselines3 beside dqn_fused.
"""

import argparse
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

from dqn_fused import fused_dqn_loss


class FusedDQN(DQN):
    """DQN whose loss is one call; ``double=True`` lets the online network choose the next action."""

    def __init__(self, *args: Any, double: bool = False, **kwargs: Any) -> None:
        self.double = double
        super().__init__(*args, **kwargs)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                next_q = self.q_net_target(batch.next_observations)
                next_q_online = self.q_net(batch.next_observations) if self.double else None
            loss = fused_dqn_loss(
                self.q_net(batch.observations),
                batch.actions,
                batch.rewards,
                next_q,
                batch.dones,
                # gamma to the power of the steps, of a buffer of n-step returns
                self.gamma if batch.discounts is None else batch.discounts,
                next_q_online=next_q_online,
                loss="smooth_l1",
            )
            assert isinstance(loss, torch.Tensor)
            losses.append(loss.item())
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Stable-Baselines3's DQN on CartPole-v1 with the fused loss.")
    parser.add_argument("--double", action="store_true", help="double DQN")
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps (default: 50000)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to share out among threads
    model = FusedDQN(
        "MlpPolicy", "CartPole-v1", double=args.double, seed=args.seed, learning_rate=2.3e-3, batch_size=64,
        buffer_size=100_000, learning_starts=1_000, train_freq=256, gradient_steps=128, target_update_interval=10,
        exploration_fraction=0.16, exploration_final_eps=0.04, policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    model.learn(args.steps, progress_bar=False)
    mean, deviation = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean return of 20 episodes: {mean:.1f} (standard deviation {deviation:.1f})")


if __name__ == "__main__":
    main()
