"""What each process of tests/test_ranks.py runs: losses of a sharded head, whose results on its rank it saves."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_linear import OPTIONS, Arguments, compact, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from dqn_fused import FusedLinearDQNLoss, Soft, fused_linear_dqn_loss, fused_linear_td_loss

A, N = 41, 9
# Rows of each rank, by the number of ranks.
SIZES = {2: [17, 24], 4: [5, 0, 20, 16]}
LEARNED = ("hidden", "weight", "bias")
ROWS = ("weight", "bias", "next_weight", "next_bias")
COLUMNS = ("next_action_mask", "action_mask")


def integers(arguments: Arguments) -> Arguments:
    """Arguments that are small integers, whose Q-values are exact in any order of the sums."""
    named = ("hidden", "weight", "bias", "next_hidden", "next_weight", "next_bias")
    return arguments | {k: arguments[k].mul(2).round() for k in named}


def equal_actions(places: list[int]) -> Callable[[], Arguments]:
    """Rows of the online weight that are all the same, and a bias that is large for some."""

    def case() -> Arguments:
        arguments = integers(make((N, 4)))
        bias = torch.full((A,), -64.0)
        bias[places] = 64.0
        return arguments | {
            "weight": arguments["weight"][:1].repeat(A, 1),
            "bias": bias,
            "next_hidden_online": arguments["next_hidden"],
        }

    return case


def of(name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (N, 4), **more: Any) -> Arguments:
    arguments = make(shape, A, dtype)
    if dtype.itemsize == 2:
        arguments = integers(arguments)
    return arguments | OPTIONS[name](arguments) | more


def nowhere_legal() -> Arguments:
    """Row 1 has no legal action, row 2 only one of the last rank, row 3 a NaN."""
    arguments = of("soft-mask", terminated=torch.zeros(N, dtype=torch.bool))
    arguments["next_action_mask"][1:3] = False
    arguments["next_action_mask"][2, -1] = True
    arguments["next_hidden"][3] = torch.nan
    return arguments


def one_nan() -> Arguments:
    """One Q-value of the last action is NaN, and so is the gradient of its sample on every rank."""
    arguments = of("cql", reduction="none", terminated=torch.ones(N, dtype=torch.bool))
    arguments["bias"] = arguments["bias"].clone()
    arguments["bias"][-1] = torch.nan
    return arguments | {"action_mask": (torch.arange(N) == 2).unsqueeze(1) | (torch.arange(A) < A - 1)}


CASES: dict[str, Callable[[], Arguments]] = {
    **{name: lambda name=name: of(name) for name in OPTIONS},  # type: ignore[misc]
    **{
        f"{name}-f64": lambda name=name: of(name, torch.float64)
        for name in ("double", "soft-mask", "cql-munchausen-sum")
    },  # type: ignore[misc]
    "cql-bf16": lambda: of("cql", torch.bfloat16),
    "cql-double-bf16": lambda: of("cql-double-mask-weights-smooth_l1", torch.bfloat16),
    "double-bf16": lambda: of("double", torch.bfloat16),
    "sequence": lambda: of("double-mask-weights-huber", shape=(3, 3, 4)),
    "one-nan": one_nan,
    "no-samples": lambda: of("cql", shape=(0, 4)),
    "compact": lambda: compact(of("soft-mask")),
    "equal-in-all": equal_actions([*range(A)]),
    "equal-at-a-seam": equal_actions([16, 17, 24, 25]),
    "equal-in-two": equal_actions([3, 40]),
    "sparse": lambda: of("plain", sparse_grad=True),
    "nowhere-legal": nowhere_legal,
    "large": lambda: of("soft", hidden=3e3 * make((N, 4))["hidden"], next_hidden=3e3 * make((N, 4))["next_hidden"]),
    "cold": lambda: of("plain", target=Soft(1e-4)),
}


SECOND_ORDER: dict[str, Callable[[], Arguments]] = {
    "double": lambda: of("double", torch.float64),
    "cql": lambda: of("cql-double-mask-weights-smooth_l1", torch.float64, delta=3.0),
    "cql-none": lambda: of("cql", torch.float64, reduction="none"),
}


def local(arguments: Arguments, rank: int, sizes: list[int]) -> Arguments:
    """What one rank is given: its rows of the layers, its columns of the masks."""
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    return {
        k: x if x is None or k not in ROWS + COLUMNS else x[mine] if k in ROWS else x[..., mine]
        for k, x in arguments.items()
    }


def counting(name: str, collective: Callable[..., Any], calls: list[tuple[str, int]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if name == "all_reduce" else args[1]
        calls.append((name, given.nbytes if isinstance(given, Tensor) else 0))
        return collective(*args, **kwargs)

    return call


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collectives that are called: name, and bytes that each rank gives."""
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter"):
            patch.setattr(dist, name, counting(name, getattr(dist, name), calls))
        yield calls


