"""Launch sizes: how rows and columns are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned, not yet measured on a GPU. About 25 KiB of loads in flight a multiprocessor cover the latency
of 4.8 TB/s (Little's law: 700 ns over 132 multiprocessors): four resident programs of 8 KiB. Larger tiles cost
registers, read off the compiled kernels: beyond 16 elements a thread in the wide layout and 8 in the narrow one, where
each element has a 64-bit address of its own, ptxas spills or halves the occupancy.
"""

from typing import NamedTuple

NARROW = 64  # up to so many actions a row is one tile, read element by element; above, 16 bytes at a time
WIDE_TILE_BYTES = 8192  # of next_q that a program of 4 warps holds at once, in rows of up to
WIDE_TILE = 2048  # elements, whatever their size: they are widened to float32
NARROW_TILE = 1024  # elements that a program of 4 warps holds at once
SINGLE_TILE = 2048  # the same for the one program of 8 warps
SINGLE = 16 * SINGLE_TILE  # padded elements up to which one program does it all, against a second launch
PROGRAMS_PER_SM = 4
BWD_BLOCK = 2048  # elements of grad_q that a program of 4 warps stores: 16 a thread
BWD_BLOCK_NARROW = 1024  # where each element finds its own row


class Tile(NamedTuple):
    """Rows and columns that a program holds at once, and its warps."""

    rows: int
    block: int
    num_warps: int


class Forward(NamedTuple):
    """Launch of ``td_loss_fwd_kernel``."""

    tile: Tile
    layout: str  # of row_max: "narrow", "wide" or "strided"
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


def wide_tile(itemsize: int) -> int:
    """Elements of next_q that a program holds at once in the wide layout."""
    return min(WIDE_TILE, WIDE_TILE_BYTES // itemsize)


def forward(rows: int, columns: int, itemsize: int, unit_stride: bool) -> Forward:
    """One program for a small problem, else tiles of several rows at few columns and of one row at many."""
    width = next_power_of_2(columns)
    if unit_stride and columns > NARROW:
        layout, tile = "wide", wide_tile(itemsize)
        block = min(width, tile)
    elif width <= SINGLE_TILE and rows * width <= SINGLE:
        tile_rows = max(1, min(next_power_of_2(rows), SINGLE_TILE // width))
        num_warps = max(1, min(8, tile_rows * width // (8 * 32)))  # 8 elements a thread
        return Forward(Tile(tile_rows, width, num_warps), "narrow", 1, rows)
    else:
        block = min(width, NARROW)
        layout, tile = "narrow" if columns <= block else "strided", NARROW_TILE
    tile_rows = tile // block
    return Forward(Tile(tile_rows, block, 4), layout, cdiv(rows, tile_rows), tile_rows)


def split(rows: int, columns: int, itemsize: int, unit_stride: bool, sms: int) -> Split | None:
    """Split of the columns where the rows alone do not fill the device; None where they do."""
    tile = wide_tile(itemsize)
    blocks = cdiv(columns, tile)
    splits = min(blocks, cdiv(PROGRAMS_PER_SM * sms, max(rows, 1)))
    if not unit_stride or rows == 0 or splits == 1:
        return None
    chunk = cdiv(blocks, splits) * tile
    return Split(Tile(1, tile, 4), cdiv(columns, chunk), rows, chunk)


def backward(columns: int, itemsize: int) -> tuple[int, bool]:
    """Elements of a block, and whether a block touches at most two rows."""
    block = BWD_BLOCK if itemsize <= 4 else BWD_BLOCK // 2
    return (block, True) if block <= columns else (BWD_BLOCK_NARROW if itemsize <= 4 else BWD_BLOCK_NARROW // 2, False)
