"""The executor can fail: kernels that are broken in their PTX are noticed, each in the way that it is broken."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXECUTED
from data import source
from test_loss import make
from test_ptx_backends import far_rows
from torch import Tensor

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from bench.gpu_code.ptx.executor import PtxError, Trace
from bench.gpu_code.ptx.triton import Executed, NotExecutedError, executing
from dqn_fused import fused_dqn_loss
from dqn_fused.head.sweep import Sweep

TARGET = "sm_80"
Outputs = list[Tensor]


def loss(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **changes: Any) -> Outputs:
    arguments = make(shape, dtype) | changes
    q = arguments.pop("q").requires_grad_()
    value, td_error = fused_dqn_loss(q, **arguments, backend="triton", return_td_error=True)
    return [value.detach(), td_error, torch.autograd.grad(value, q)[0]]


def family(shape: tuple[int, ...]) -> Outputs:
    legal = torch.ones(shape, dtype=torch.bool)
    legal[:, ::3] = False
    g = torch.Generator().manual_seed(1)
    return loss(
        shape, target="munchausen", target_q=torch.randn(shape, generator=g), cql_alpha=0.5,
        action_mask=legal, next_action_mask=legal, weights=torch.rand(shape[:-1], generator=g),
    )  # fmt: skip


def sweep(m: int, kind: str, dtype: torch.dtype) -> Outputs:
    from dqn_fused._backends.triton_sweep import sweep

    g = source()
    hidden, weight, bias = (torch.randn(size, generator=g).to(dtype) for size in ((m, 160), (300, 160), (300,)))
    return [x for x in sweep(Sweep(hidden, weight, bias, None, kind, 0.5)) if x is not None]


CASES: dict[str, Callable[[], Outputs]] = {
    "narrow": lambda: loss((300, 18)),
    "narrow-family": lambda: family((33, 19)),
    "several-programs": lambda: loss((1100, 18), torch.bfloat16),
    "wide": lambda: loss((5, 1000)),
    "wide-family": lambda: family((3, 500)),
    "sweep": lambda: sweep(40, "argmax", torch.bfloat16),
    "sweep-float32": lambda: sweep(5, "soft", torch.float32),
}


def execute(case: Callable[[], Outputs], **options: Any) -> tuple[Outputs, list[Executed], list[Trace]]:
    with executing(TARGET, seed=1, **options) as executor:
        return case(), executor.launches, executor.traces


def noticed(case: Callable[[], Outputs], text: str, mutated: str, expected: Outputs) -> str | None:
    """What the executor says of a kernel whose text has been replaced, or "value"; None where nothing shows."""
    assert mutated != text
    try:
        outputs, _, _ = execute(case, change=lambda name, ptx: mutated if ptx == text else ptx)
    except PtxError as error:
        return str(error)
    same = all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(outputs, expected, strict=True))
    return None if same else "value"


def kernels(launches: list[Executed]) -> dict[str, str]:
    """Name of each text that was launched."""
    return {launch.kernel.asm["ptx"]: launch.name for launch in launches}


def without(text: str, match: re.Match[str]) -> str:
    return text[: match.start()] + text[match.end() :]


def needed(launch: Executed, trace: Trace) -> set[int]:
    """Lines of the barriers that order something: a byte is accessed by one warp before and by another behind.

    Worked out from the bare list of accesses, apart from the shadow memory that the mutations are held against.
    """
    found: set[int] = set()
    passed = defaultdict(list)
    for block, instruction in trace.barriers.tolist():
        passed[block].append(instruction)
    accesses: Any = defaultdict(lambda: defaultdict(set))  # (block, epoch) -> byte -> {(warp, stored)}
    for block, warp, epoch, address, size, stored in trace.events.tolist():
        for byte in range(address, address + size):
            accesses[block, epoch][byte].add((warp, stored))
    for block, instructions in passed.items():
        for epoch, instruction in enumerate(instructions):
            before, behind = accesses[block, epoch], accesses[block, epoch + 1]
            for byte in before.keys() & behind.keys():
                # A warp that has stored the same replica itself does not depend on that of another.
                if any(
                    a[0] != b[0] and a[1] != b[1] and (b[0], a[1]) not in before[byte]
                    for a in before[byte]
                    for b in behind[byte]
                ):
                    found.add(launch.parsed.line(instruction))
                    break
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_barrier_removed(name: str) -> None:
    """Each that orders anything in this launch; Triton also emits some that order only what a warp does itself."""
    case = CASES[name]
    expected, launches, traces = execute(case, trace=True)
    ordering, removed = defaultdict(set), 0
    for launch, trace in zip(launches, traces, strict=True):
        ordering[launch.kernel.asm["ptx"]] |= needed(launch, trace)
    for text in kernels(launches):
        for match in re.finditer(r"^\s*bar\.sync\s+0;", text, re.MULTILINE):
            line = text[: match.end()].count("\n") + 1
            if line in ordering[text]:
                message = noticed(case, text, without(text, match), expected)
                assert message is not None, f"line {line}"
                assert "race" in message or "never written" in message or message == "value"
                removed += 1
    assert removed


def test_max_that_drops_nan() -> None:
    """max.NaN.f32 to max.f32: the loss of a row with a NaN would be a number."""
    next_q = torch.randn(5, 1000)
    next_q[2, 700] = torch.nan

    def case() -> Outputs:
        return loss((5, 1000), next_q=next_q, terminated=torch.zeros(5))

    expected, launches, _ = execute(case)
    assert expected[1].isnan().tolist() == [False, False, True, False, False]
    (text,) = (text for text, name in kernels(launches).items() if name == "row_fwd_kernel")
    assert noticed(case, text, text.replace("max.NaN.f32", "max.f32"), expected) == "value"


@pytest.mark.parametrize("shape", [(33, 19), (5, 1003)])
def test_a_mask_off_by_one(shape: tuple[int, int]) -> None:
    """< to <= where a load or store of global memory is guarded: one row, or element, too many."""

    def case() -> Outputs:
        return loss(shape)

    expected, launches, _ = execute(case)
    for text, name in kernels(launches).items():
        guards = set(re.findall(r"@(%p\d+) (?:ld|st)\.global", text))
        for joined, first, second in reversed(re.findall(r"and\.pred\s+(%p\d+), (%p\d+), (%p\d+);", text)):
            if joined in guards:
                guards |= {first, second}
        messages = []
        for match in re.finditer(r"setp\.lt\.s(?:32|64)\s+(%p\d+), ", text):
            if match[1] in guards:
                mutated = text[: match.start()] + match[0].replace("lt", "le") + text[match.end() :]
                messages.append(noticed(case, text, mutated, expected))
        assert any("outside of every tensor" in (message or "") for message in messages), name


def test_a_wait_for_asynchronous_copies_removed() -> None:
    case = CASES["sweep"]
    expected, launches, _ = execute(case)
    removed = 0
    for text in kernels(launches):
        for match in re.finditer(r"cp\.async\.wait_group\s+\d+;", text):
            message = noticed(case, text, without(text, match), expected)
            if message is None:  # one behind the loop, for nothing: no copies are left
                assert match[0].split()[-1] == "0;"
                continue
            assert "asynchronous copy" in message
            removed += 1
    assert removed
    # One group too few is waited for.
    (text,) = (text for text, name in kernels(launches).items() if name == "sweep_fwd_kernel")
    count = re.search(r"cp\.async\.wait_group\s+([1-9]\d*);", text)
    assert count is not None
    mutated = text[: count.start(1)] + str(int(count[1]) + 1) + text[count.end(1) :]
    assert "asynchronous copy" in (noticed(case, text, mutated, expected) or "")


@pytest.mark.parametrize("columns", [7, 130])
def test_an_offset_narrowed_to_32_bits(columns: int) -> None:
    """Rows 2^30 elements apart: an offset in int32 reads foreign memory, and the right one is read without a GPU."""
    next_q = far_rows(5, columns, 2**30)

    def case() -> Outputs:
        return loss((5, columns), next_q=next_q)

    expected, launches, _ = execute(case)
    near = execute(lambda: loss((5, columns), next_q=next_q.clone()))[0]
    assert all(torch.equal(x, y) for x, y in zip(expected, near, strict=True))
    messages = []
    for text in kernels(launches):
        for match in re.finditer(r"(mul|mad)\.(wide\.s32|lo\.s64)\s+(%rd\d+), (%r\w+), (%r\w+)(?:, (%rd\d+))?;", text):
            operation, kind, d, a, b, c = match.groups()
            low = f"cvt.u32.u64 a, {a}; cvt.u32.u64 b, {b};" if kind == "lo.s64" else f"mov.b32 a, {a}; mov.b32 b, {b};"
            low = f"{{ .reg .b32 a, b, x; .reg .b64 y; {low} mul.lo.s32 x, a, b; cvt.s64.s32 y, x; "
            narrow = low + (f"add.s64 {d}, y, {c}; }}" if operation == "mad" else f"mov.b64 {d}, y; }}")
            messages.append(noticed(case, text, text[: match.start()] + narrow + text[match.end() :], expected))
    assert any("outside of every tensor" in (message or "") for message in messages)


def test_what_is_not_executed_is_refused() -> None:
    def case() -> Outputs:
        return sweep(200, "max", torch.bfloat16)

    with executing("sm_90"), pytest.raises(NotExecutedError, match="wgmma"):
        case()