def run(arguments: Arguments, **options: Any) -> dict[str, Any]:
    """Loss, TD errors and the gradients of a rank, with the collectives of forward and backward."""
    arguments = dict(arguments)
    learned = [k for k in LEARNED if arguments.get(k) is not None]
    for k in learned:
        arguments[k] = arguments[k].detach().clone().requires_grad_()
    with counted() as calls:
        loss, td_error, *cql = fused_linear_dqn_loss(
            **arguments, **options, return_td_error=True, return_cql="cql_alpha" in arguments
        )
        forward = list(calls)
        grads = torch.autograd.grad(loss, [arguments[k] for k in learned], torch.ones_like(loss))
    return {
        "loss": loss.detach(),
        "td_error": td_error,
        "cql": cql,
        "forward": forward,
        "backward": calls[len(forward) :],
        "sparse": [x.is_sparse for x in grads],
        "grads": {k: x.to_dense() for k, x in zip(learned, grads, strict=True)},
    }


def second_order(arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    """Gradients of a function of all three gradients, and of what came upstream of the loss."""
    arguments = dict(arguments)
    for k in LEARNED:
        arguments[k] = arguments[k].detach().clone().requires_grad_()
    loss = fused_linear_dqn_loss(**arguments, **options)
    assert isinstance(loss, Tensor)
    learned, upstream = [arguments[k] for k in LEARNED], torch.ones_like(loss).requires_grad_()
    grads = torch.autograd.grad(loss, learned, upstream, create_graph=True)
    found = torch.autograd.grad(torch.stack([x.square().sum() for x in grads]).sum(), [*learned, upstream])
    return dict(zip((*LEARNED, "upstream"), found, strict=True))


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def far(actions: Tensor, by: int) -> Tensor:
    actions = actions.clone()
    actions[4] = by
    return actions


# What one rank, the last, does wrong.
WRONG: dict[str, Callable[[Arguments], Arguments]] = {
    "shape": lambda a: {"rewards": a["rewards"][None]},
    "dtype": lambda a: {"actions": a["actions"].float()},
    "option": lambda a: {"loss": "mes"},
    "another option": lambda a: {"loss": "huber"},
    "another gamma": lambda a: {"gamma": 0.5},
    "action": lambda a: {"actions": far(a["actions"], A)},
    "negative action": lambda a: {"actions": far(a["actions"], -1)},
    "mask": lambda a: {"next_action_mask": torch.ones(N, A, dtype=torch.bool)},
    "fewer samples": lambda a: {k: a[k][:7] for k in ("hidden", "next_hidden", "actions", "rewards", "terminated")},
    "grad": lambda a: {"hidden": a["hidden"].detach().requires_grad_()},
    "backend": lambda a: {"backend": "trition"},
    "hidden_grad": lambda a: {"hidden_grad": "mean"},
    "compacted": lambda a: compact(a) | {"non_final_mask": torch.ones(N, dtype=torch.bool)},
    "sparse": lambda a: {"sparse_grad": True, "cql_alpha": 1.0},
    "no rows": lambda a: {k: a[k][:0] for k in ("next_weight", "next_bias")},
}


def errors(mine: Arguments, group: Any) -> dict[str, tuple[str, str]]:
    last = dist.get_rank(group) == dist.get_world_size(group) - 1

    def calls(change: Callable[[Arguments], Arguments]) -> Any:
        arguments = mine | (change(mine) if last else {})
        if "non_final_mask" in arguments:
            del arguments["terminated"]
        return fused_linear_dqn_loss(**arguments, tensor_parallel_group=group)

    return {name: error_of(lambda change=change: calls(change)) for name, change in WRONG.items()}  # type: ignore[misc]


# What one rank, the last, has other values of, or another order.
OTHER_VALUES: dict[str, Callable[[Arguments], Arguments]] = {
    "nothing": lambda a: {},
    "hidden": lambda a: {"hidden": a["hidden"].nextafter(a["hidden"] + 1)},
    "next_hidden": lambda a: {"next_hidden": a["next_hidden"].flip(0)},
    "next_hidden_online": lambda a: {"next_hidden_online": -a["next_hidden_online"]},
    "actions": lambda a: {"actions": a["actions"] + 1},
    "rewards": lambda a: {"rewards": a["rewards"] + 1},
    "terminated": lambda a: {"terminated": ~a["terminated"]},
    "weights": lambda a: {"weights": a["weights"].flip(0)},
    "gamma": lambda a: {"gamma": a["gamma"] / 2},
}


def checked_values(rank: int, ranks: int, sizes: list[int]) -> dict[str, tuple[str, str]]:
    """With DQN_FUSED_CHECK, on all ranks, and under "one rank" on the last only."""
    arguments, last = of("double-mask-weights-huber", gamma=torch.tensor(0.9)), rank == ranks - 1
    mine, found = local(arguments, rank, sizes), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQN_FUSED_CHECK", "1")
        for name, change in OTHER_VALUES.items():
            given = mine | (change(mine) if last else {})
            found[name] = error_of(lambda given=given: run(given, tensor_parallel_group=dist.group.WORLD))  # type: ignore[misc]
        patch.setenv("DQN_FUSED_CHECK", str(int(last)))
        found["one rank"] = error_of(lambda: run(given, tensor_parallel_group=dist.group.WORLD))
    return found


def rows_that_are_not_taken(mine: Arguments, group: Any) -> dict[str, Any]:
    """Gradients with and without infinity in the first row of a rank; and the rows that a sparse gradient has.

    For a sample whose row is on another rank, a rank computes with its own first row.
    """
    far_away, first = mine | {"weight": mine["weight"].clone()}, dist.get_rank(group) > 0
    if first and len(mine["weight"]):
        far_away["weight"][0] = torch.inf
    both = [run(x, tensor_parallel_group=group)["grads"] for x in (mine, far_away)]
    weight = mine["weight"].clone().requires_grad_()
    loss = fused_linear_dqn_loss(**{**mine, "weight": weight}, sparse_grad=True, tensor_parallel_group=group)
    rows = torch.autograd.grad(loss, [weight])[0].coalesce().indices().flatten()  # type: ignore[list-item]
    return {"both": both, "rows": rows}


def dtensors(rank: int, ranks: int) -> dict[str, Any]:
    """Layers that are DTensors on a mesh, and what is refused."""
    arguments, mesh = of("double"), init_device_mesh("cpu", (ranks,))
    # As DTensor shares rows out, by torch.chunk: the last rank has fewer.
    chunks = [len(x) for x in torch.arange(A).chunk(ranks)]
    mine = local(arguments, rank, chunks)
    sharded = {
        k: DTensor.from_local(mine[k], mesh, [Shard(0)], shape=arguments[k].shape, stride=arguments[k].stride())
        for k in ROWS
    }
    for k in ("weight", "bias"):
        sharded[k].requires_grad_()
    hidden = arguments["hidden"].requires_grad_()
    loss, td_error = fused_linear_dqn_loss(**arguments | sharded, return_td_error=True)
    loss.backward()
    for k in ("weight", "bias"):
        assert sharded[k].grad.placements == (Shard(0),)
        assert sharded[k].grad.shape == arguments[k].shape
    found: dict[str, Any] = {"loss": loss.detach(), "td_error": td_error, "cql": []}
    found["grads"] = {"hidden": hidden.grad} | {k: sharded[k].grad.to_local() for k in ("weight", "bias")}

    plain = arguments | {k: arguments[k].detach() for k in ROWS}
    whole = DTensor.from_local(plain["weight"], mesh, [Replicate()])
    square = DTensor.from_local(plain["weight"], init_device_mesh("cpu", (1, ranks)), [Replicate(), Shard(0)])
    state = DTensor.from_local(plain["hidden"], mesh, [Replicate()])
    refused: dict[str, Arguments] = {
        "replicated": {"weight": whole},
        "two dimensions": {"weight": square},
        "mixed": {"next_weight": plain["next_weight"]},
        "only of the target": {k: plain[k] for k in ("weight", "bias")},
        "hidden": {"hidden": state},
        "sparse": {"sparse_grad": True},
        "outside": {"tensor_parallel_group": dist.new_group([0])},
    }
    found["refused"] = {
        name: error_of(lambda change=change: fused_linear_dqn_loss(**arguments | sharded | change))  # type: ignore[misc]
        for name, change in refused.items()
    }
    return found


class Model(nn.Module):
    """A layer below a head of some rows."""

    def __init__(self, mine: Arguments) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, dtype=torch.float64)
        self.body.load_state_dict({"weight": torch.eye(4) + 0.1, "bias": torch.ones(4)})
        self.head = nn.Linear(4, 1, dtype=torch.float64)
        self.head.weight, self.head.bias = (nn.Parameter(mine[k].clone()) for k in ("weight", "bias"))

    def forward(self, arguments: Arguments, **options: Any) -> Tensor:
        hidden = self.body(arguments["hidden"])
        loss = fused_linear_dqn_loss(
            **arguments | {"hidden": hidden, "weight": self.head.weight, "bias": self.head.bias}, **options
        )
        assert isinstance(loss, Tensor)
        return loss


