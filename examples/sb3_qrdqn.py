"""QRDQN of Stable-Baselines3-contrib on the fused quantile loss, with double DQN, which it has not.

    python examples/sb3_qrdqn.py                   # CartPole-v1
    python examples/sb3_qrdqn.py --double --steps 20000

``FusedQRDQN`` takes the place of ``QRDQN``: its arguments, its buffers, its callbacks and its files. Needs
stable-baselines3 and sb3-contrib beside dqn_fused.
"""

import argparse
from typing import Any

import numpy as np
import torch
from sb3_contrib import QRDQN
from stable_baselines3.common.evaluation import evaluate_policy

from dqn_fused import fused_quantile_loss


class FusedQRDQN(QRDQN):
    """QRDQN whose loss is one call; ``double=True`` lets the online network choose the next action."""

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
            # The networks have the actions last, (batch, quantiles, actions): the loss reads a transposed view.
            with torch.no_grad():
                next_quantiles = self.quantile_net_target(batch.next_observations).mT
                next_quantiles_online = self.quantile_net(batch.next_observations).mT if self.double else None
            loss = fused_quantile_loss(
                self.quantile_net(batch.observations).mT,
                batch.actions,
                batch.rewards,
                next_quantiles,
                batch.dones,
                # gamma to the power of the steps, of a buffer of n-step returns
                self.gamma if batch.discounts is None else batch.discounts,
                next_quantiles_online=next_quantiles_online,
            )
            assert isinstance(loss, torch.Tensor)
            losses.append(loss.item())
            self.policy.optimizer.zero_grad()
            loss.backward()
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train QRDQN of sb3-contrib on CartPole-v1 with the fused loss.")
    parser.add_argument("--double", action="store_true", help="double DQN")
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps (default: 50000)")
    parser.add_argument("--quantiles", type=int, default=25, help="of each action's return (default: 25)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to share out among threads
    model = FusedQRDQN(
        "MlpPolicy", "CartPole-v1", double=args.double, seed=args.seed, learning_rate=2.3e-3, batch_size=64,
        buffer_size=100_000, learning_starts=1_000, train_freq=256, gradient_steps=128, target_update_interval=10,
        exploration_fraction=0.16, exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256], "n_quantiles": args.quantiles},
    )  # fmt: skip
    model.learn(args.steps, progress_bar=False)
    mean, deviation = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean return of 20 episodes: {mean:.1f} (standard deviation {deviation:.1f})")


if __name__ == "__main__":
    main()
