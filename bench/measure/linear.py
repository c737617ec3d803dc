"""The linear head: fused, with Q matrices as users write it, and as an expert would write it by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import cuda, machine
from bench.measure.gate import passed
from bench.measure.memory import peak_memory
from bench.measure.providers import Provider
from bench.measure.timing import figures, interleaved, timer
from bench.measure.variants import CQL_ALPHA, GAMMA, Arguments, dtype_name
from bench.reporting.results import Row
from dqn_fused import Munchausen, fused_dqn_loss, fused_linear_dqn_loss
from dqn_fused._backends import serving

N = 256
ACTIONS = (1_000, 10_000, 50_257, 151_936)
FEATURES = (64, 512, 1024)
LARGE = 50_000_000  # weights from which a round takes seconds
CHUNK = 8192  # actions that the expert takes at a time
# What each variant but the plain one gives to the loss beside its tensors.
OPTIONS: dict[str, Arguments] = {"double": {}, "cql": {"cql_alpha": CQL_ALPHA}, "munchausen": {"target": "munchausen"}}


class Work(NamedTuple):
    A: int
    D: int
    variant: str = "dqn"
    dtype: torch.dtype = torch.float32
    n: int = N

    def __str__(self) -> str:
        return f"{self.A} x {self.D} {self.variant} {dtype_name(self.dtype)}"


def quick(device: str, variants: list[str]) -> list[Work]:
    return [Work(10_000, 64)]


def full(device: str, variants: list[str]) -> list[Work]:
    """In half precision only on a GPU."""
    work = [Work(A, D) for D in FEATURES for A in ACTIONS] + [Work(50_257, 512, variant) for variant in OPTIONS]
    if device == "cuda":
        work += [Work(A, D, dtype=torch.bfloat16) for D in FEATURES[1:] for A in ACTIONS[2:]]
    return work


def random_arguments(work: Work, device: str, seed: int = 0) -> Arguments:
    torch.manual_seed(seed)
    n, A, D = work.n, work.A, work.D

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(work.dtype)

    arguments = {
        "hidden": normal(n, D).requires_grad_(),
        "weight": (normal(A, D) / D**0.5).requires_grad_(),
        "bias": normal(A).requires_grad_(),
        "actions": torch.randint(A, (n,), device=device),
        "rewards": torch.randn(n, device=device),
        "next_hidden": normal(n, D),
        "next_weight": normal(A, D) / D**0.5,
        "next_bias": normal(A),
        "terminated": torch.rand(n, device=device) < 0.1,
    }
    more = {"double": "next_hidden_online", "munchausen": "target_hidden"}.get(work.variant)
    return arguments | ({} if more is None else {more: normal(n, D)})


def eager_loss(a: Arguments, cql_alpha: float = 0.0, target: str = "max") -> Tensor:
    """nn.Linear layers and the lines of a DQN script."""
    taken = a["actions"].unsqueeze(1)
    with torch.no_grad():
        next_q = F.linear(a["next_hidden"], a["next_weight"], a["next_bias"])
        bonus: float | Tensor = 0.0
        if target == "munchausen":
            constants, tau = Munchausen(), Munchausen().temperature
            target_q = F.linear(a["target_hidden"], a["next_weight"], a["next_bias"])
            log_policy = tau * torch.log_softmax(target_q / tau, 1).gather(1, taken).squeeze(1)
            bonus = constants.alpha * log_policy.clamp(constants.clip, 0)
            value = tau * torch.logsumexp(next_q / tau, 1)
        elif "next_hidden_online" in a:
            best = F.linear(a["next_hidden_online"], a["weight"], a["bias"]).argmax(1, keepdim=True)
            value = next_q.gather(1, best).squeeze(1)
        else:
            value = next_q.max(1).values
        y = a["rewards"] + bonus + GAMMA * value * (1 - a["terminated"].float())
    q = F.linear(a["hidden"], a["weight"], a["bias"])
    value = q.gather(1, taken).squeeze(1).float()
    loss = F.mse_loss(value, y)
    return loss + cql_alpha * (torch.logsumexp(q.float(), 1) - value).mean() if cql_alpha else loss


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
    return F.mse_loss(taken.float(), target)


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


def matrix_loss(a: Arguments, **options: Any) -> Tensor:
    """nn.Linear layers and the fused loss of their matrices."""
    layers = {"next_q_online": ("next_hidden_online", "weight", "bias")}
    layers["target_q"] = ("target_hidden", "next_weight", "next_bias")
    with torch.no_grad():
        next_q = F.linear(a["next_hidden"], a["next_weight"], a["next_bias"])
        more: Arguments = {
            name: F.linear(*(a[part] for part in parts)) for name, parts in layers.items() if parts[0] in a
        }
    q = F.linear(a["hidden"], a["weight"], a["bias"])
    loss = fused_dqn_loss(q, a["actions"], a["rewards"], next_q, a["terminated"], GAMMA, **more, **options)
    assert isinstance(loss, Tensor)
    return loss


def fused_loss(a: Arguments, **options: Any) -> Any:
    return fused_linear_dqn_loss(**a, gamma=GAMMA, **options)


LOSSES: dict[str, Callable[..., Any]] = {
    "eager": eager_loss,
    "expert": expert_loss,
    "matrix": matrix_loss,
    "fused": fused_loss,
    "fused, sparse": partial(fused_loss, sparse_grad=True),
}
PRODUCT = "linear"  # one product of the size of the matrix and nothing else


def losses(work: Work, device: str) -> dict[str, Callable[[Arguments], Any]]:
    """On a GPU each backend as well, whatever "auto" takes. The conservative term has no sparse gradient."""
    found = dict(LOSSES)
    if work.variant in ("cql", "munchausen"):
        del found["expert"]
    if work.variant == "cql":
        del found["fused, sparse"]
    if device != "cpu":
        found |= {f"fused[{name}]": partial(fused_loss, backend=name) for name in serving(torch.device(device))}
    return {name: partial(loss, **OPTIONS.get(work.variant, {})) for name, loss in found.items()}


def step(loss: Callable[[Arguments], Any], a: Arguments) -> tuple[Tensor, ...]:
    """One forward and backward: (loss, gradients of hidden, weight and bias)."""
    value = loss(a)
    return value, *torch.autograd.grad(value, [a[name] for name in ("hidden", "weight", "bias")])


def measure(work: Work, device: str, seconds: float, problems: list[str], rounds: int | None = None) -> list[Row]:
    arguments = random_arguments(work, device)
    found = passed(
        {name: partial(Provider, partial(step, loss, arguments)) for name, loss in losses(work, device).items()},
        work.dtype,
        work,
        problems,
    )
    if not found:
        return []
    calls: dict[str, Callable[[], object]] = {name: provider.call for name, provider in found.items()}
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    calls[PRODUCT] = partial(F.linear, *(arguments[name] for name in ("next_hidden", "next_weight", "next_bias")))
    times = interleaved(
        {name: timer(call) for name, call in calls.items()}, seconds, rounds or (7 if work.A * work.D < LARGE else 5)
    )
    on_device = {name: cuda.device_us(call) for name, call in calls.items()} if device == "cuda" else {}
    about = machine.about("linear", device)
    return [
        about
        | {"variant": work.variant, "n": work.n, "A": work.A, "D": work.D}
        | {"dtype": dtype_name(work.dtype), "provider": name}
        | figures(times[name], times["eager"])._asdict()
        | {"device_us": on_device.get(name, ""), "peak_bytes": peaks.get(name, "")}
        for name in calls
    ]
