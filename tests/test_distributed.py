"""Two processes, gloo: gradients of DistributedDataParallel against one process on the joined batch."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bounds import assert_agree
from data import SEED
from processes import run_once
from test_loss import make
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dqn_fused import (
    FusedCategoricalLoss,
    FusedCategoricalTDLoss,
    FusedDQNLoss,
    FusedLinearDQNLoss,
    FusedQuantileLoss,
    fused_categorical_loss,
    fused_categorical_loss_and_grad,
    fused_categorical_td_loss,
    fused_categorical_td_loss_and_grad,
    fused_dqn_loss,
    fused_dqn_loss_and_grad,
    fused_linear_dqn_loss,
    fused_quantile_loss,
    fused_quantile_loss_and_grad,
    fused_td_loss,
)
from dqn_fused.categorical_reference import categorical_loss, categorical_td_loss
from dqn_fused.quantile_reference import quantile_loss
from dqn_fused.reference import dqn_loss

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without torch.distributed or gloo"
)

RANKS, B, D, A = 2, 8, 4, 3
SHARES = {"equal": [4, 4], "unequal": [7, 1], "one_rank_has_none": [8, 0]}
# Ways of taking the mean, and shares of the batch for which they are right. "mean" is that of each rank.
CASES = [
    ("mean", "equal"),
    ("weighted", "unequal"),
    ("weighted", "one_rank_has_none"),
    ("module", "unequal"),
    ("unweighted", "unequal"),
    ("loss_and_grad", "unequal"),
    ("reference", "unequal"),
    ("linear", "unequal"),
    ("linear_module", "unequal"),
    ("compiled_graph", "unequal"),
    ("quantile", "unequal"),
    ("quantile", "one_rank_has_none"),
    ("quantile_module", "unequal"),
    ("quantile_loss_and_grad", "unequal"),
    ("quantile_reference", "unequal"),
    ("quantile_compiled_graph", "unequal"),
    ("categorical", "unequal"),
    ("categorical", "one_rank_has_none"),
    ("categorical_module", "unequal"),
    ("categorical_loss_and_grad", "unequal"),
    ("categorical_reference", "unequal"),
    ("categorical_compiled_graph", "unequal"),
    ("categorical_td", "unequal"),
    ("categorical_td_module", "unequal"),
    ("categorical_td_loss_and_grad", "unequal"),
    ("categorical_td_reference", "unequal"),
]
# For each distributional loss: function, function with gradient, module, reference, and options.
FAMILIES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "quantile": (fused_quantile_loss, fused_quantile_loss_and_grad, FusedQuantileLoss, quantile_loss, {"kappa": 0.5}),
    "categorical_td": (
        fused_categorical_td_loss,
        fused_categorical_td_loss_and_grad,
        FusedCategoricalTDLoss,
        categorical_td_loss,
        {"support": (-2.0, 2.0), "projection": "hl_gauss"},
    ),
    "categorical": (
        fused_categorical_loss,
        fused_categorical_loss_and_grad,
        FusedCategoricalLoss,
        categorical_loss,
        {"support": (-2.0, 2.0)},
    ),
}


def batch() -> dict[str, Tensor]:
    """The joined batch: observations instead of Q-values."""
    arguments = make((B, A), torch.float64)
    torch.manual_seed(SEED)
    return {**arguments, "q": torch.randn(B, D, dtype=torch.float64), "weights": torch.rand(B, dtype=torch.float64)}


def network() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Linear(D, A, dtype=torch.float64)


def loss_of(way: str, model: nn.Module, shard: dict[str, Tensor], group: Any) -> Tensor:
    """Loss of a shard; with group None the same of the whole batch."""
    shard = dict(shard)
    obs, weights = shard.pop("q"), shard.pop("weights")
    if way.startswith(("quantile", "categorical")):
        return distributional_loss_of(way, model(obs), obs, shard | {"weights": weights}, group)
    options: dict[str, Any] = {"reduction": "weighted_mean", "process_group": group, "loss": "huber"}
    if way == "mean":
        return fused_dqn_loss(model(obs), **shard)  # type: ignore[return-value]
    if way == "unweighted":
        return fused_dqn_loss(model(obs), **shard, **options)  # type: ignore[return-value]
    shard["weights"] = weights
    if way == "reference":
        return dqn_loss(model(obs), **shard, **options)  # type: ignore[return-value]
    if way == "module":
        return FusedDQNLoss(**options)(model(obs), **shard)
    if way == "loss_and_grad":
        q = model(obs)
        loss, grad_q = fused_dqn_loss_and_grad(q, **shard, **options)
        return with_gradient(loss, q, grad_q)
    if way.startswith("linear"):
        del shard["next_q"]
        layer = nn.Linear(A, 50, dtype=torch.float64).requires_grad_(False)
        hidden, next_hidden = model(obs), obs[:, :A]
        if way == "linear_module":
            actions, rewards, terminated = (shard.pop(name) for name in ("actions", "rewards", "terminated"))
            criterion = FusedLinearDQNLoss(**options)
            return criterion(layer, hidden, actions, rewards, layer, next_hidden, terminated, **shard)
        return fused_linear_dqn_loss(  # type: ignore[return-value]
            hidden, layer.weight, next_hidden=next_hidden, next_weight=layer.weight, **shard, **options
        )
    if way == "compiled_graph":
        return torch.compile(fused_dqn_loss, fullgraph=True)(model(obs), **shard, **options)
    return fused_dqn_loss(model(obs), **shard, **options)  # type: ignore[return-value]


def with_gradient(loss: Tensor, q: Tensor, grad_q: Tensor) -> Tensor:
    """The loss, whose gradient by q is grad_q."""
    product = (q * grad_q).sum()
    return loss.detach() + product - product.detach()


def distributional_loss_of(way: str, q: Tensor, obs: Tensor, shard: dict[str, Tensor], group: Any) -> Tensor:
    """The same of K quantiles or logits of each action, which are multiples of its Q-value."""
    family = next(name for name in FAMILIES if way.startswith(name))
    function, both, module, reference, options = FAMILIES[family]
    options = options | {"reduction": "weighted_mean", "process_group": group}
    factors = torch.linspace(0.5, 1.5, 4, dtype=q.dtype)
    x, next_x = q.unsqueeze(2) * factors, obs[:, :A].unsqueeze(2) * factors
    given: tuple[Tensor, ...] = (x, shard["actions"], shard["rewards"])
    if family != "categorical_td":
        given += (next_x, shard["terminated"])
    weights = shard["weights"]
    if way.endswith("_module"):
        return module(**options)(*given, weights=weights)
    if way.endswith("_loss_and_grad"):
        loss, grad = both(*given, weights=weights, **options)
        return with_gradient(loss, x, grad)
    if way.endswith("_compiled_graph"):
        function = torch.compile(function, fullgraph=True)
    return (reference if way.endswith("_reference") else function)(*given, weights=weights, **options)


def gradients(way: str, model: nn.Module, shard: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the layer of the linear head
    loss = loss_of(way, model, shard, group)
    loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=120),
    )
    whole, results = batch(), {}
    for way, share in CASES:
        sizes = SHARES[share]
        start = sum(sizes[:rank])
        shard = {name: x[start : start + sizes[rank]] for name, x in whole.items()}
        found = gradients(way, DistributedDataParallel(network()), shard, dist.group.WORLD)
        dist.all_reduce(found["loss"])  # its mean over the ranks, as that of the gradients
        found["loss"] /= RANKS
        results[f"{way}-{share}"] = found
    # A group of rank 0 alone: its weights are not those of the others.
    alone = dist.new_group([0])
    if rank == 0:
        shard = {name: x[:3] for name, x in whole.items()}
        assert torch.equal(loss_of("weighted", network(), shard, alone), loss_of("weighted", network(), shard, None))
    q = torch.zeros(2, A)
    rest = (torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2, A))
    with pytest.raises(ValueError, match="process_group: expected None with reduction 'mean'"):
        fused_dqn_loss(q, *rest, process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="process_group: not inside"):
        torch.func.grad(lambda q: fused_dqn_loss(q, *rest, reduction="weighted_mean", process_group=dist.group.WORLD))(
            q
        )
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(run_folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(run_once(work, RANKS, run_folder) / "results.pt")


@pytest.mark.parametrize(("way", "share"), CASES, ids=["-".join(case) for case in CASES])
def test_gradient_of_the_joined_batch(results: dict[str, dict[str, Tensor]], way: str, share: str) -> None:
    expected = gradients(way.removesuffix("compiled_graph"), network(), batch(), None)  # of a graph: eager's
    got = results[f"{way}-{share}"]
    assert set(got) == set(expected) == {"loss", "weight", "bias"}
    for name, value in expected.items():
        assert_agree(got[name], value)


def test_what_is_no_process_group() -> None:
    arguments = make((B, A))
    q, actions, rewards, next_q = (arguments[name] for name in ("q", "actions", "rewards", "next_q"))
    calls = (
        (fused_dqn_loss, (q, actions, rewards, next_q)),
        (fused_dqn_loss_and_grad, (q, actions, rewards, next_q)),
        (dqn_loss, (q, actions, rewards, next_q)),
        (fused_td_loss, (q, actions, rewards)),
        (fused_linear_dqn_loss, (q, next_q, actions, rewards, q, next_q)),
    )
    for function, given in calls:
        with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup, got str"):
            function(*given, reduction="weighted_mean", process_group="gloo")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_process_group_of_a_distributional_loss(family: str) -> None:
    function, both, _, reference, options = FAMILIES[family]
    x, n = torch.zeros(2, A, 4), torch.zeros(2)
    given = (x, n.long(), n) if family == "categorical_td" else (x, n.long(), n, x)
    for call in (function, both, reference):
        with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup, got str"):
            call(*given, **options, reduction="weighted_mean", process_group="gloo")
