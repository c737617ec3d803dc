"""The compiled quantile ops by themselves: what their inputs may be, what they allocate, what they leave unwritten."""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import Setting
from data import source
from quantile_data import check, clear_winner, compact, make
from test_autograd import Allocations
from test_compiled import built
from torch import Tensor

from dqn_fused import fused_quantile_loss
from dqn_fused._ops import REDUCTIONS

pytestmark = built


def everything() -> dict[str, Any]:
    g = source(70)
    arguments = make((7, 3, 5), 4, seed=70) | {"weights": torch.rand(7, generator=g), "gamma": torch.rand(7)}
    online = clear_winner(torch.randn((7, 3, 6), generator=g), g)
    means = online.mean(2)
    legal = torch.rand((7, 3), generator=g) < 0.8
    legal |= means == means.max(1, keepdim=True).values  # of the others the largest may be a matter of rounding
    legal[0] = False
    return arguments | {"next_quantiles_online": online, "next_action_mask": legal, "taus": torch.rand(7, 5)}


CASES = {
    "plain": lambda: make((7, 3, 5)),
    "bfloat16": lambda: make((7, 3, 5), 4, torch.bfloat16),
    "float64": lambda: make((7, 3, 5), 4, torch.float64),
    "no rows": lambda: make((0, 3, 5)),
    "everything": everything,
    "mask": lambda: compact(everything()),
    "q-values, taus of all": lambda: (
        make((7, 3, 5)) | {"next_quantiles_online": torch.randn(7, 3), "taus": torch.rand(5)}
    ),
    "strided": lambda: make((7, 3, 5)) | {"quantiles": torch.randn(5, 7, 3).permute(1, 2, 0)},
}


def op_arguments(arguments: dict[str, Any], reduction: str = "mean", check: bool = True) -> tuple[Any, ...]:
    a = arguments
    gamma = a.get("gamma", 0.99)
    gammas, gamma = (gamma, 0.0) if isinstance(gamma, Tensor) else (None, gamma)
    return (
        a["quantiles"], a["actions"], a["rewards"], a["next_quantiles"], a.get("terminated"), a.get("non_final_mask"),
        gammas, gamma, a.get("next_quantiles_online"), a.get("next_action_mask"), a.get("weights"), a.get("taus"),
        a.get("kappa", 1.0), False, REDUCTIONS[reduction], check,
    )  # fmt: skip


@pytest.mark.opcheck
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, reduction: str) -> None:
    from dqn_fused import _distributional_ops as ops

    arguments = CASES[case]()
    arguments["next_action_mask"] = None  # a row without a legal action is NaN, which opcheck compares with NaN
    given = op_arguments(arguments, reduction)
    torch.library.opcheck(ops.quantile_loss, given)
    torch.library.opcheck(ops.quantile_loss_and_grad, given)
    loss, _, slopes = ops.quantile_loss(*given)
    _, A, _ = arguments["quantiles"].shape
    saved = (slopes, arguments["actions"], arguments.get("weights"), A, arguments["quantiles"].dtype)
    torch.library.opcheck(ops.rows_backward, (torch.ones_like(loss), *saved, REDUCTIONS[reduction]))


