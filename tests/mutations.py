"""A kernel's PTX broken on purpose, and executed: whether that shows."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_code.ptx.executor import PtxError, Trace
from bench.gpu_code.ptx.triton import Executed, executing

TARGET = "sm_80"
Outputs = list[Tensor]
Case = Callable[[], Outputs]


def execute(case: Case, **options: Any) -> tuple[Outputs, list[Executed], list[Trace]]:
    with executing(TARGET, seed=1, **options) as executor:
        return case(), executor.launches, executor.traces


def noticed(case: Case, text: str, mutated: str, expected: Outputs) -> str | None:
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


def remove_each_barrier(case: Case, *also: str) -> None:
    """Check that each barrier which orders anything in these launches is missed, by what the executor may say of it.

    Triton also emits some that order only what a warp does itself.
    """
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
                assert message == "value" or any(x in message for x in ("race", "never written", *also)), message
                removed += 1
    assert removed


def loosen_each_guard(case: Case) -> None:
    """Check that of each kernel a guard of global memory with <= for < is missed: one row, or element, too many."""
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
