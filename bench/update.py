"""What the loss adds to a whole CartPole update: two 120-84 networks, batch 128, loss, backward, Adam."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.providers import GAMMA, eager_loss
from bench.timing import interleaved
from dqn_fused import fused_dqn_loss, fused_dqn_loss_and_grad
from examples.cartpole import QNetwork

N = 128


def run() -> None:
    torch.set_num_threads(1)  # the layers are too small to share out among threads
    q_network, target_network = QNetwork(4, 2), QNetwork(4, 2)
    optimizer = torch.optim.Adam(q_network.parameters())
    obs, next_obs, some_grad = torch.randn(N, 4), torch.randn(N, 4), torch.randn(N, 2)
    batch = torch.randint(2, (N,)), torch.randn(N)
    terminated = torch.rand(N) < 0.1

    def update(backward: Callable[[Tensor, Tensor], Any]) -> None:
        with torch.no_grad():
            next_q = target_network(next_obs)
        q = q_network(obs)
        optimizer.zero_grad()
        backward(q, next_q)
        optimizer.step()

    def with_grad(q: Tensor, next_q: Tensor) -> None:
        q.backward(fused_dqn_loss_and_grad(q, *batch, next_q, terminated, GAMMA)[1])

    ways: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "no loss": lambda q, next_q: q.backward(some_grad),
        "eager": lambda q, next_q: eager_loss(q, *batch, next_q, terminated).backward(),
        "fused_dqn_loss": lambda q, next_q: fused_dqn_loss(q, *batch, next_q, terminated, GAMMA).backward(),  # type: ignore[union-attr]
        "fused_dqn_loss_and_grad": with_grad,
    }
    times = interleaved({name: partial(update, way) for name, way in ways.items()}, seconds=5, rounds=100)
    us = {name: 1e6 * median(values) for name, values in times.items()}
    print("| update with | us | the loss adds | of what eager adds |\n|---|---:|---:|---:|")
    for name, value in us.items():
        adds = value - us["no loss"]
        share = adds / (us["eager"] - us["no loss"])
        print(f"| {name} | {value:.0f} | " + ("| |" if name == "no loss" else f"{adds:.0f} us | {share:.2f} |"))
