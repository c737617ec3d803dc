"""What a kernel's code shows: the widest access, the main loop, accumulators that are read too early."""

import re
from collections.abc import Iterator

NVIDIA = {"load": r"\bLDG(?:STS)?\b((?:\.\w+)*)", "store": r"\bSTG\b((?:\.\w+)*)"}
AMD = {what: rf"\b(?:global|buffer)_{what}_(\w+)" for what in ("load", "store")}
NAMED = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
LABEL = re.compile(r"\s*(\$?\.?L[\w$]+):")


def widest(code: str, what: str) -> int:
    """Bits of the widest "load" or "store"; 0 where there is none."""
    return max(widths(code, what), default=0)


def widths(code: str, what: str) -> list[int]:
    """Bits of each "load" or "store" from global memory, of one lane."""
    if re.search(AMD["load"], code) or re.search(AMD["store"], code):
        return [_amd_bits(name) for name in re.findall(AMD[what], code)]
    return [_nvidia_bits(suffix) for suffix in re.findall(NVIDIA[what], code)]


def _nvidia_bits(suffix: str) -> int:
    """Bits of .E.128 and the like: 32 where nothing is said."""
    for part in reversed(suffix.split(".")):
        match = re.fullmatch(r"[US]?(\d+)", part)
        if match:
            return int(match[1])
    return 32


def _amd_bits(name: str) -> int:
    """Bits of dwordx4, b128, ubyte, d16_u8 and the like."""
    if match := re.search(r"dwordx(\d)", name):
        return 32 * int(match[1])
    if match := re.search(r"[bui](\d+)$", name):
        return int(match[1])
    return next((bits for word, bits in NAMED.items() if word in name), 0)


def instructions(sass: str) -> list[str]:
    """The instructions of disassembled NVIDIA code: one a line, after its address."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?);", sass, re.MULTILINE)


def main_loop(code: str, instruction: str) -> str:
    """The innermost loop of the machine code that contains an instruction; "" if none does."""
    found = [body for body in _loops(code) if re.search(instruction, body)]
    return min(found, key=len, default="")


def _loops(code: str) -> Iterator[str]:
    """From each label to the last branch back to it."""
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    ends: dict[str, int] = {}
    for i, line in enumerate(lines):
        for name in re.findall(r"(?:BRA|s_c?branch\w*)\s.*?(\.L\w+)", line):
            if labels.get(name, i + 1) <= i:
                ends[name] = i
    for name, end in ends.items():
        yield "\n".join(lines[labels[name] : end + 1])


def read_in_flight(ptx: str) -> list[str]:
    """Instructions that touch an accumulator of wgmma before all its products have been waited for, on any path.

    What runs asynchronously may not have written it yet; only the next product may take it.
    """
    blocks, following = _blocks(ptx)
    pending: dict[int, set[str]] = {i: set() for i in range(len(blocks))}
    early: dict[str, None] = {}
    todo = [0]
    seen = set()
    while todo:
        i = todo.pop()
        seen.add(i)
        now = set(pending[i])
        for line in blocks[i]:
            if line.startswith("wgmma.mma_async"):
                now |= set(re.findall(r"%\w+", line[line.index("{") : line.index("}")]))
            elif line.startswith("wgmma.wait_group") and line.rstrip(";").endswith(" 0"):
                now = set()
            elif now & set(re.findall(r"%\w+", line)):
                early[line] = None
        for j in following[i]:
            if j not in seen or not now <= pending[j]:
                pending[j] |= now
                todo.append(j)
    return list(early)


def _blocks(ptx: str) -> tuple[list[list[str]], list[list[int]]]:
    """Basic blocks, of instructions without comments, and which may follow each."""
    lines = [re.sub(r"\s*//.*", "", line).strip() for line in ptx[ptx.index("{") + 1 :].splitlines()]
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    falls: set[int] = set()
    for line in lines:
        if match := LABEL.match(line):
            falls.add(len(blocks) - 1)
            blocks.append([])
            labels[match[1]] = len(blocks) - 1
        elif match := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line):
            branches.append((len(blocks) - 1, match[1]))
            if line.startswith("@"):
                falls.add(len(blocks) - 1)
            blocks.append([])
        elif line and not line.startswith("."):
            blocks[-1].append(line)
    following: list[list[int]] = [[i + 1] if i in falls else [] for i in range(len(blocks))]
    for i, name in branches:
        following[i].append(labels[name])
    return blocks, following