def joined() -> Arguments:
    """The batch of all data-parallel ranks."""
    arguments = of("double-mask-weights-huber", torch.float64)
    return arguments | {"reduction": "weighted_mean", "cql_alpha": 0.3}


SAMPLES = ("hidden", "actions", "rewards", "next_hidden", "terminated", "next_hidden_online", "weights")
SHARES = [6, 3]  # of the samples


def mesh_of_two_by_two(rank: int) -> dict[str, Any]:
    """Data parallel times tensor parallel: DDP over one dimension, rows shared out over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh.get_group("data"), mesh.get_group("tensor")
    share, place = mesh.get_local_rank("data"), mesh.get_local_rank("tensor")
    start = sum(SHARES[:share])
    samples = (*SAMPLES, "next_action_mask")
    whole = {k: x[start : start + SHARES[share]] if k in samples else x for k, x in joined().items()}
    mine = local(whole, place, SIZES[2])
    model = DistributedDataParallel(Model(mine), process_group=data)
    loss = model(mine, process_group=data, tensor_parallel_group=tensor)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=data)
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    bad = mine | ({"actions": far(mine["actions"], A)[: len(mine["actions"])]} if rank == 0 else {})
    error = error_of(lambda: model(bad, process_group=data, tensor_parallel_group=tensor))
    return {"loss": mean / 2, "error": error, **found}


def fully_sharded(rank: int) -> dict[str, Any]:
    """FSDP of two ranks: the loss in the forward, where weights are whole; and outside, where hidden states differ."""
    start = sum(SHARES[:rank])
    samples = (*SAMPLES, "next_action_mask")
    mine = {k: x[start : start + SHARES[rank]] if k in samples else x for k, x in joined().items()}
    model = Model(mine)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(mine, process_group=dist.group.WORLD).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr, operator]
    hidden = torch.full((5, 4), float(rank), dtype=torch.float64)
    given = (hidden, model.head.weight, torch.zeros(5, dtype=torch.int64), torch.ones(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQN_FUSED_CHECK", "1")
        error = error_of(lambda: fused_linear_td_loss(*given, bias=model.head.bias))
    return {"error": error, **found}


def compiled(mine: Arguments, group: Any) -> dict[str, Any]:
    """torch.compile breaks the graph here, and refuses with fullgraph=True."""
    arguments = {k: x for k, x in mine.items() if k != "hidden"}

    def step(hidden: Tensor) -> Tensor:
        loss = fused_linear_dqn_loss(hidden * 2, **arguments, tensor_parallel_group=group)
        assert isinstance(loss, Tensor)
        return loss + 1

    found = {"eager": step(mine["hidden"]), "broken": torch.compile(step, backend="eager")(mine["hidden"])}
    torch._dynamo.reset()
    whole = torch.compile(step, backend="eager", fullgraph=True)
    return {**found, "error": error_of(lambda: whole(mine["hidden"]))}


def others(mine: Arguments, group: Any) -> dict[str, Any]:
    """A ready target, the module, and the gradient of hidden left partial."""
    hidden, weight, actions = (mine[k] for k in ("hidden", "weight", "actions"))
    layers = []
    for k in ("", "next_"):
        layer = nn.Linear(4, 1, dtype=torch.float64)
        layer.weight, layer.bias = (nn.Parameter(mine[f"{k}{x}"].clone()) for x in ("weight", "bias"))
        layers.append(layer)
    criterion = FusedLinearDQNLoss(gamma=0.9, tensor_parallel_group=group, hidden_grad="partial")
    states = hidden.clone().requires_grad_()
    loss = criterion(layers[0], states, actions, mine["rewards"], layers[1], mine["next_hidden"], mine["terminated"])
    assert isinstance(loss, Tensor)
    with counted() as calls:
        loss.backward()
    return {
        "ready": fused_linear_td_loss(
            hidden, weight, actions, mine["rewards"], cql_alpha=1.0, return_cql=True, tensor_parallel_group=group
        ),
        "module": loss.detach(),
        "partial": states.grad,
        "partial_calls": calls,
    }


def work(rank: int, ranks: int, folder: str) -> None:
    """Run everything, one after the other, and save the results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    group, sizes = dist.group.WORLD, SIZES[ranks]
    found: dict[str, Any] = {
        name: run(local(case(), rank, sizes), tensor_parallel_group=group) for name, case in CASES.items()
    }
    found["errors"] = errors(local(of("plain"), rank, sizes), group)
    found["second order"] = {
        name: second_order(local(SECOND_ORDER[name](), rank, sizes), tensor_parallel_group=group)
        for name in SECOND_ORDER
    }
    found["checked values"] = checked_values(rank, ranks, sizes)
    found["rows not taken"] = rows_that_are_not_taken(local(of("plain"), rank, sizes), group)
    found["others"] = others(local(of("plain", torch.float64), rank, sizes), group)
    found["dtensors"] = dtensors(rank, ranks)
    if ranks == 4:
        found["two by two"] = mesh_of_two_by_two(rank)
    else:
        found["fsdp"] = fully_sharded(rank)
        found["compiled"] = compiled(local(of("plain"), rank, sizes), group)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
