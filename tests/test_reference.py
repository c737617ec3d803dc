"""The loop, the gather and the fused loss give the same number and the same gradient."""

from collections.abc import Callable

import pytest
import torch
from bounds import assert_agree, assert_close
from conftest import Setting
from data import SEED
from oracle import oracle
from torch import Tensor, nn

from dqn_fused import fused_dqn_loss
from dqn_fused.reference import dqn_loss, naive_dqn_loss, simple_dqn_loss

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def transitions(n: int, final: float, column: bool) -> Batch:
    mask = torch.rand(n) >= final
    states, next_states = (torch.randn(n, 4, dtype=torch.float64) for _ in "ab")
    next_states = next_states[mask]
    actions, rewards = torch.randint(3, (n,)), torch.randn(n)
    if column:
        actions, rewards = actions[:, None], rewards[:, None]
    return states, next_states, actions, rewards, mask


def fused(setting: Setting) -> Callable[..., Tensor]:
    def loss(batch: Batch, main_net: nn.Module, target_net: nn.Module, gamma: float) -> Tensor:
        states, next_states, actions, rewards, mask = batch
        with torch.no_grad():
            next_q = target_net(next_states)
        return fused_dqn_loss(
            main_net(states), actions, rewards, next_q, gamma=gamma, non_final_mask=mask, backend=setting.backend
        )

    return loss


@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("column", [False, True])
def test_three_ways_to_one_loss(setting: Setting, column: bool, final: float) -> None:
    torch.manual_seed(SEED)
    main_net, target_net = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(setting.device, torch.float64) for _ in "ab"
    )
    batch = tuple(x.to(setting.device) for x in transitions(11, final, column))
    results = {}
    for name, loss in {"naive": naive_dqn_loss, "simple": simple_dqn_loss, "fused": fused(setting)}.items():
        main_net.zero_grad()
        value = loss(batch, main_net, target_net, 0.9)
        value.backward()
        results[name] = [value.detach(), *(p.grad.clone() for p in main_net.parameters())]
        assert all(p.grad is None for p in target_net.parameters())
    for name in ("simple", "fused"):
        assert_agree(results[name], results["naive"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_and_fused_agree(setting: Setting, reduction: str) -> None:
    q = torch.randn(2, 9, 4, device=setting.device, requires_grad=True)
    rest = (
        torch.randint(4, (2, 9), device=setting.device),
        torch.randn(2, 9, device=setting.device),
        torch.randn(2, 9, 4, device=setting.device),
        torch.rand(2, 9, device=setting.device) < 0.5,
    )
    ours = fused_dqn_loss(q, *rest, reduction=reduction, return_td_error=True, backend=setting.backend)
    reference = dqn_loss(q, *rest, reduction=reduction, return_td_error=True)
    upstream = torch.randn_like(ours[0])
    expected = oracle(q, *rest, reduction=reduction, grad_loss=upstream)
    for loss, td_error in (ours, reference):
        assert_close("loss", loss, expected.loss)
        assert_close("td_error", td_error, expected.td_error)
        assert_close("grad_q", torch.autograd.grad(loss, q, upstream)[0], expected.grad_q)
