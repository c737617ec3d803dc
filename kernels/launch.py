"""Launch sizes: how rows and columns are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned, not yet measured on a GPU. About 25 KiB of loads in flight a multiprocessor cover the latency
of 4.8 TB/s (Little's law: 700 ns over 132 multiprocessors): four resident programs of 8 KiB. Larger tiles cost
registers, read off the compiled kernels: beyond 16 elements a thread in the wide layout and 8 in the narrow one, where
each element has a 64-bit address of its own, or 4 in float64 or where grad_q is written too, ptxas spills or halves the
occupancy.
"""

from typing import NamedTuple

NARROW = 64  # up to so many actions a row is one tile, read element by element; above, 16 bytes at a time
WIDE_TILE_BYTES = 8192  # of next_q that a program of 4 warps holds at once, in rows of up to
WIDE_TILE = 2048  # elements, whatever their size: they are widened to float32
PER_THREAD, PER_THREAD_WITH_GRAD = 8, 4  # elements of a narrow tile
SINGLE = 16_384  # padded elements up to which one program of 8 warps does it all, in 8 tiles, against a second launch
STRIDED_TILE = 4096  # columns up to which a strided row, such as the partial maxima of a split, is one tile
PROGRAMS_PER_SM = 4
BWD_BLOCK = 2048  # elements of grad_q that a program of 4 warps stores: 16 a thread
BWD_BLOCK_NARROW = 1024  # where each element finds its own row


class Forward(NamedTuple):
    """Launch of ``td_loss_fwd_kernel``."""

    layout: str  # of row_max: "narrow", "wide" or "strided"
    rows: int  # of a tile, which a program holds at once
    block: int  # columns of a tile
    tiles: int  # that a program works through
    programs: int
    num_warps: int


class Split(NamedTuple):
    """Launch of ``row_max_fwd_kernel``."""

    block: int  # columns that a program of 4 warps holds at once
    splits: int
    chunk: int  # columns of a split, a multiple of block


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(0, (n - 1).bit_length())


def wide_tile(itemsize: int) -> int:
    """Elements of next_q that a program holds at once in the wide layout."""
    return min(WIDE_TILE, WIDE_TILE_BYTES // itemsize)


def forward(rows: int, columns: int, itemsize: int, unit_stride: bool, with_grad: bool = False) -> Forward:
    """One program for a small problem, else tiles of several rows at few columns and of one row at many."""
    width = next_power_of_2(columns)
    if unit_stride and columns > NARROW:
        tile = wide_tile(itemsize)
        block = min(width, tile)
        return Forward("wide", tile // block, block, 1, cdiv(rows, tile // block), 4)
    per_warp = 32 * (PER_THREAD_WITH_GRAD if with_grad or itemsize > 4 else PER_THREAD)
    if width <= STRIDED_TILE and rows * width <= SINGLE:
        tile_rows = max(1, min(next_power_of_2(rows), 8 * per_warp // width))
        tiles = next_power_of_2(cdiv(rows, tile_rows))  # a power of two: few variants to compile
        return Forward("narrow", tile_rows, width, tiles, 1, max(1, min(8, tile_rows * width // per_warp)))
    block = min(width, NARROW)
    tile_rows = 4 * per_warp // block
    return Forward("narrow" if columns <= block else "strided", tile_rows, block, 1, cdiv(rows, tile_rows), 4)


def split(rows: int, columns: int, itemsize: int, unit_stride: bool, sms: int) -> Split | None:
    """Split of the columns where the rows alone do not fill the device; None where they do."""
    block = wide_tile(itemsize)
    blocks = cdiv(columns, block)
    splits = min(blocks, cdiv(PROGRAMS_PER_SM * sms, max(rows, 1)))
    if not unit_stride or rows == 0 or splits == 1:
        return None
    chunk = cdiv(blocks, splits) * block
    return Split(block, cdiv(columns, chunk), chunk)


def backward(columns: int, itemsize: int) -> tuple[int, bool]:
    """Elements of a block, and whether a block touches at most two rows."""
    share = 1 if itemsize <= 4 else 2  # of the registers
    if BWD_BLOCK // share <= columns:
        return BWD_BLOCK // share, True
    return BWD_BLOCK_NARROW // share, False
