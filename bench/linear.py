"""The linear head: fused, with Q matrices as users write it, and as an expert would write it by hand."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.grid import machine
from bench.memory import peak_memory
from bench.providers import GAMMA, Arguments
from bench.timing import interleaved
from dqn_fused import fused_dqn_loss, fused_linear_dqn_loss

N = 256
ACTIONS = (1_000, 10_000, 50_257, 151_936)
FEATURES = (64, 512, 1024)
CHUNK = 8192  # actions that the expert takes at a time


def random_arguments(n: int, A: int, D: int, double: bool, device: str) -> Arguments:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    arguments = {
        "hidden": normal(n, D).requires_grad_(),
        "weight": (normal(A, D) / D**0.5).requires_grad_(),
        "bias": normal(A).requires_grad_(),
        "actions": torch.randint(A, (n,), device=device),
        "rewards": normal(n),
        "next_hidden": normal(n, D),
        "next_weight": normal(A, D) / D**0.5,
        "next_bias": normal(A),
        "terminated": torch.rand(n, device=device) < 0.1,
    }
    return arguments | ({"next_hidden_online": normal(n, D)} if double else {})


def eager_loss(a: Arguments) -> Tensor:
    """Two nn.Linear layers and the lines of a DQN script."""
    with torch.no_grad():
        next_q = F.linear(a["next_hidden"], a["next_weight"], a["next_bias"])
        if "next_hidden_online" in a:
            best = F.linear(a["next_hidden_online"], a["weight"], a["bias"]).argmax(1, keepdim=True)
            value = next_q.gather(1, best).squeeze(1)
        else:
            value = next_q.max(1).values
        target = a["rewards"] + GAMMA * value * (1 - a["terminated"].float())
    q = F.linear(a["hidden"], a["weight"], a["bias"])
    return F.mse_loss(q.gather(1, a["actions"].unsqueeze(1)).squeeze(1), target)


def expert_loss(a: Arguments) -> Tensor:
    """The same with one dot product a sample, and the maximum in chunks."""
    with torch.no_grad():
        if "next_hidden_online" in a:
            _, index = _chunked_max(a["next_hidden_online"], a["weight"], a["bias"])
            value = (a["next_hidden"] * a["next_weight"][index]).sum(-1) + a["next_bias"][index]
        else:
            value, _ = _chunked_max(a["next_hidden"], a["next_weight"], a["next_bias"])
        target = a["rewards"] + GAMMA * value * (1 - a["terminated"].float())
    taken = (a["hidden"] * a["weight"][a["actions"]]).sum(-1) + a["bias"][a["actions"]]
    return F.mse_loss(taken, target)


def _chunked_max(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    best, index = None, None
    for start in range(0, len(weight), CHUNK):
        value, where = F.linear(hidden, weight[start : start + CHUNK], bias[start : start + CHUNK]).max(1)
        if best is None or index is None:
            best, index = value, where
        else:
            index = torch.where(value > best, where + start, index)
            best = torch.maximum(best, value)
    assert best is not None
    assert index is not None
    return best, index


def matrix_loss(a: Arguments) -> Tensor:
    """Two nn.Linear layers and the fused loss of their matrices."""
    with torch.no_grad():
        next_q = F.linear(a["next_hidden"], a["next_weight"], a["next_bias"])
        online = a.get("next_hidden_online")
        online = None if online is None else F.linear(online, a["weight"], a["bias"])
    q = F.linear(a["hidden"], a["weight"], a["bias"])
    loss = fused_dqn_loss(q, a["actions"], a["rewards"], next_q, a["terminated"], GAMMA, next_q_online=online)
    assert isinstance(loss, Tensor)
    return loss


LOSSES: dict[str, Callable[[Arguments], Any]] = {
    "eager": eager_loss,
    "expert": expert_loss,
    "matrix": matrix_loss,
    "fused": lambda a: fused_linear_dqn_loss(**a, gamma=GAMMA),
    "fused, sparse": lambda a: fused_linear_dqn_loss(**a, gamma=GAMMA, sparse_grad=True),
}


def step(loss: Callable[[Arguments], Any], a: Arguments) -> tuple[Tensor, ...]:
    """One forward and backward: (loss, gradients of hidden, weight and bias)."""
    value = loss(a)
    return value, *torch.autograd.grad(value, [a[name] for name in ("hidden", "weight", "bias")])


def check(results: dict[str, tuple[Tensor, ...]]) -> None:
    """No figure without the right result."""
    for name, result in results.items():
        for got, expected in zip(result, results["eager"], strict=True):
            try:
                torch.testing.assert_close(got.to_dense(), expected, rtol=1e-3, atol=1e-5)
            except AssertionError as error:
                raise AssertionError(f"{name} differs from eager: {error}") from error


def measure(n: int, A: int, D: int, double: bool, device: str, seconds: float) -> list[dict[str, Any]]:
    arguments = random_arguments(n, A, D, double, device)
    calls: dict[str, Callable[[], object]] = {name: partial(step, loss, arguments) for name, loss in LOSSES.items()}
    check({name: call() for name, call in calls.items()})  # type: ignore[misc]
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    calls["linear"] = lambda: F.linear(arguments["next_hidden"], arguments["next_weight"], arguments["next_bias"])
    times = interleaved(calls, seconds, rounds=9)
    rows = []
    for name, values in times.items():
        ordered = sorted(values)
        rows.append(
            {
                "variant": "double" if double else "dqn",
                "n": n,
                "A": A,
                "D": D,
                "dtype": "float32",
                "provider": name,
                "ms": round(1e3 * median(ordered), 3),
                "ms_p20": round(1e3 * ordered[len(ordered) // 5], 3),
                "ms_p80": round(1e3 * ordered[len(ordered) * 4 // 5], 3),
                "speedup": round(median(e / t for e, t in zip(times["eager"], values, strict=True)), 2),
                "of_linear": round(median(t / f for f, t in zip(times["linear"], values, strict=True)), 2),
                "peak_bytes": peaks.get(name, ""),
            }
        )
    return rows


def run(out: Path, seconds: float) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    work = [(A, D, False) for A in ACTIONS for D in FEATURES] + [(50_257, 512, True)]
    rows = []
    for A, D, double in tqdm(work, desc="heads"):
        rows += [about | row for row in measure(N, A, D, double, device, seconds)]
    path = out / f"linear-{device}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(f"\n{about['device']}, {about['threads']} threads, torch {about['torch']}; written to {path}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds of forward and backward, times as fast as eager, MB at the peak."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| A x D | " + " | ".join(providers) + " |", "|---|" + "---:|" * len(providers)]
    sizes = dict.fromkeys((row["A"], row["D"], row["variant"]) for row in rows)
    for A, D, variant in sizes:
        found = {row["provider"]: row for row in rows if (row["A"], row["D"], row["variant"]) == (A, D, variant)}
        label = f"{A:,} x {D}" + (" double" if variant == "double" else "")
        lines.append(f"| {label} | " + " | ".join(cell(found[p]) for p in providers) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    text = f"{row['ms']:,.1f} ms ({row['speedup']:.2f}x)"
    return text if row["peak_bytes"] == "" else f"{text}, {row['peak_bytes'] / 1e6:,.1f} MB"
