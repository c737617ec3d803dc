"""TorchRL's DQNLoss on precomputed Q-values: the value network is the identity, and the observation is the matrix.

There is no delayed copy of the network, which would compute the same; TorchRL has a little less to do without it.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.measure.variants import GAMMA, Arguments


def installed() -> bool:
    return find_spec("torchrl") is not None and find_spec("tensordict") is not None


def step(batch: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward and backward; returns (loss, dq)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what else could be installed
        from tensordict import TensorDict
        from torchrl.modules import QValueActor
        from torchrl.objectives import DQNLoss

        actor = QValueActor(nn.Identity(), in_keys=["observation"], action_space="categorical")
        loss = DQNLoss(actor, loss_function="l2", delay_value=False, action_space="categorical")
        loss.make_value_estimator(gamma=GAMMA)
    q, ends = batch["q"], batch["terminated"].unsqueeze(1)
    following = {
        "observation": batch["next_q"],
        "reward": batch["rewards"].unsqueeze(1),
        "done": ends,
        "terminated": ends,
    }
    samples = TensorDict({"observation": q, "action": batch["actions"], "next": following}, batch_size=[len(q)])

    def run() -> tuple[Tensor, Tensor]:
        value = loss(samples)["loss"]
        return value, torch.autograd.grad(value, q)[0]

    return run
