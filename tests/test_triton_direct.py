"""Direct launches: the kernels that Triton would choose, with the arguments that it would pass."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from categorical_data import ready
from conftest import INTERPRETED
from test_family import VARIANTS, compacted, variant
from test_loss import compact, dtype_id, make
from torch import Tensor

triton = pytest.importorskip("triton")

from distributions import CATEGORICAL, QUANTILE, Family  # noqa: E402
from dqn_fused.kernels.launch import MOST  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from bench.gpu_code import aot, host  # noqa: E402
from dqn_fused import BackendUnavailableError  # noqa: E402
from dqn_fused._backends import triton_backend, triton_program, triton_td_loss  # noqa: E402
from dqn_fused.arguments import Batch, LossSpec  # noqa: E402
from dqn_fused.categorical_arguments import CategoricalSpec  # noqa: E402
from dqn_fused.quantile_arguments import QuantileSpec  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")

F32 = torch.float32
Calls = dict[str, Callable[[], object]]


class Launched(NamedTuple):
    """What a launcher was given; addresses for tensors."""

    kernel: str
    function: int
    grid: tuple[int, ...]
    stream: int
    arguments: list[tuple[type, Any]]


class Stub:
    """Records launches, and how many of them Triton's binder made."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.bound = 0
        self.used, self.shift = 0, 0
        self.memory = torch.zeros(1 << 22, dtype=torch.uint8)
        self.driver: host.Driver

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *more: Any) -> None:
        _, launch_metadata, enter, leave, *given = more
        if enter is not None:
            enter(launch_metadata)
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in given]
        self.launches.append(
            Launched(self.driver.loaded[function - 1], function, (x, y, z), stream, [(type(a), a) for a in arguments])
        )
        if leave is not None:
            leave(launch_metadata)

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        """The same addresses in every call."""
        shape = torch.Size(shape)
        size = shape.numel() * dtype.itemsize
        if size > self.memory.numel() // 8:
            return self.memory[: dtype.itemsize].view(dtype).expand(shape)  # it is never written
        start = -(-self.used // 256) * 256 + self.shift
        self.used = start + size
        return self.memory[start : self.used].view(dtype).view(shape)

    def full(self, shape: Any, value: float, dtype: torch.dtype, device: Any = None) -> Tensor:
        return self.empty(shape, (), dtype).fill_(value)

    def of(self, call: Callable[[], object]) -> list[Launched]:
        """What a call launches."""
        self.launches, self.bound, self.used = [], 0, 0
        call()
        return self.launches

    def by_triton(self, call: Callable[[], object]) -> list[Launched]:
        with host.by_triton():
            found = self.of(call)
        assert self.bound == len(found) > 0
        return found

    def directly(self, call: Callable[[], object]) -> list[Launched]:
        found = self.of(call)
        assert self.bound == 0
        return found


@pytest.fixture(params=["sm_90"])
def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    stub = Stub()
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        stub.bound += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    with host.launching(request.param, stub.launch) as stub.driver:
        monkeypatch.setattr(torch, "empty_strided", stub.empty)
        monkeypatch.setattr(torch, "full", stub.full)
        yield stub


def check(stub: Stub, call: Callable[[], object], kept: bool = True) -> list[Launched]:
    """The second call launches without the binder what the binder launches, and so does the first, with it."""
    expected = stub.by_triton(call)
    stub.of(call)  # it may be known already, of a call of the same description
    assert stub.launches == expected
    assert stub.of(call) == expected
    assert stub.bound == (0 if kept else len(expected))
    return expected


def check_each(stub: Stub, several: list[Calls]) -> None:
    """Each as check does, and again when all of them are kept."""
    expected = [{name: check(stub, call) for name, call in calls.items()} for calls in several]
    assert len(triton_program.KEPT) > 0
    for calls, launches in zip(several, expected, strict=True):
        for name, call in calls.items():
            assert stub.directly(call) == launches[name]


OPTIONS = {"loss", "delta", "target", "cql_alpha", "value_transform"}


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", [(32, 18), (520, 40), (3, 130), (2, 3, 5), (3, 5003)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_family(stub: Stub, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = variant(name, shape, dtype)
    options = {key: arguments.pop(key) for key in OPTIONS & arguments.keys()}
    several = [host.calls(form(arguments), **options) for form in (dict, compacted)]
    if dtype is torch.float32:
        several += [host.calls(arguments, reduction=reduction, **options) for reduction in ("none", "sum")]
    check_each(stub, several)


def test_other_descriptions_of_one_loss(stub: Stub) -> None:
    """Whatever Triton specialises on, and the numbers that it does not look at."""
    base = make((32, 18))

    def changed(**new: Any) -> Calls:
        return host.calls({**base, **new})

    several = [changed()]
    for name, x in base.items():
        several.append(changed(**{name: shifted(x)}))
    for dtype in (torch.float16, torch.bfloat16):
        several += [changed(q=base["q"].to(dtype)), changed(next_q=base["next_q"].to(dtype))]
    several += [changed(actions=base["actions"].to(dtype)) for dtype in (torch.int32, torch.int16, torch.uint8)]
    several += [changed(rewards=base["rewards"].to(dtype)) for dtype in (torch.int64, torch.float64, torch.bfloat16)]
    several += [changed(terminated=base["terminated"].to(dtype)) for dtype in (torch.float32, torch.int64)]
    several += [changed(gamma=gamma) for gamma in (0.9, 1.0, torch.tensor(0.9), torch.rand(32))]
    several += [changed(weights=torch.rand(32)), changed(weights=torch.rand(32).double())]
    several += [
        changed(next_action_mask=torch.ones(shape, dtype=torch.bool).expand(32, 18)) for shape in (18, (32, 18))
    ]
    for name in ("q", "next_q"):
        several += [changed(**{name: torch.randn(32, columns)[:, :18]}) for columns in (19, 20, 32)]
        several.append(changed(**{name: torch.randn(18, 32).t()}))
        several.append(changed(**{name: torch.randn(32, 36)[:, ::2]}))
        several.append(changed(**{name: torch.randn(32, 1).expand(32, 18)}))
        several.append(changed(**{name: torch.randn(16, 18).repeat(2, 1).view(32, 18)}))
    check_each(stub, several)


def test_strides_about_2_31(stub: Stub) -> None:
    """Of one row, which has no use for it."""
    several = []
    for name in ("q", "next_q"):
        for stride in (16, 17, 1, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1):
            x = torch.zeros(18).as_strided((1, 18), (stride, 1))
            several.append(host.calls({**make((1, 18)), name: x}))
    check_each(stub, several)


def shifted(x: Tensor) -> Tensor:
    """The same, contiguous, at an address that is no multiple of 16."""
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


@pytest.mark.parametrize("A", [1, 16, 64])
def test_sizes_that_triton_tells_apart(stub: Stub, A: int) -> None:
    """1, multiples of 16 and others; and of the next states, which non_final_mask makes any number of."""
    several = [host.calls(make((n, A))) for n in (1, 2, 15, 16, 17, 32, 257, 1024)]
    for m in (0, 1, 15, 16, 17):
        arguments = make((17, A))
        arguments["terminated"] = torch.arange(17) >= m
        several.append(host.calls(compact(arguments)))
    check_each(stub, several)


def expanded(n: int, *sizes: int, m: int | None = None) -> Batch:
    """Nothing is read or written, so a single element stands for all."""
    x, actions = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    q, next_q = x.expand(n, *sizes), x.expand(n if m is None else m, *sizes)
    return Batch(q, actions.expand(n), x.expand(n), next_q, gamma=0.99, shape=torch.Size((n,)))


def test_as_many_samples_as_are_served(stub: Stub) -> None:
    """More than 2^31 elements, of which the gradient's offsets are int64."""
    several = []
    for n in (MOST - 17, MOST - 16, MOST - 1, MOST):
        batch = expanded(n, 3)
        several.append({"forward": lambda batch=batch: triton_backend.forward(batch, LossSpec())})
        several.append({"loss_and_grad": lambda batch=batch: triton_backend.loss_and_grad(batch, LossSpec())})
    check_each(stub, several)
    kernels = [stub.directly(calls["forward"])[0] for calls in several[::2]]
    for before, after in pairwise(kernels):
        assert before.arguments != after.arguments


def quantile(batch: Batch) -> object:
    return triton_backend.quantile_loss(batch, QuantileSpec(1.0, "mean", "mean"))


def categorical(batch: Batch) -> object:
    return triton_backend.categorical_loss(batch, CategoricalSpec((-1.0, 1.0), 0.0, "mean"))


TOO_LARGE = {
    "samples": lambda: triton_backend.forward(expanded(MOST + 1, 3), LossSpec()),
    "samples, narrow gradient": lambda: triton_backend.loss_and_grad(expanded(MOST + 1, 1), LossSpec()),
    "actions": lambda: triton_backend.forward(expanded(2, MOST + 1), LossSpec()),
    "quantile, samples": lambda: quantile(expanded(MOST + 1, 2, 8)),
    "quantile, quantiles": lambda: quantile(expanded(1, 1, MOST + 1)),
    "quantile, programs": lambda: quantile(expanded(MOST // 2 + 1, 2, 300)),
    "categorical, samples": lambda: categorical(expanded(MOST + 1, 2, 8)),
    "categorical, actions": lambda: categorical(expanded(1, MOST + 1, 8)),
    "gradient, programs": lambda: triton_backend.loss_and_grad(expanded(MOST, 2**12), LossSpec()),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_the_kernels_cannot_count(stub: Stub, name: str) -> None:
    """Their indices are int32. Such batches were launched, and wrapped round: the last rows wrote before the first."""
    with pytest.raises(BackendUnavailableError, match=f"up to {MOST} samples, actions, atoms or programs"):
        TOO_LARGE[name]()
    assert stub.launches == []


@pytest.mark.parametrize("stub", ["sm_80", "gfx942"], indirect=True)
def test_on_other_targets(stub: Stub) -> None:
    check_each(stub, [host.calls(make((32, 18))), host.calls(make((16, 512)))])


DISTRIBUTIONS = ["plain", "float64", "everything", "mask", "none"]


@pytest.mark.parametrize(
    ("family", "variant"),
    [(QUANTILE, variant) for variant in [*DISTRIBUTIONS, "long rows"]]
    + [(CATEGORICAL, variant) for variant in [*DISTRIBUTIONS, "many actions", "hl_gauss"]],
    ids=lambda x: x.input if isinstance(x, Family) else x,
)
def test_the_distributional_losses(stub: Stub, family: Family, variant: str) -> None:
    several = []
    for n in (32, 33):
        arguments, options = family.make((n, 6, 40), torch.float64 if variant == "float64" else F32), {}
        if variant in ("everything", "mask"):
            arguments |= {"weights": torch.rand(n), "gamma": torch.rand(n)}
            arguments["next_action_mask"] = torch.ones(n, 6, dtype=torch.bool)
            if family is QUANTILE:
                arguments |= {"next_quantiles_online": torch.randn(n, 6, 7), "taus": torch.rand(n, 40)}
            else:
                arguments |= {"next_logits_online": torch.randn(n, 6, 40), "support": torch.linspace(-1, 1, 40)}
        if variant == "mask":
            arguments = family.compact(arguments)
        elif variant == "none":
            options["reduction"] = "none"
        elif variant == "long rows":
            arguments["next_quantiles"] = torch.randn(n, 6, 4000)
        elif variant == "many actions":
            arguments = family.make((n, 400, 40))
        elif variant == "hl_gauss":
            arguments, options = ready((n, 6, 40)), {"projection": "hl_gauss"}
        several.append(family.calls(arguments, **options))
    check_each(stub, several)


def test_a_storage_beyond_2_gib_on_rocm(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """There Triton asks for the size of the storage."""
    monkeypatch.setattr(triton_program, "ROCM", True)
    calls = host.calls(make((32, 18)))
    check_each(stub, [calls])
    monkeypatch.setattr(torch.UntypedStorage, "nbytes", lambda self: 2**31)
    stub.of(calls["forward"])
    assert stub.bound == 1


def test_a_wide_row_that_starts_off_a_boundary_is_left_to_triton(stub: Stub) -> None:
    """Whether its pointer can be moved back depends on what stands before it."""
    for next_q in (shifted(torch.randn(8, 200)), torch.randn(8, 201)[:, 1:], torch.randn(8, 4, 201)[:, 1, 1:]):
        calls = host.calls({**make((8, 200)), "next_q": next_q})
        check(stub, calls["forward"], kept=False)


def test_a_minus_sign_that_is_pending(stub: Stub) -> None:
    next_q = torch.randn(32, 18, dtype=torch.complex64).conj().imag
    assert next_q.is_neg()
    seen = stub.of(host.calls({**make((32, 18)), "next_q": next_q})["forward"])
    names = triton_td_loss.td_loss_fwd_kernel.arg_names
    assert seen[-1].arguments[names.index("next_q")][1] != next_q.data_ptr()


def test_an_argument_that_is_given_twice(stub: Stub) -> None:
    """Double DQN with one net first, then with two: the same description."""
    same, other = make((32, 18)), make((32, 18), seed=1)
    first = host.calls({**same, "next_q_online": same["next_q"]})["forward"]
    second = host.calls({**same, "next_q_online": other["next_q"]})["forward"]
    stub.of(first)
    seen = stub.directly(second)
    assert seen == stub.by_triton(second)
    names = triton_td_loss.td_loss_fwd_kernel.arg_names
    assert seen[0].arguments[names.index("next_q_online")] == (int, other["next_q"].data_ptr())


def test_the_current_stream(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    call = host.calls(make((32, 18)))["forward"]
    stub.of(call)
    for stream in (7, 8):
        monkeypatch.setattr(stub.driver, "get_current_stream", lambda device, stream=stream: stream)
        assert [launch.stream for launch in stub.directly(call)] == [stream]


def test_outputs_that_are_not_aligned_are_left_to_triton(stub: Stub) -> None:
    call = host.calls(make((32, 18)))["forward"]
    stub.of(call)
    stub.shift = 4
    expected = stub.by_triton(call)
    assert stub.of(call) == expected
    assert stub.bound == 1
    triton_program.KEPT.clear()
    check(stub, call, kept=False)
    stub.shift = 0
    check(stub, call)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(stub: Stub, hook: str) -> None:
    """As a profiler sets them, once or for good."""
    call = host.calls(make((32, 18)))["forward"]
    stub.of(call)
    seen: list[Any] = []
    chain = getattr(knobs.runtime, hook)
    chain.add(seen.append)
    try:
        stub.of(call)
    finally:
        chain.remove(seen.append)
    assert [x.get()["name"] for x in seen] == ["td_loss_fwd_kernel"]
    assert stub.bound == 1
    stub.directly(call)


def test_hooks_of_a_kernel_are_called(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    call = host.calls(make((32, 18)))["forward"]
    stub.of(call)
    seen: list[Any] = []
    monkeypatch.setattr(triton_td_loss.td_loss_fwd_kernel, "pre_run_hooks", [lambda *a, **k: seen.append(a)])
    stub.of(call)
    assert len(seen) == stub.bound == 1


def test_what_else_decides_what_is_compiled(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    call = host.calls(make((32, 18)))["forward"]
    plain = check(stub, call)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert check(stub, call)[0].function != plain[0].function


def test_stages_that_are_inspected_are_left_to_triton(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton_program.INSPECTED:
        pytest.skip("this triton has no such hook")
    call = host.calls(make((32, 18)))["forward"]
    stub.of(call)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *args: ("key", "hash"))
    stub.of(call)
    assert stub.bound == 1


def test_a_triton_that_is_not_known_launches_by_itself(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_program.KNOWN
    monkeypatch.setattr(triton_program, "KNOWN", False)
    call = host.calls(make((32, 18)))["forward"]
    for _ in range(2):
        stub.of(call)
        assert stub.bound == 1
    assert not triton_program.KEPT


def test_what_takes_the_place_of_run_is_always_called(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor of PTX does, and ahead-of-time compilation."""
    call = host.calls(make((32, 18)))["forward"]
    check(stub, call)
    with aot.compiling() as found:
        call()
        call()
    assert [launch.name for launch in found] == ["td_loss_fwd_kernel"] * 2


def test_no_more_descriptions_are_kept_than_said(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_program, "MOST", 3)
    several = [host.calls(make((n, 2)))["forward"] for n in range(1, 9)]
    for call in several:
        check(stub, call)
        assert len(triton_program.KEPT) <= 3


def test_the_table_of_launches(stub: Stub) -> None:
    from bench.reporting.results import COLUMNS

    rows = list(host.rows(host.CASES[:1], seconds=0.01))
    assert {name for row in rows for name in row} <= set(COLUMNS["host"])
    assert {(row["call"], row["provider"]) for row in rows} == {
        (call, provider)
        for call in ("forward", "backward", "loss_and_grad")
        for provider in (host.DIRECT, host.BY_TRITON)
    }
