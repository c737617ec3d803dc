"""Data-parallel DQN: each process has its share of the batch, and DistributedDataParallel averages the gradients.

    torchrun --nproc-per-node 2 examples/ddp.py             # gloo on CPUs, nccl on GPUs
    torchrun --nproc-per-node 2 examples/ddp.py --weighted  # unequal shares and importance weights

The transitions are synthetic. The weights at the end are the same whatever the number of processes, to rounding.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dqn_fused import fused_dqn_loss

OBSERVATIONS, ACTIONS, GAMMA = 8, 6, 0.99


def joined_batch(size: int, step: int) -> dict[str, Tensor]:
    """The batch of a step, the same in every process, which takes its share of it."""
    random = torch.Generator().manual_seed(step)
    return {
        "obs": torch.randn(size, OBSERVATIONS, generator=random),
        "next_obs": torch.randn(size, OBSERVATIONS, generator=random),
        "actions": torch.randint(ACTIONS, (size,), generator=random),
        "rewards": torch.randn(size, generator=random),
        "terminated": torch.rand(size, generator=random) < 0.1,
        "weights": torch.rand(size, generator=random),
    }


def share(size: int, rank: int, ranks: int, equal: bool) -> slice:
    """Rows of a rank: the same number on each, or more on each than on the one before."""
    if equal:
        if size % ranks:
            raise ValueError(f"--batch-size: expected a multiple of {ranks}, the number of processes, got {size}")
        return slice(rank * size // ranks, (rank + 1) * size // ranks)
    parts = ranks * (ranks + 1) // 2
    return slice(rank * (rank + 1) // 2 * size // parts, (rank + 1) * (rank + 2) // 2 * size // parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Data-parallel DQN on synthetic transitions; start it with torchrun.")
    parser.add_argument("--steps", type=int, default=100, help="(default: 100)")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together (default: 256)")
    parser.add_argument("--weighted", action="store_true", help="importance weights, and unequal shares of the batch")
    parser.add_argument("--save", help="folder in which each rank leaves its weights")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(OBSERVATIONS, 64), nn.ReLU(), nn.Linear(64, ACTIONS)).to(device)
    target_network = copy.deepcopy(layers)
    q_network = DistributedDataParallel(layers)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.05)

    for step in range(args.steps):
        whole = joined_batch(args.batch_size, step)
        mine = share(args.batch_size, rank, ranks, equal=not args.weighted)
        data = {name: x[mine].to(device) for name, x in whole.items()}
        with torch.no_grad():
            next_q = target_network(data["next_obs"])
        loss = fused_dqn_loss(
            q_network(data["obs"]), data["actions"], data["rewards"], next_q, data["terminated"], GAMMA,
            weights=data["weights"] if args.weighted else None,
            # Of equal shares the mean of the means is the mean. Of others it is not: the weights are summed over ranks.
            reduction="weighted_mean" if args.weighted else "mean",
            process_group=dist.group.WORLD if args.weighted else None,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.6f} of the share of rank 0")

    # The last collective must not be one of the script's own tensors, such as the mean of the losses. It returns before
    # a thread of gloo has released them, and that aborts a process that is exiting.
    if args.save:
        weights = torch.cat([p.detach().flatten() for p in layers.parameters()])
        torch.save(weights.cpu(), Path(args.save, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
