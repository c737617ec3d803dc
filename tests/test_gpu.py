"""What only a GPU shows: streams, graphs, several live losses, more than 2^31 elements, no synchronisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import assert_close
from oracle import oracle
from test_loss import compact, dtype_id, make

import dqn_fused
from bench.measure.cuda import captured
from dqn_fused import backends, fused_dqn_loss, fused_dqn_loss_and_grad, fused_linear_dqn_loss, warmup
from dqn_fused._backends import serving

pytestmark = pytest.mark.gpu

NAMES = serving(torch.device("cuda"))


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_library_that_was_built_loads() -> None:
    """Otherwise its tests would not fail but be absent."""
    if (Path(dqn_fused.__file__).parent / "_C_cuda.so").exists():
        assert "cuda" not in backends()["compiled"].reason, backends()["compiled"].reason


def step(arguments: dict[str, Any], backend: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q = arguments["q"].detach().requires_grad_()
    loss = fused_dqn_loss(**{**arguments, "q": q}, **options, backend=backend)
    assert isinstance(loss, torch.Tensor)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


def family(name: str, shape: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and options of a loss that takes many of them."""
    arguments = make(shape, device="cuda")
    legal = torch.rand(shape, device="cuda") < 0.7
    legal[:, 0] = True
    if name == "prioritised":
        arguments |= {"next_q_online": torch.randn(shape, device="cuda"), "next_action_mask": legal}
        arguments["weights"] = torch.rand(shape[0], device="cuda")
        return arguments, {"loss": "huber", "reduction": "weighted_mean"}
    arguments |= {"target_q": torch.randn(shape, device="cuda"), "action_mask": legal}
    return arguments, {"target": "munchausen", "cql_alpha": 0.5}


@pytest.mark.parametrize("name", ["prioritised", "munchausen-cql"])
@pytest.mark.parametrize("shape", [(40, 17), (48, 9001)])
def test_a_capture_right_after_warmup(backend: str, shape: tuple[int, int], name: str) -> None:
    """Sizes of no other test, so that nothing is compiled before."""
    static, options = family(name, shape)
    warmup(**static, **options, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fused_dqn_loss_and_grad(**static, **options, backend=backend)
    graph.replay()
    expected = oracle(**static, **options)
    assert_close("loss", result[0], expected.loss)
    assert_close("grad_q", result[1], expected.grad_q)


@pytest.mark.parametrize("name", ["prioritised", "munchausen-cql"])
@pytest.mark.parametrize("shape", [(32, 18), (64, 50257)])
def test_no_synchronisation_and_graphs_in_the_family(backend: str, shape: tuple[int, int], name: str) -> None:
    static, options = family(name, shape)
    expected = step(static, backend, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(static, backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, grad = captured(lambda: step(static, backend, **options))()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("double", [False, True], ids=["max", "double"])
def test_linear_head_without_synchronisation_and_in_a_graph(backend: str, double: bool, dtype: torch.dtype) -> None:
    n, A, D = 64, 50257, 512
    hidden, next_hidden, online = (torch.randn(n, D, dtype=dtype, device="cuda") for _ in range(3))
    weight, next_weight = (torch.randn(A, D, dtype=dtype, device="cuda") / D**0.5 for _ in range(2))
    rest = make((n, A), device="cuda")
    del rest["q"], rest["next_q"]
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def call() -> tuple[torch.Tensor, ...]:
        loss = fused_linear_dqn_loss(
            hidden, weight, next_hidden=next_hidden, next_weight=next_weight,
            next_hidden_online=online if double else None, backend=backend, **rest,
        )  # fmt: skip
        assert isinstance(loss, torch.Tensor)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    expected = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, value in zip(captured(call)(), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", [(32, 4), (1024, 18), (16384, 18), (64, 128256)])
def test_no_synchronisation(backend: str, shape: tuple[int, int], dtype: torch.dtype, form: Any) -> None:
    arguments = form(make(shape, dtype, "cuda"))
    step(arguments, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(arguments, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", [(32, 4), (16384, 18), (64, 50257)])
def test_cuda_graph(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Captured once, replayed on other data."""
    static = make(shape, dtype, "cuda")
    replay = captured(lambda: step(static, backend))
    for seed in (1, 2):
        fresh = make(shape, dtype, "cuda", seed=seed)
        for name, x in fresh.items():
            static[name].copy_(x)
        loss, grad = replay()
        expected = step(fresh, backend)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


def test_second_stream(backend: str) -> None:
    """The current stream is used: inputs written late on that stream are still seen."""
    arguments = make((512, 1000), device="cuda")
    expected = step(arguments, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {name: torch.empty_like(x) for name, x in arguments.items()}
        torch.cuda._sleep(20_000_000)
        for name, x in arguments.items():
            late[name].copy_(x)
        loss, grad = step(late, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def test_more_than_2_31_elements(backend: str) -> None:
    """Row offsets are int64 before the multiplication: the last row lies behind 2^31 elements."""
    n, A = 17_000, 128_256
    q = torch.zeros(n, A, dtype=torch.float16, device="cuda")
    assert q.numel() > 2**31
    actions = torch.full((n,), A - 1, device="cuda")
    q[-1, -1], q[-1, 0] = 3.0, 7.0
    q.requires_grad_()
    rewards, ends = torch.zeros(n, device="cuda"), torch.zeros(n, dtype=torch.bool, device="cuda")
    per_sample, td_error = fused_dqn_loss(
        q, actions, rewards, q.detach(), ends, 0.5, reduction="none", return_td_error=True, backend=backend
    )
    assert td_error[-1].item() == 3.0 - 0.5 * 7.0
    assert td_error[:-1].abs().max().item() == 0.0
    (grad,) = torch.autograd.grad(per_sample, q, torch.ones_like(per_sample))
    assert grad[-1, -1].item() == -1.0
    assert torch.count_nonzero(grad).item() == 1


def test_more_than_2_31_elements_in_two_leading_dimensions(backend: str) -> None:
    B, T, A = 2, 8_501, 128_256
    q = torch.zeros(B, T, A, dtype=torch.float16, device="cuda")
    q[-1, -1, -1], q[-1, -1, 0] = 3.0, 7.0
    shape = (B, T - 1)
    actions = torch.full(shape, A - 1, device="cuda")
    td_error = fused_dqn_loss(
        q[:, 1:], actions, torch.zeros(shape, device="cuda"), q[:, 1:], gamma=0.5, return_td_error=True, backend=backend
    )[1]
    assert td_error[-1, -1].item() == 3.0 - 0.5 * 7.0
    assert torch.count_nonzero(td_error).item() == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_not_the_current_one(backend: str) -> None:
    arguments = {name: x.to("cuda:1") for name, x in make((33, 19), device="cuda:0").items()}
    torch.cuda.set_device(0)
    loss, grad = step(arguments, backend)
    assert loss.device == grad.device == torch.device("cuda:1")


def test_peak_memory(backend: str) -> None:
    """Outputs and O(n): the gradient, and in the split forward one partial maximum a split."""
    if backend == "torch":
        pytest.skip("eager operations allocate what they like")
    n, A = 64, 128_256
    arguments = make((n, A), device="cuda")
    step(arguments, backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Requested, not allocated: the allocator rounds a large block up to 2 MiB.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    step(arguments, backend)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - before <= 4 * n * A + 4 * n * 64 + 65_536
