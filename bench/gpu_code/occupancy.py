"""How many warps of a kernel fit a multiprocessor, of those that it can hold.

The limits are those of the CUDA C++ programming guide, "Technical Specifications per Compute Capability"; how
registers and shared memory are dealt out is that of NVIDIA's occupancy calculator. AMD's are left out.
"""

from typing import NamedTuple

REGISTERS = 65_536  # of a multiprocessor, in four parts
PARTS = 4
REGISTER_UNIT = 256  # that a warp is given at a time
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes, of a block


class Limits(NamedTuple):
    """Of a multiprocessor."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}


def occupancy(target: str, registers: int, threads: int, shared: int) -> float | None:
    """Share of a multiprocessor's warps; None where the limits are not known."""
    limits = LIMITS.get(target)
    if limits is None:
        return None
    warps = _up(threads, 32) // 32
    per_warp = _up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = REGISTERS // PARTS // per_warp * PARTS // warps
    by_shared = limits.shared // (_up(shared, SHARED_UNIT) + SHARED_RESERVED)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return round(blocks * warps / limits.warps, 4)


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
