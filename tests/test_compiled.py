"""The compiled ops called directly, the inputs that they refuse, and torch.compile of network and loss."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import assert_agree, assert_close
from conftest import Setting
from data import SEED
from oracle import oracle
from test_family import VARIANTS, compacted, variant
from test_loss import REDUCTIONS, check, compact, make
from torch import Tensor, nn

from dqn_fused import backends, fused_dqn_loss, fused_dqn_loss_and_grad
from dqn_fused.arguments import Batch
from dqn_fused.autograd import Saved
from dqn_fused.options import LossSpec, check_loss, packed

built = pytest.mark.skipif(
    not backends()["compiled"].available, reason=f"compiled ops: {backends()['compiled'].reason}"
)


def op_arguments(arguments: dict[str, Any], reduction: str = "mean", check: bool = True) -> tuple[Any, ...]:
    """Arguments of the ops, from those of fused_dqn_loss."""
    from dqn_fused._backends import compiled_backend

    batch, spec = described({"gamma": 0.99} | arguments, reduction)
    return (*compiled_backend._arguments(batch, spec)[:-1], check)


def described(arguments: dict[str, Any], reduction: str) -> tuple[Batch, LossSpec]:
    options = {k: x for k, x in arguments.items() if k in inspect.signature(check_loss).parameters}
    batch = Batch(**{k: x for k, x in arguments.items() if k in Batch._fields and k not in options})
    return batch, check_loss(**options, reduction=reduction)


def three_dimensional() -> dict[str, Any]:
    arguments = make((6, 5))
    q = torch.randn(2, 4, 5)[:, 1:]
    return {**arguments, "q": q, "next_q": torch.randn(2, 3, 5).double(), "gamma": torch.rand(6)}


CASES = {
    "contiguous": lambda: make((7, 3)),
    "bfloat16": lambda: make((7, 3), torch.bfloat16),
    "no_rows": lambda: make((0, 3)),
    "mask": lambda: compact(make((7, 3))),
    "strided": lambda: {**make((7, 3)), "q": torch.randn(3, 7).t(), "next_q": torch.randn(7, 1).expand(7, 3)},
    "three_dimensional": three_dimensional,
    "scalar_gamma": lambda: {**make((7, 3), torch.float64), "gamma": torch.tensor(0.5)},
}  # fmt: skip


@built
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, reduction: str) -> None:
    if case == "no_rows" and reduction == "mean":
        pytest.skip("the mean of nothing is NaN, and opcheck compares NaN with NaN")
    opcheck_all(CASES[case](), reduction)


@built
@pytest.mark.opcheck
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck_of_the_family(name: str, reduction: str) -> None:
    arguments = variant(name, (7, 3))
    opcheck_all(arguments, reduction)
    opcheck_all(compacted(arguments), reduction)


def opcheck_all(arguments: dict[str, Any], reduction: str) -> None:
    from dqn_fused import _ops
    from dqn_fused._backends import boxed

    given = op_arguments(arguments, reduction)
    torch.library.opcheck(_ops.td_loss, given)
    torch.library.opcheck(_ops.td_loss_and_grad, given)
    loss, td, normaliser = _ops.td_loss(*given)
    batch, spec = described(arguments, reduction)
    assert (normaliser is not None) == spec.cql
    saved = Saved.of(batch, spec, td, normaliser)
    torch.library.opcheck(_ops.td_loss_backward, boxed.backward_arguments(torch.ones_like(loss), saved, spec))


@built
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
@pytest.mark.parametrize("shape", [(2000, 17), (64, 5000), (1, 300_000), (3, 200_000)])
def test_the_same_bits_with_any_number_of_threads(shape: tuple[int, int], form: Callable[..., dict[str, Any]]) -> None:
    same_bits(form({**make(shape), "terminated": torch.arange(shape[0]) % 3 == 1}))


@built
@pytest.mark.parametrize("name", ["double-mask", "munchausen-cql-masks-weights-huber"])
@pytest.mark.parametrize("shape", [(2000, 17), (1, 100_000), (3, 70_001)])
def test_the_same_bits_of_the_family(shape: tuple[int, int], name: str) -> None:
    arguments = {**variant(name, shape), "terminated": torch.arange(shape[0]) % 3 == 1}
    loss, grad_q, td_error = same_bits(arguments)
    expected = oracle(**arguments)
    assert_close("loss", loss, expected.loss)
    assert_close("grad_q", grad_q, expected.grad_q)
    assert_close("td_error", td_error, expected.td_error)
    same_bits(compacted(arguments))


def same_bits(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(fused_dqn_loss_and_grad(**arguments, return_td_error=True, backend="compiled"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    return results[0]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_row_maximum_of_every_length(dtype: torch.dtype) -> None:
    """Vector bodies and their tails: each length, with the maximum, a NaN and an infinity at each end."""
    for A in [*range(1, 70), 127, 128, 129, 1000]:
        next_q = -torch.rand(8, A).add(1).to(dtype)
        next_q[0, 0] = next_q[1, -1] = 3
        next_q[2, 0] = next_q[3, -1] = torch.nan
        next_q[4, 0] = -torch.nan
        next_q[5, -1] = torch.inf
        next_q[6] = -torch.inf
        q = torch.zeros(8, A, dtype=dtype)
        zeros = torch.zeros(8)
        _, td = fused_dqn_loss(q, zeros.int(), zeros, next_q, gamma=1.0, return_td_error=True, backend="compiled")
        assert torch.equal(td.nan_to_num(77), -next_q.amax(1).to(td.dtype).nan_to_num(77) + (td.isnan() * 154))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_first_maximum_of_every_length(dtype: torch.dtype) -> None:
    """The first of the legal ones, in each lane, at the borders of a block and behind them, of any stride."""
    for A in [*range(1, 70), 1023, 1024, 1025, 2047, 2049]:
        next_q = torch.arange(8 * A).view(8, A).double()
        online = torch.randint(-2, 3, (8, A)).to(dtype)
        online[0] = -0.0
        online[0, A // 2] = 0.0
        online[1] = -torch.inf
        online[2, -1] = torch.nan
        online[3, -1] = torch.inf
        mask = torch.rand(8, A) < 0.5
        mask[4] = False
        mask[5, -1] = True
        zeros = torch.zeros(8)
        for illegal in (None, mask, mask.t().contiguous().t()):
            best, index = (online if illegal is None else online.masked_fill(~illegal, -torch.inf)).max(1)
            expected = next_q.gather(1, index.unsqueeze(1)).squeeze(1)
            expected[best.isnan()] = torch.nan
            if illegal is not None:
                expected[best == -torch.inf] = torch.nan
            for layout in (online, online.t().contiguous().t()):
                _, td = fused_dqn_loss(
                    torch.zeros(8, A, dtype=torch.float64), zeros.int(), zeros, next_q, gamma=1.0,
                    next_q_online=layout, next_action_mask=illegal, return_td_error=True, backend="compiled",
                )  # fmt: skip
                torch.testing.assert_close(td, -expected, rtol=0, atol=0, equal_nan=True)


@built
def test_error_of_the_exponential() -> None:
    """With a normaliser and td of 0 the conservative gradient is exp(q): 1 ulp of float32 over the whole range."""
    from dqn_fused import _ops

    def exponential(x: Tensor) -> Tensor:
        q = torch.cat([x, torch.zeros(1)]).unsqueeze(0)
        one, zero, action = torch.ones(()), torch.zeros(1), torch.tensor([q.shape[1] - 1])
        rest = (None, q.shape[1], q.dtype, packed(LossSpec(reduction="sum", cql=True, cql_alpha=1.0)))
        return _ops.td_loss_backward(one, zero, action, None, zero.expand(2, 1).contiguous(), q, *rest)[0, :-1]

    x = torch.cat([torch.linspace(-87, 0, 1_000_001), -torch.logspace(-30, 0, 1001)])
    exact = x.double().exp()
    ulp = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 24)
    assert ((exponential(x).double() - exact).abs() / ulp).max() < 1.02
    assert exponential(torch.tensor([0.0, -0.0, -88.0, -1e4, -3e38, -torch.inf])).tolist() == [1, 1, 0, 0, 0, 0]


def test_a_library_that_is_not_there_or_does_not_load(tmp_path: Path) -> None:
    from dqn_fused._backends import compiled_backend

    (tmp_path / "_C_cuda.so").write_text("no library")
    assert "not built for cpu" in str(compiled_backend._load("cpu", tmp_path))
    reason = str(compiled_backend._load("cuda", tmp_path))
    assert f"the cuda library does not fit torch {torch.__version__}: " in reason
    assert "DQN_FUSED_BUILD=cuda" in reason
    for reason, device in zip(compiled_backend._REASONS.values(), ("cpu", "cuda"), strict=True):
        assert compiled_backend.refuses(torch.device(device)) == reason
    assert "expected tensors on cpu or cuda" in str(compiled_backend.refuses(torch.device("meta")))


def capabilities(*words: str) -> list[list[str]]:
    """(instruction set in use, why there is none) with each word in the environment, which a process reads once.

    The processes are forked from one that has imported torch, which takes 2 s.
    """
    code = """
