"""A batch whose hidden states do not fit: gradients accumulated over micro-batches are those of the whole batch.

    python examples/micro_batches.py --micro-batches 16
    python examples/micro_batches.py --micro-batches 16 --amp                # bfloat16 on a CPU, float16 on a GPU
    torchrun --nproc-per-node 2 examples/micro_batches.py --micro-batches 8  # DDP, one all-reduce a step

The mean over a batch is not the mean of the means of its parts, once they are unequal or weighted. So each part is a
sum, reduction="sum", and all are divided by one normaliser: the sum of the weights of the whole batch, on all ranks,
which is known before the first part runs. The transitions are synthetic. The parameters at the end are the same, to
rounding, whatever the number of micro-batches and of processes.
"""

import argparse
import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dqn_fused import fused_linear_dqn_loss

OBSERVATIONS, FEATURES, ACTIONS, GAMMA = 16, 64, 5_000, 0.99
Samples = dict[str, Tensor]


def joined_batch(size: int, step: int) -> Samples:
    """The batch of a step, the same in every process."""
    random = torch.Generator().manual_seed(step)
    return {
        "obs": torch.randn(size, OBSERVATIONS, generator=random),
        "next_obs": torch.randn(size, OBSERVATIONS, generator=random),
        "actions": torch.randint(ACTIONS, (size,), generator=random),
        "rewards": torch.randn(size, generator=random),
        "terminated": torch.rand(size, generator=random) < 0.1,
        "weights": torch.rand(size, generator=random),
    }


class QNetwork(nn.Module):
    """Layers below a linear head over many actions. Its forward is the sum of the losses of some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(OBSERVATIONS, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, ACTIONS)

    def forward(self, target: "QNetwork", data: Samples) -> Tensor:
        with torch.no_grad():
            next_hidden = target.body(data["next_obs"])
        loss = fused_linear_dqn_loss(
            self.body(data["obs"]), self.head.weight, data["actions"], data["rewards"],
            next_hidden, target.head.weight, data["terminated"], GAMMA,
            bias=self.head.bias, next_bias=target.head.bias, weights=data["weights"], reduction="sum",
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        return loss


def accumulate(
    model: nn.Module,
    target: QNetwork,
    data: Samples,
    parts: int,
    amp: torch.dtype | None = None,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Add the gradients of the weighted mean of a batch, part by part, to those of the model; return the mean."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    normaliser = data["weights"].sum()
    if ranks > 1:  # DDP averages the gradients of the ranks, and so divides by their number once more
        dist.all_reduce(normaliser)
        normaliser /= ranks
    pieces = {name: x.tensor_split(parts) for name, x in data.items()}
    mean = torch.zeros_like(normaliser)
    for i in range(parts):
        # Only the backward of the last part communicates: it sends the gradients of all parts.
        apart = model.no_sync() if isinstance(model, DistributedDataParallel) and i < parts - 1 else nullcontext()
        with apart:
            with torch.autocast(mean.device.type, dtype=amp, enabled=amp is not None):
                loss = model(target, {name: x[i] for name, x in pieces.items()}) / normaliser
            scale(loss).backward()
        mean += loss.detach()
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient accumulation over micro-batches, on synthetic transitions.")
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")
    parser.add_argument("--batch-size", type=int, default=4096, help="of all processes together (default: 4096)")
    parser.add_argument("--micro-batches", type=int, default=16, help="parts of a process's share (default: 16)")
    parser.add_argument("--amp", action="store_true", help="autocast: bfloat16 on a CPU, float16 on a GPU")
    parser.add_argument("--save", help="folder in which each rank leaves its weights")
    args = parser.parse_args()

    cuda, launched = torch.cuda.is_available(), "WORLD_SIZE" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if launched:  # by torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)

    torch.manual_seed(0)
    q_network = QNetwork().to(device)
    target_network = copy.deepcopy(q_network).requires_grad_(False)
    model = DistributedDataParallel(q_network) if launched else q_network
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.5)
    amp = (torch.float16 if cuda else torch.bfloat16) if args.amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)  # bfloat16 has the range of float32

    for step in range(args.steps):
        share = joined_batch(args.batch_size, step)
        data = {name: x.tensor_split(ranks)[rank].to(device) for name, x in share.items()}
        optimizer.zero_grad()
        loss = accumulate(model, target_network, data, args.micro_batches, amp, scaler.scale)
        scaler.step(optimizer)
        scaler.update()
        if rank == 0 and (step % 5 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.6f}" + (" of the share of rank 0" if ranks > 1 else ""))

    if args.save:
        weights = torch.cat([p.detach().flatten() for p in q_network.parameters()])
        torch.save(weights.cpu(), Path(args.save, f"{rank}.pt"))
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
