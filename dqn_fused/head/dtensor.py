"""Layers that are DTensors: the rows of this rank, and the group of their mesh."""

import sys
from typing import Any

import torch.distributed as dist

from dqn_fused.head.arguments import Head

LAYERS = ("weight", "bias", "next_weight", "next_bias")


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor. There is none unless torch.distributed.tensor has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def has_dtensor(head: Head) -> bool:
    """Whether a layer is a DTensor."""
    return "torch.distributed.tensor" in sys.modules and any(is_dtensor(getattr(head, name)) for name in LAYERS)


def local_layers(head: Head, group: "dist.ProcessGroup | None") -> "tuple[Head, dist.ProcessGroup | None]":
    """The head with the rows of this rank, whose gradients become DTensors again, and the group that holds all rows."""
    given: dict[str, Any] = {name: x for name in LAYERS if (x := getattr(head, name)) is not None}
    if not any(map(is_dtensor, given.values())):
        return head, group
    first = next(name for name, x in given.items() if is_dtensor(x))
    mesh = given[first].device_mesh
    for name, x in given.items():
        if not is_dtensor(x):
            raise ValueError(
                f"{name}: expected a DTensor, as {first}, got {type(x).__name__}; write "
                f"DTensor.from_local({name}, mesh, [Shard(0)]) of the rows of this rank"
            )
        check_placement(name, x)
        if x.device_mesh != mesh:
            raise ValueError(f"{name}: expected the mesh of {first}, {mesh}, got {x.device_mesh}")
    own = mesh.get_group()
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
        raise ValueError(f"tensor_parallel_group: expected None, or the group of the mesh of {first}")
    return head._replace(**{name: x.to_local() for name, x in given.items()}), own


def check_placement(name: str, x: Any) -> None:
    """Check that a layer is sharded by rows, on a mesh of one dimension."""
    from torch.distributed.tensor import Shard

    if x.device_mesh.ndim != 1:
        raise ValueError(
            f"{name}: expected a DTensor on a mesh of one dimension, whose ranks share its rows, got "
            f"{x.device_mesh}; write mesh['name of that dimension'] where it is distributed"
        )
    if tuple(x.placements) != (Shard(0),):
        raise ValueError(
            f"{name}: expected placements (Shard(dim=0),), its rows shared out, got {tuple(x.placements)}; write "
            f"{name}.redistribute(placements=[Shard(0)]), or {name}.full_tensor() for a head that is not sharded"
        )


def refuse_dtensors(*arguments: tuple[Any, ...]) -> None:
    """Refuse DTensors among arguments that are the same on every rank, or hold the columns of this rank."""
    for found in arguments:
        for name, x in found._asdict().items():  # type: ignore[attr-defined]
            if is_dtensor(x):
                raise TypeError(
                    f"{name}: expected an ordinary tensor beside a sharded weight, got a DTensor; write "
                    f"{name}.to_local()"
                )