import os, sys
import torch
for word in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["DQN_FUSED_CPU_CAPABILITY"] = word
        from dqn_fused._backends import compiled_backend
        print(compiled_backend.cpu_capability(), compiled_backend._REASONS["cpu"], flush=True)
        os._exit(0)
    os.wait()
"""
    command = [sys.executable, "-c", code, *words]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1) for line in lines]


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_environment_forces_a_version_of_the_cpu_functions() -> None:
    """The one that it names, or the best of the processor if that is less; any other word is refused."""
    from dqn_fused._backends.compiled_backend import CAPABILITIES

    best, *forced, refused = capabilities("", *CAPABILITIES, "sse9")
    for i, (found, _) in enumerate(forced):
        assert found == CAPABILITIES[min(i, CAPABILITIES.index(best[0]))]
    assert len(forced) == len(CAPABILITIES)
    assert refused[0] == "None"
    assert "expected one of default, avx2, avx512, got 'sse9'" in refused[1]


BROKEN = {
    "actions_too_short": lambda a: {**a, "actions": a["actions"][:-1]},
    "actions_floating": lambda a: {**a, "actions": a["actions"].float()},
    "actions_bool": lambda a: {**a, "actions": a["actions"].bool()},
    "rewards_transposed": lambda a: {**a, "rewards": a["rewards"].view(1, -1)},
    "rewards_complex": lambda a: {**a, "rewards": a["rewards"].cfloat()},
    "next_q_narrow": lambda a: {**a, "next_q": a["next_q"][:, 1:]},
    "next_q_short": lambda a: {**a, "next_q": a["next_q"][1:]},
    "next_q_integer": lambda a: {**a, "next_q": a["next_q"].int()},
    "no_actions": lambda a: {**a, "q": a["q"][:, :0], "next_q": a["next_q"][:, :0]},
    "terminated_scalar": lambda a: {**a, "terminated": a["terminated"][0]},
    "mask_of_floats": lambda a: {**a, "terminated": None, "non_final_mask": a["rewards"]},
    "mask_and_terminated": lambda a: {**a, "non_final_mask": a["terminated"]},
    "mask_too_full": lambda a: {**compact(a), "non_final_mask": torch.ones_like(a["terminated"])},
    "mask_too_empty": lambda a: {**compact(a), "non_final_mask": torch.zeros_like(a["terminated"])},
    "gamma_integer": lambda a: {**a, "gamma": a["actions"]},
    "gamma_of_two": lambda a: {**a, "gamma": torch.ones(2)},
    "action_negative": lambda a: {**a, "actions": a["actions"].fill_(-1)},
    "action_too_large": lambda a: {**a, "actions": a["actions"].fill_(2**63 - 1)},
}  # fmt: skip


@built
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("shape", [(9, 4), (3, 5000)], ids=["small", "large"])
def test_broken_inputs_are_refused_by_the_op_too(shape: tuple[int, int], broken: str) -> None:
    """The op is reached past the checks of the public functions: it must refuse by itself."""
    from dqn_fused import _ops

    arguments = BROKEN[broken]({**make(shape), "terminated": torch.arange(shape[0]) == 1})
    for op in (_ops.td_loss, _ops.td_loss_and_grad):
        with pytest.raises(RuntimeError):
            op(*op_arguments(arguments))
    for function in (fused_dqn_loss, fused_dqn_loss_and_grad):
        with pytest.raises((ValueError, TypeError, IndexError)):
            function(**arguments, backend="compiled")


def everything(shape: tuple[int, int]) -> dict[str, Any]:
    return variant("munchausen-cql-masks-weights-huber", shape) | {"gamma": 0.9}


def double(shape: tuple[int, int]) -> dict[str, Any]:
    return variant("double-mask-weights-huber", shape) | {"gamma": 0.9}


BROKEN_FAMILY = {
    "online_short": (double, lambda a: {**a, "next_q_online": a["next_q_online"][1:]}),
    "online_narrow": (double, lambda a: {**a, "next_q_online": a["next_q_online"][:, 1:]}),
    "online_integer": (double, lambda a: {**a, "next_q_online": a["next_q_online"].int()}),
    "online_three_dimensional": (double, lambda a: {**a, "next_q_online": a["next_q_online"].unsqueeze(0)}),
    "online_with_a_soft_target": (double, lambda a: {**a, "target": "soft"}),
    "online_of_all_rows": (double, lambda a: {**compacted(a), "next_q_online": a["next_q_online"]}),
    "next_mask_of_all_rows": (double, lambda a: {**compacted(a), "next_action_mask": a["next_action_mask"]}),
    "next_mask_of_floats": (double, lambda a: {**a, "next_action_mask": a["next_q"]}),
    "next_mask_of_bytes": (double, lambda a: {**a, "next_action_mask": a["next_action_mask"].byte()}),
    "next_mask_transposed": (double, lambda a: {**a, "next_action_mask": a["next_action_mask"].t()}),
    "weights_integer": (double, lambda a: {**a, "weights": a["weights"].int()}),
    "weights_short": (double, lambda a: {**a, "weights": a["weights"][1:]}),
    "weights_transposed": (double, lambda a: {**a, "weights": a["weights"].unsqueeze(0)}),
    "mask_without_a_sum": (double, lambda a: {**a, "action_mask": a["next_action_mask"]}),
    "target_q_without_munchausen": (double, lambda a: {**a, "target_q": a["next_q"]}),
    "no_target_q": (everything, lambda a: {**a, "target_q": None}),
    "target_q_short": (everything, lambda a: {**a, "target_q": a["target_q"][1:]}),
    "mask_short": (everything, lambda a: {**a, "action_mask": a["action_mask"][1:]}),
    "mask_of_a_number_per_sample": (everything, lambda a: {**a, "action_mask": a["terminated"]}),
    "action_too_large": (everything, lambda a: {**a, "actions": a["actions"].fill_(2**63 - 1)}),
    "mask_too_full": (double, lambda a: {**compacted(a), "non_final_mask": torch.ones_like(a["terminated"])}),
}  # fmt: skip


@built
@pytest.mark.parametrize("broken", BROKEN_FAMILY)
@pytest.mark.parametrize("shape", [(9, 4), (3, 5000)], ids=["small", "large"])
def test_broken_inputs_of_the_family_are_refused_by_the_op_too(shape: tuple[int, int], broken: str) -> None:
    from dqn_fused import _ops

    whole, change = BROKEN_FAMILY[broken]
    arguments = change({**whole(shape), "terminated": torch.arange(shape[0]) == 1})
    for op in (_ops.td_loss, _ops.td_loss_and_grad):
        with pytest.raises(RuntimeError):
            op(*op_arguments(arguments))
    for function in (fused_dqn_loss, fused_dqn_loss_and_grad):
        with pytest.raises((ValueError, TypeError, IndexError)) as expected:
            function(**arguments, backend="torch")
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            function(**arguments, backend="compiled")


@built
def test_unchecked_values_stay_inside_in_the_family() -> None:
    from dqn_fused import _ops

    arguments = everything((9, 4)) | {"terminated": torch.zeros(9, dtype=torch.bool)}
    arguments["actions"][2], arguments["actions"][5] = -1, 2**63 - 1
    loss, grad, td, normaliser = _ops.td_loss_and_grad(*op_arguments(arguments, "none", check=False))
    bad = torch.isin(torch.arange(9), torch.tensor([2, 5]))
    assert torch.equal(td.isnan(), bad)
    assert torch.equal(loss.isnan(), bad)
    assert normaliser.isfinite().all()
    assert (grad[bad] == 0).all()
    assert (grad[~bad] != 0).any(1).all()


@built
def test_unchecked_values_stay_inside() -> None:
    """What torch.compile runs: nothing is raised, the bad rows are NaN, and nothing outside is touched."""
    from dqn_fused import _ops

    arguments = make((9, 4))
    arguments["actions"][2], arguments["actions"][5] = -1, 2**63 - 1
    _, grad, td, _ = _ops.td_loss_and_grad(*op_arguments(arguments, check=False))
    assert td.isnan().tolist() == [i in (2, 5) for i in range(9)]
    assert (grad[[2, 5]] == 0).all()
    mask = {**make((9, 4)), "terminated": None, "non_final_mask": torch.ones(9, dtype=torch.bool)}
    _, _, td, _ = _ops.td_loss_and_grad(*op_arguments({**mask, "next_q": mask["next_q"][:3]}, check=False))
    assert td.isnan().tolist() == [i >= 3 for i in range(9)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 5), (0, 4), (4,), (3, 1500)])
def test_loss_and_grad_equals_autograd(
    setting: Setting, shape: tuple[int, ...], form: Callable[..., dict[str, Any]], reduction: str
) -> None:
    arguments = form(make(shape, device=setting.device))
    arguments["q"].requires_grad_()
    expected = oracle(**arguments, reduction=reduction)
    loss, td = fused_dqn_loss(**arguments, reduction=reduction, return_td_error=True, backend=setting.backend)
    (grad,) = torch.autograd.grad(loss.sum(), arguments["q"])
    got = fused_dqn_loss_and_grad(**arguments, reduction=reduction, return_td_error=True, backend=setting.backend)
    for name, x, y in zip(("loss", "grad_q", "td_error"), got, (loss, grad, td), strict=True):
        assert not x.requires_grad, name
        assert x.dtype == y.dtype, name
        assert x.is_contiguous(), name
        assert_close(name, x, getattr(expected, name))
        assert_close(name, y, getattr(expected, name))
    assert len(fused_dqn_loss_and_grad(**arguments, backend=setting.backend)) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loss_and_grad_in_other_dtypes(setting: Setting, dtype: torch.dtype) -> None:
    arguments = make((40, 70), dtype, setting.device)
    q = arguments["q"].requires_grad_()
    fused_dqn_loss(**arguments, backend=setting.backend).backward()
    _, grad = fused_dqn_loss_and_grad(**arguments, backend=setting.backend)
    expected = oracle(**arguments).grad_q
    for found in (grad, q.grad):
        assert found.dtype is dtype
        assert_close("grad_q", found, expected)


@built
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
def test_no_element_is_left_unwritten(form: Callable[..., dict[str, Any]]) -> None:
    """The ops allocate where conftest's poison does not reach: freed NaN of the same size is what they get."""
    for shape in ((33, 19), (128, 2), (300, 1000)):
        arguments = form(make(shape))
        expected = oracle(**arguments)
        for _ in range(3):
            junk = [torch.full(size, torch.nan) for size in (shape, shape[:1], ())]
            del junk
            got = fused_dqn_loss_and_grad(**arguments, return_td_error=True, backend="compiled")
            for name, x in zip(("loss", "grad_q", "td_error"), got, strict=True):
                assert_close(name, x, getattr(expected, name))


