"""Launch sizes: how rows and columns are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures below are reasoned from the hardware, not yet measured on it: a program of 128 threads with 4,096 float32
elements in flight holds 16 KiB, and about 25 KiB a multiprocessor cover the latency of 4.8 TB/s (Little's law at 700 ns
over 132 multiprocessors), so two resident programs suffice and four leave room for the tail.
"""

from typing import NamedTuple

NARROW = 64  # up to so many actions a row is one tile, read element by element; above, 16 bytes at a time
TILE = 4096  # elements of next_q that a program of 4 warps holds at once
SINGLE = 32_768  # padded elements up to which one program does it all: four tiles of 8,192, against a second launch
PROGRAMS_PER_SM = 4
BWD_BLOCK = 2048  # elements of grad_q that a program of 4 warps stores: 16 a thread


class Tile(NamedTuple):
    """Rows and columns that a program holds at once, and its warps."""

    rows: int
    block: int
    num_warps: int


class Forward(NamedTuple):
    """Launch of ``td_loss_fwd_kernel``."""

    tile: Tile
    wide: bool
    programs: int
    rows_per_program: int


class Split(NamedTuple):
    """Launch of ``row_max_fwd_kernel``."""

    tile: Tile
    splits: int
    row_blocks: int
    chunk: int  # columns of a split


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(0, (n - 1).bit_length())


def forward(rows: int, columns: int, unit_stride: bool, sms: int) -> Forward:
    """One program for a small problem, else tiles of several rows at few columns and of one row at many."""
    wide = unit_stride and columns > NARROW
    width = next_power_of_2(columns)
    if not wide and rows * width <= SINGLE:
        tile_rows = max(1, min(next_power_of_2(rows), 2 * TILE // width))
        return Forward(Tile(tile_rows, width, 8 if tile_rows * width > TILE // 2 else 4), False, 1, rows)
    block = min(width, TILE) if wide else min(width, NARROW)
    tile_rows = TILE // block
    while tile_rows > 1 and cdiv(rows, tile_rows) < PROGRAMS_PER_SM * sms:
        tile_rows //= 2
    return Forward(Tile(tile_rows, block, 4), wide, cdiv(rows, tile_rows), tile_rows)


def split(rows: int, columns: int, unit_stride: bool, sms: int) -> Split | None:
    """Split of the columns where the rows alone do not fill the device; None where they do."""
    blocks = cdiv(columns, TILE)
    splits = min(blocks, cdiv(PROGRAMS_PER_SM * sms, max(rows, 1)))
    if not unit_stride or rows == 0 or splits == 1:
        return None
    chunk = cdiv(blocks, splits) * TILE
    return Split(Tile(1, TILE, 4), cdiv(columns, chunk), rows, chunk)
