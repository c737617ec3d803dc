"""Calls with the shapes and dtypes of well-known libraries, against the lines that they write.

Each test is named after its library; the lines are its loss, written in PyTorch. Networks are float64, so that the
comparison is of what is computed and not of roundings, which test_loss.py bounds.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import assert_agree, assert_close
from conftest import Setting
from data import SEED
from oracle import oracle
from torch import Tensor, nn

from dqn_fused import Munchausen, fused_dqn_loss, fused_td_loss

B, A, GAMMA = 32, 6, 0.99


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)


def networks(setting: Setting, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Online and target network, states and next states."""
    q_network, target_network = (nn.Linear(8, A).to(setting.device, dtype) for _ in "ab")
    return q_network, target_network, *(torch.randn(B, 8, dtype=dtype, device=setting.device) for _ in "ab")


def column(setting: Setting, x: Tensor) -> Tensor:
    return x.to(setting.device).unsqueeze(1)


def same_update(network: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Assert that both losses are the same number and move the network the same way."""
    parameters = list(network.parameters())
    got, expected = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs))
    assert_agree(ours, theirs)
    assert_agree(got, expected)


def test_cleanrl(setting: Setting) -> None:
    """dqn.py: actions, rewards and dones are (B, 1), dones are float32."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards = column(setting, torch.randint(A, (B,))), column(setting, torch.randn(B))
    dones = column(setting, (torch.rand(B) < 0.3).float())
    with torch.no_grad():
        target_max, _ = target_network(next_obs).max(dim=1)
        td_target = rewards.flatten() + GAMMA * target_max * (1 - dones.flatten())
    old_val = q_network(obs).gather(1, actions).squeeze()
    ours = fused_dqn_loss(
        q_network(obs), actions, rewards, target_network(next_obs), dones, GAMMA, backend=setting.backend
    )
    same_update(q_network, ours, F.mse_loss(td_target, old_val))


def test_leanrl(setting: Setting) -> None:
    """dqn.py: everything is (B,), dones are bool and negated."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards, dones = (
        x.to(setting.device) for x in (torch.randint(A, (B,)), torch.randn(B), torch.rand(B) < 0.3)
    )
    with torch.no_grad():
        td_target = rewards + GAMMA * target_network(next_obs).max(dim=1)[0] * ~dones
    old_val = q_network(obs).gather(1, actions.unsqueeze(-1)).squeeze(-1)
    ours = fused_dqn_loss(
        q_network(obs), actions, rewards, target_network(next_obs), dones, GAMMA, backend=setting.backend
    )
    same_update(q_network, ours, F.mse_loss(td_target, old_val))


def test_stable_baselines3(setting: Setting) -> None:
    """dqn/dqn.py: (B, 1) everywhere, the discounts of n-step returns too, and smooth l1."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards = column(setting, torch.randint(A, (B,))), column(setting, torch.randn(B))
    dones = column(setting, (torch.rand(B) < 0.3).float())
    discounts = GAMMA ** column(setting, torch.randint(1, 4, (B,)).float())
    with torch.no_grad():
        next_q_values = target_network(next_obs).max(dim=1)[0].reshape(-1, 1)
        target_q_values = rewards + (1 - dones) * discounts * next_q_values
    current_q_values = torch.gather(q_network(obs), dim=1, index=actions.long())
    ours = fused_dqn_loss(
        q_network(obs), actions, rewards, target_network(next_obs), dones, discounts,
        loss="smooth_l1", backend=setting.backend,
    )  # fmt: skip
    same_update(q_network, ours, F.smooth_l1_loss(current_q_values, target_q_values))


def test_tianshou(setting: Setting) -> None:
    """algorithm/modelfree/dqn.py: the returns come ready, (B, 1), from NumPy, as do the actions; td is the priority."""
    q_network, _, obs, _ = networks(setting)
    act = np.random.default_rng(0).integers(A, size=B)
    batch_returns, weight = column(setting, torch.randn(B)), torch.rand(B).to(setting.device)
    q = q_network(obs)[np.arange(B), act]
    td_error = batch_returns.flatten() - q
    ours, td = fused_td_loss(
        q_network(obs), torch.from_numpy(act).to(setting.device), batch_returns,
        weights=weight, return_td_error=True, backend=setting.backend,
    )  # fmt: skip
    same_update(q_network, ours, (td_error.pow(2) * weight).mean())
    assert_agree(td, -td_error.detach())


@pytest.mark.parametrize("one_hot", [False, True])
def test_torchrl(setting: Setting, one_hot: bool) -> None:
    """objectives/dqn.py: (*, 1) rewards and bool terminated, gamma**steps, weights (*,), and a mean over their sum."""
    T = 5
    q_network, target_network = networks(setting)[:2]
    obs, next_obs = (torch.randn(B, T, 8, dtype=torch.float64, device=setting.device) for _ in "ab")
    action = torch.randint(A, (B, T)).to(setting.device)
    if one_hot:
        action = F.one_hot(action, A).argmax(-1)
    reward = torch.randn(B, T, 1).to(setting.device)
    terminated = (torch.rand(B, T, 1) < 0.3).to(setting.device)
    gamma = GAMMA ** torch.randint(1, 4, (B, T, 1)).float().to(setting.device)
    weights = torch.rand(B, T, dtype=torch.float64).to(setting.device)  # of which theirs takes the sum
    pred = torch.gather(q_network(obs), -1, index=action.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        value = target_network(next_obs).max(-1, keepdim=True).values
        target = (reward + gamma * (1 - terminated.to(reward.dtype)) * value).squeeze(-1)
    loss = F.smooth_l1_loss(pred, target, reduction="none")
    ours, td = fused_dqn_loss(
        q_network(obs), action, reward, target_network(next_obs), terminated, gamma, weights=weights,
        loss="smooth_l1", reduction="weighted_mean", return_td_error=True, backend=setting.backend,
    )  # fmt: skip
    same_update(q_network, ours, (loss * weights).sum() / weights.sum())
    assert_agree(td.square(), (pred - target).square().detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_skrl(setting: Setting, dtype: torch.dtype) -> None:
    """agents/torch/ddqn: half-precision Q-values under autocast meet float32 rewards; (B, 1), terminated is bool."""
    q_network, target_network, obs, next_obs = networks(setting, torch.float32)
    actions, rewards = column(setting, torch.randint(A, (B,))), column(setting, torch.randn(B))
    terminated = column(setting, torch.rand(B) < 0.3)
    with torch.autocast(setting.device, dtype=dtype):
        q, online, next_q = q_network(obs), q_network(next_obs), target_network(next_obs)
        assert q.dtype == next_q.dtype == dtype
        with torch.no_grad():
            best = torch.argmax(online, dim=1, keepdim=True)
            target_values = rewards + GAMMA * terminated.logical_not() * torch.gather(next_q, 1, best)
        theirs = F.mse_loss(torch.gather(q, dim=1, index=actions), target_values)
        ours = fused_dqn_loss(
            q, actions, rewards, next_q, terminated, GAMMA, next_q_online=online, backend=setting.backend
        )
    assert ours.dtype == torch.float32
    expected = oracle(q, actions, rewards, next_q, terminated, GAMMA, next_q_online=online)
    got, yardstick = (torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in (ours, theirs))
    assert_close("loss", ours, expected.loss, theirs)
    assert_close("grad_q", got, expected.grad_q, yardstick)


@pytest.mark.parametrize("final", [0.3, 1.0])
def test_pytorch_tutorial(setting: Setting, final: float) -> None:
    """reinforcement_q_learning.py: next states of the non-final transitions only, (M, A), possibly none of them."""
    policy_net, target_net, state_batch, next_states = networks(setting)
    action_batch, reward_batch = column(setting, torch.randint(A, (B,))), torch.randn(B).to(setting.device)
    non_final_mask = (torch.rand(B) >= final).to(setting.device)
    next_state_values = torch.zeros(B, dtype=torch.float64, device=setting.device)
    with torch.no_grad():
        next_q = target_net(next_states[non_final_mask])
        if len(next_q):
            next_state_values[non_final_mask] = next_q.max(1).values
    expected = (next_state_values * GAMMA) + reward_batch
    theirs = F.smooth_l1_loss(policy_net(state_batch).gather(1, action_batch), expected.unsqueeze(1))
    ours = fused_dqn_loss(
        policy_net(state_batch), action_batch, reward_batch, next_q, gamma=GAMMA,
        non_final_mask=non_final_mask, loss="smooth_l1", backend=setting.backend,
    )  # fmt: skip
    same_update(policy_net, ours, theirs)


def test_rllib(setting: Setting) -> None:
    """dqn_torch_learner.py: (B,) with bool terminateds, gamma**n_step, int32 actions, weights after Huber, |td|."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards, terminateds = (
        x.to(setting.device) for x in (torch.randint(A, (B,)).int(), torch.randn(B), torch.rand(B) < 0.3)
    )
    weights, n_step = torch.rand(B).to(setting.device), torch.randint(1, 4, (B,)).to(setting.device)
    with torch.no_grad():
        best = q_network(next_obs).argmax(1, keepdim=True)
        value = target_network(next_obs).gather(1, best).squeeze(1)
        target = rewards + GAMMA**n_step * value * (1 - terminateds.float())
    taken = q_network(obs).gather(1, actions.long().unsqueeze(1)).squeeze(1)
    theirs = (weights * F.huber_loss(taken, target, reduction="none")).mean()
    ours, td = fused_dqn_loss(
        q_network(obs), actions, rewards, target_network(next_obs), terminateds, GAMMA**n_step,
        next_q_online=q_network(next_obs), weights=weights, loss="huber", return_td_error=True, backend=setting.backend,
    )  # fmt: skip
    same_update(q_network, ours, theirs)
    assert_agree(td.abs(), (taken - target).abs().detach())


def test_agilerl(setting: Setting) -> None:
    """dqn.py: one online forward on both states; the halves are slices, the second one still in the graph."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards, dones = (
        column(setting, x) for x in (torch.randint(A, (B,)), torch.randn(B), (torch.rand(B) < 0.3).int())
    )
    both = q_network(torch.cat([obs, next_obs]))
    with torch.no_grad():
        value = target_network(next_obs).gather(1, both[B:].detach().argmax(1, keepdim=True))
        target = rewards + GAMMA * value * (1 - dones)
    theirs = F.mse_loss(both[:B].gather(1, actions), target)
    ours = fused_dqn_loss(
        both[:B],
        actions,
        rewards,
        target_network(next_obs),
        dones,
        GAMMA,
        next_q_online=both[B:],
        backend=setting.backend,
    )
    same_update(q_network, ours, theirs)


def test_ilql(setting: Setting) -> None:
    """Token-level Q-learning: (B, T, V) sliced in time, V(s') as the target, and CQL as a cross-entropy."""
    T, V = 7, 90
    head = nn.Linear(8, V).to(setting.device, torch.float64)
    hidden = torch.randn(4, T, 8, dtype=torch.float64, device=setting.device)
    tokens = torch.randint(V, (4, T), device=setting.device)
    rewards, values = (torch.randn(4, T - 1, device=setting.device) for _ in "ab")
    terminals = (torch.rand(4, T - 1) < 0.2).long().to(setting.device)
    q = head(hidden)[:, :-1]
    target = rewards + GAMMA * (1 - terminals) * values
    taken = q.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    cross_entropy = F.cross_entropy(q.reshape(-1, V), tokens[:, 1:].reshape(-1))
    theirs = (taken - target).square().mean() + 0.01 * cross_entropy
    ours, cql = fused_td_loss(q, tokens[:, 1:], target, cql_alpha=0.01, return_cql=True, backend=setting.backend)
    same_update(head, ours, theirs)
    assert_agree(cql.mean(), cross_entropy.detach())


def test_munchausen_of_acme(setting: Setting) -> None:
    """agents/jax/dqn/losses.py: the expectation of q - tau log pi, which is the soft value; clipped at -1."""
    q_network, target_network, obs, next_obs = networks(setting)
    actions, rewards, discount = (
        x.to(setting.device) for x in (torch.randint(A, (B,)), torch.randn(B), GAMMA * (torch.rand(B) < 0.8))
    )
    tau, alpha = 0.03, 0.9
    with torch.no_grad():
        target_q, next_q = target_network(obs), target_network(next_obs)
        policy = F.softmax(next_q / tau, -1)
        value = (policy * (next_q - tau * F.log_softmax(next_q / tau, -1))).sum(-1)
        bonus = tau * F.log_softmax(target_q / tau, -1).gather(1, actions[:, None]).squeeze(1)
        target = rewards + alpha * bonus.clamp(-1, 0) + discount * value
    theirs = F.huber_loss(q_network(obs).gather(1, actions[:, None]).squeeze(1), target)
    ours = fused_dqn_loss(
        q_network(obs), actions, rewards, next_q, gamma=discount, loss="huber",
        target=Munchausen(tau, alpha), target_q=target_q, backend=setting.backend,
    )  # fmt: skip
    same_update(q_network, ours, theirs)