@pytest.mark.graph
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("form", [dict, compact], ids=["terminated", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile(backend: str, form: Callable[..., dict[str, Any]], reduction: str) -> None:
    torch.manual_seed(SEED)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    arguments = form(make((8, 3), torch.float64))
    arguments["q"] = torch.randn(8, 4, dtype=torch.float64)

    def step(q: Tensor, **rest: Any) -> Tensor:
        loss = fused_dqn_loss(network(q), **rest, gamma=0.9, reduction=reduction, backend=backend)
        return loss.sum() if isinstance(loss, Tensor) else loss[0]

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        network.zero_grad()
        loss = f(**arguments)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    assert_agree(run(torch.compile(step, fullgraph=True)), run(step))


@pytest.mark.graph
@built
@pytest.mark.parametrize("name", ["double-mask-weights-huber", "munchausen-cql-masks-weights-huber"])
def test_torch_compile_of_the_family(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: fused_dqn_loss(**given), fullgraph=True)
    for shape in ((8, 3), (11, 5)):  # the second time with symbolic sizes
        check(Setting("compiled", "cpu"), variant(name, shape), call=lambda **given: compiled(given))


@built
def test_torch_compile_of_loss_and_grad() -> None:
    arguments = make((8, 3))
    torch._dynamo.reset()
    compiled = torch.compile(fused_dqn_loss_and_grad, fullgraph=True)
    loss, grad = compiled(**arguments)
    expected = oracle(**arguments)
    assert_close("loss", loss, expected.loss)
    assert_close("grad_q", grad, expected.grad_q)
    arguments["actions"][1] = 7  # no raise inside a graph: see check_values
    loss, grad = compiled(**arguments)
    assert loss.isnan()
    assert (grad[1] == 0).all()
