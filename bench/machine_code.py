"""The widest access to global memory in a kernel's machine code, NVIDIA's or AMD's."""

import re

NVIDIA = {"load": r"\bLDG(?:STS)?((?:\.\w+)*)", "store": r"\bSTG((?:\.\w+)*)"}
AMD = {what: rf"\b(?:global|buffer)_{what}_(\w+)" for what in ("load", "store")}
NAMED = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


def widest(code: str, what: str) -> int:
    """Bits of the widest "load" or "store"; 0 where there is none."""
    if re.search(AMD["load"], code) or re.search(AMD["store"], code):
        return max((_amd_bits(name) for name in re.findall(AMD[what], code)), default=0)
    return max((_nvidia_bits(suffix) for suffix in re.findall(NVIDIA[what], code)), default=0)


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