BROKEN: dict[str, dict[str, Any]] = {
    "quantiles 2-d": {"quantiles": torch.zeros(7, 5)},
    "quantiles without an action": {"quantiles": torch.zeros(7, 0, 5)},
    "quantiles without a quantile": {"quantiles": torch.zeros(7, 3, 0)},
    "quantiles of integers": {"quantiles": torch.zeros(7, 3, 5, dtype=torch.int64)},
    "actions short": {"actions": torch.zeros(6, dtype=torch.int64)},
    "actions floating": {"actions": torch.zeros(7)},
    "actions too large": {"actions": torch.full((7,), 3)},
    "actions negative": {"actions": torch.full((7,), -1)},
    "rewards wide": {"rewards": torch.zeros(7, 5)},
    "next of other actions": {"next_quantiles": torch.zeros(7, 2, 4)},
    "next short": {"next_quantiles": torch.zeros(6, 3, 4)},
    "next without a quantile": {"next_quantiles": torch.zeros(7, 3, 0)},
    "next missing": {"next_quantiles": None},
    "next elsewhere": {"next_quantiles": torch.zeros(7, 3, 4, device="meta")},
    "online of other actions": {"next_quantiles_online": torch.zeros(7, 2)},
    "online short": {"next_quantiles_online": torch.zeros(6, 3, 4)},
    "online 1-d": {"next_quantiles_online": torch.zeros(7)},
    "mask of floats": {"next_action_mask": torch.zeros(7, 3)},
    "mask short": {"next_action_mask": torch.ones(7, 2, dtype=torch.bool)},
    "mask 3-d": {"next_action_mask": torch.ones(7, 3, 1, dtype=torch.bool)},
    "weights of integers": {"weights": torch.ones(7, dtype=torch.int64)},
    "gamma short": {"gamma": torch.ones(6)},
    "taus of the target": {"taus": torch.rand(4)},
    "taus column": {"taus": torch.rand(5, 1)},
    "taus short": {"taus": torch.rand(6, 5)},
    "taus 3-d": {"taus": torch.rand(7, 5, 1)},
    "kappa": {"kappa": -1.0},
    "kappa NaN": {"kappa": float("nan")},
    "both masks": {"non_final_mask": torch.ones(7, dtype=torch.bool)},
    "a mask that does not fit": {"non_final_mask": torch.arange(7) < 3, "terminated": None},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_refused_by_the_op_too(name: str) -> None:
    from dqn_fused import _distributional_ops as ops

    given = op_arguments(everything() | BROKEN[name])
    for op in (ops.quantile_loss, ops.quantile_loss_and_grad):
        with pytest.raises(RuntimeError):
            op(*given)


def test_unchecked_values_stay_inside() -> None:
    """What a graph does, which looks at no values: NaN and zero rows, nothing read or written elsewhere."""
    from dqn_fused import _distributional_ops as ops

    arguments = everything() | {"actions": torch.tensor([0, 3, -1, 2**60, -(2**60), 1, 2])}
    loss, gradient, td_error = ops.quantile_loss_and_grad(*op_arguments(arguments, "none", check=False))
    wrong = torch.tensor([False, True, True, True, True, False, False])
    assert loss[wrong].isnan().all()
    assert td_error[wrong].isnan().all()
    assert not gradient[wrong].any()
    arguments = {**everything(), "non_final_mask": torch.ones(7, dtype=torch.bool), "terminated": None}
    for name in ("next_quantiles", "next_quantiles_online", "next_action_mask"):
        arguments[name] = arguments[name][:3]
    loss, _, _ = ops.quantile_loss(*op_arguments(arguments, "none", check=False))
    assert loss[3:].isnan().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_grad_gives_the_values_of_autograd(case: str, reduction: str) -> None:
    """Those of the oracle, both."""
    check(Setting("compiled", "cpu"), CASES[case]() | {"reduction": reduction})


@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
def test_memory(form: Any) -> None:
    """Forward allocates O(n K), backward the gradient; neither pairs nor (n, A, K) in between, nor next_quantiles."""
    n, A, K = 16, 6, 200
    arguments = form(make((n, A, K)))
    x = arguments["quantiles"].requires_grad_()
    with Allocations(arguments) as forward:
        loss = fused_quantile_loss(**arguments, backend="compiled")
    assert max(forward.sizes) == n * K
    assert sum(forward.sizes) <= n * K + 4 * n
    with Allocations(arguments | {"slopes": loss.grad_fn.saved_tensors[0]}) as backward:
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert sorted(backward.sizes)[-1] == gradient.numel()
    assert sum(size >= n * K for size in backward.sizes) == 1
    following = weakref.ref(arguments["next_quantiles"])
    del arguments, forward, backward
    gc.collect()
    assert following() is None, "the graph keeps next_quantiles alive"
    assert loss.grad_fn is not None


@pytest.mark.parametrize("K", [1, 15, 16, 17, 31, 33, 64, 65])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_means_of_every_length(K: int, stride: int, dtype: torch.dtype) -> None:
    """The last quantile decides which action is chosen, whatever the vectors leave over."""
    values = torch.zeros(2, 3, K * stride, dtype=dtype)[:, :, ::stride]
    values[0, 2, K - 1], values[1, 1, 0] = 1, 1
    following = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1).expand(2, 3, 1)
    _, td_error = fused_quantile_loss(
        torch.zeros(2, 1, 1).expand(2, 3, 1), torch.zeros(2, dtype=torch.int64), torch.zeros(2), following, gamma=1.0,
        next_quantiles_online=values, return_td_error=True, backend="compiled",
    )  # fmt: skip
    assert td_error.tolist() == [-2.0, -1.0]
