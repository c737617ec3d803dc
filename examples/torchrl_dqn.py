"""TorchRL's DQNLoss on the fused loss: the same module to build, to configure and to call.

    python examples/torchrl_dqn.py               # losses of both on synthetic transitions
    python examples/torchrl_dqn.py --double

``FusedDQN`` keeps DQNLoss's constructor, tensordict keys, target parameters, importance weights and the ``td_error``
that a prioritised buffer reads. It has the one-step target (TD0, also with ``steps_to_next_obs``); other value
estimators, averaged rewards and loss masks it refuses. Needs torchrl beside dqn_fused.
"""

import argparse
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.envs.utils import step_mdp
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate
from torchrl.objectives.value import TD0Estimator

from dqn_fused import fused_dqn_loss

LOSSES: dict[str, dict[str, Any]] = {
    "l2": {"loss": "mse"},
    "smooth_l1": {"loss": "smooth_l1"},
    "l1": {"loss": "smooth_l1", "delta": 0.0},
}


class FusedDQN(DQNLoss):
    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        self._refuse_what_it_cannot(tensordict)
        keys, estimator = self.tensor_keys, self.value_estimator
        q = self._q(tensordict, self.value_network_params)
        next_state = step_mdp(tensordict, keep_other=False)
        with torch.no_grad():
            next_q = self._q(next_state, self.target_value_network_params)
            next_q_online = self._q(next_state, self.value_network_params.data) if self.double_dqn else None
        action = tensordict.get(keys.action)
        if self.action_space != "categorical":  # one-hot
            action = action.long().argmax(-1)
        gamma: Tensor = estimator.gamma.to(q.device)
        steps = tensordict.get(estimator.tensor_keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma**steps
        done = tensordict.get(("next", keys.done))
        weights = None
        if self.use_prioritized_weights in (True, "auto"):
            weights = tensordict.get(keys.priority_weight, None)
        reduction = self.reduction if weights is None or self.reduction != "mean" else "weighted_mean"
        loss, td_error = fused_dqn_loss(
            q, action, tensordict.get(("next", keys.reward)), next_q,
            tensordict.get(("next", keys.terminated), default=done), gamma,
            next_q_online=next_q_online, weights=weights, reduction=reduction, return_td_error=True,
            **LOSSES[self.loss_function],
        )  # fmt: skip
        tensordict.set(keys.priority, td_error.square().unsqueeze(-1), inplace=True)
        return TensorDict(loss=loss)

    def _q(self, tensordict: TensorDictBase, parameters: Any) -> Tensor:
        """Q-values of the value network with other parameters, (*N, A)."""
        tensordict = tensordict.clone(False)
        with parameters.to_module(self.value_network, preserve_module_state=False):
            values: Tensor = self.value_network(tensordict).get(self.tensor_keys.action_value)
        return values

    def _refuse_what_it_cannot(self, tensordict: TensorDictBase) -> None:
        estimator = self.value_estimator
        if not isinstance(estimator, TD0Estimator) or estimator.average_rewards:
            raise NotImplementedError(f"value estimator: expected TD0 without average_rewards, got {estimator}")
        if self.loss_function not in LOSSES:
            raise NotImplementedError(f"loss_function: expected one of {list(LOSSES)}, got {self.loss_function!r}")
        if self.action_space not in ("categorical", "one-hot", "one_hot"):
            raise NotImplementedError(f"action_space: expected categorical or one-hot, got {self.action_space!r}")
        masks = [key for key in self._loss_mask_keys() if tensordict.get(key, None) is not None]
        if masks:
            raise NotImplementedError(f"loss mask: expected none, got {masks}; drop the masked rows instead")


def value_network(observations: int, actions: int) -> QValueActor:
    layers = nn.Sequential(nn.Linear(observations, 64), nn.ReLU(), nn.Linear(64, actions))
    module = TensorDictModule(layers, in_keys=["observation"], out_keys=["action_value"])
    return QValueActor(module, in_keys=["observation"], action_space="categorical")


def transitions(n: int, observations: int, actions: int) -> TensorDict:
    """Random ones, as a replay buffer would give them."""
    return TensorDict(
        {
            "observation": torch.randn(n, observations),
            "action": torch.randint(actions, (n,)),
            "next": {
                "observation": torch.randn(n, observations),
                "reward": torch.randn(n, 1),
                "terminated": torch.rand(n, 1) < 0.1,
                "done": torch.rand(n, 1) < 0.2,
            },
        },
        [n],
    )


def train(loss_module: DQNLoss, steps: int, batch_size: int = 32) -> list[float]:
    """Losses of some updates on a small buffer, from PyTorch's random numbers."""
    buffer = transitions(1_000, 4, 2)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-3)
    updater = SoftUpdate(loss_module, eps=0.99)
    losses = []
    for _ in range(steps):
        batch = buffer[torch.randint(len(buffer), (batch_size,))]
        loss = loss_module(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updater.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of TorchRL's DQNLoss and of the fused one from the same seed.")
    parser.add_argument("--double", action="store_true", help="double DQN")
    parser.add_argument("--steps", type=int, default=100, help="updates (default: 100)")
    args = parser.parse_args()
    for kind in (DQNLoss, FusedDQN):
        torch.manual_seed(1)
        module = kind(value_network(4, 2), delay_value=True, double_dqn=args.double, action_space="categorical")
        losses = train(module, args.steps)
        print(f"{kind.__name__}: loss {losses[0]:.6f} at first, {losses[-1]:.6f} after {args.steps} updates")


if __name__ == "__main__":
    main()
