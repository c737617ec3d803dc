"""Train the CartPole agent, then compare the loss on that agent's own replay batches, fused against eager."""

from functools import partial
from statistics import median

import torch

from bench.measure.providers import step
from bench.measure.timing import interleaved, timer
from bench.measure.variants import GAMMA, Arguments, eager_loss
from dqn_fused import fused_dqn_loss
from examples.cartpole import Args, Run, plot, report, train


def run(plot_path: str, seed: int) -> None:
    torch.set_num_threads(1)  # the layers are too small for several threads
    result = train(Args(seed=seed, plot=plot_path))
    report(result)
    plot(result, plot_path)
    print(f"learning curve: {plot_path}\n")
    compare(result)


def compare(result: Run) -> None:
    print("The loss, forward and backward, on batches of the agent's own replay buffer:\n")
    print("| batch | fused loss | eager loss | difference | largest dq difference | fused | eager | times as fast |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for n in (32, 128, 512, 2048):
        batch = replay_batch(result, n)
        calls = {"fused": step(partial(fused_dqn_loss, gamma=GAMMA), batch), "eager": step(eager_loss, batch)}
        (fused, fused_grad), (eager, eager_grad) = calls["fused"](), calls["eager"]()
        times = interleaved({name: timer(call) for name, call in calls.items()})
        ratio = median(e / f for e, f in zip(times["eager"], times["fused"], strict=True))
        print(
            f"| {n} | {fused.item():.7f} | {eager.item():.7f} | {abs(fused.item() - eager.item()):.1e} "
            f"| {(fused_grad - eager_grad).abs().max().item():.1e} | {1e6 * median(times['fused']):.0f} us "
            f"| {1e6 * median(times['eager']):.0f} us | {ratio:.2f} |"
        )


def replay_batch(result: Run, n: int) -> Arguments:
    sample = result.buffer.sample(n)
    with torch.no_grad():
        q, next_q = result.q_network(sample.obs), result.target_network(sample.next_obs)
    return {
        "q": q.requires_grad_(),
        "actions": sample.actions,
        "rewards": sample.rewards,
        "next_q": next_q,
        "terminated": sample.terminated,
    }
