"""Launch sizes: how rows and columns are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned, not yet measured on a GPU. About 25 KiB of loads in flight a multiprocessor cover the latency
of 4.8 TB/s (Little's law: 700 ns over 132 multiprocessors): four resident programs of 8 KiB. Larger tiles cost
registers, read off the compiled kernels: beyond 16 elements a thread in the wide layout and 8 in the narrow one, where
each element has a 64-bit address of its own, ptxas spills or halves the occupancy. In a narrow one it does so beyond 4
in float64 or with anything more than a maximum (grad_q, masks, double DQN, exponentials), beyond 2 with both.
"""

from functools import lru_cache
from typing import NamedTuple

# Samples, actions, atoms and programs of a launch, which kernels count in int32. The last program of a launch begins
# below MOST and works on fewer than MOST of them, so it ends within int32, where whole tiles are counted, too.
MOST = 2**30
NARROW = 64  # up to so many actions a row is one tile of td_loss_fwd_kernel; above, row_fwd_kernel reduces it first
WIDE_TILE_BYTES = 8192  # of a matrix that a program of 4 warps holds at once, in rows of up to
WIDE_TILE = 2048  # elements, whatever their size: they are widened to float32
WIDE_TILE_LEAST_BYTES = 4096  # where rows are few: 16 a thread, of which 4 wavefronts of CDNA have 256
PER_THREAD = 8  # elements of a narrow tile
SINGLE_WARPS = 16  # of a program that does it all: 512 threads may have 128 registers each, 1,024 only 64
ROW_COST = 4  # padded elements that a row counts for at least: action, reward, q[a] and so on are loaded once a row
MAX_PROGRAMS = 4096  # of td_loss_fwd_kernel, whose partial sums are one tile of sum_kernel
SUM_WARPS = 8  # 16 partial sums a thread
PROGRAMS_PER_SM = 4
MAX_SPLITS = 128  # whose partial results are one narrow tile again
COUNTED = 4096  # entries of non_final_mask that count_kernel counts at once, where programs would not read all of it
COUNTED_A_WARP = 512  # that are read at once: 16 bytes a lane
BWD_BLOCK = 2048  # elements of grad_q that a program of 4 warps stores: 16 a thread, half of it if it reads q, too
BWD_BLOCK_NARROW = 1024  # where each 16 bytes find their own rows

# Microseconds, of an H100 and its like, from what is published of them; nothing here is measured. Tiles of one program
# follow each other, and each is a chain: the action is loaded, then q of that action, beside all else of the row.
LAUNCH = 2.5  # one kernel more on a stream: 2 to 3
LOAD = 0.7  # from memory, for the next thing to start with
BARRIER = 0.05  # of a program's warps, and what they exchange through shared memory


class Rows(NamedTuple):
    """Launch of ``row_fwd_kernel``, 4 warps a program."""

    rows: int  # of a tile, which a program holds at once
    block: int  # columns of a tile
    splits: int
    chunk: int  # columns of a split, a multiple of block
    programs: int


class Forward(NamedTuple):
    """Launch of ``td_loss_fwd_kernel``."""

    rows: int  # of a tile, which a program holds at once
    block: int  # columns of a tile, which hold a row
    tiles: int  # that a program works through
    programs: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(0, (n - 1).bit_length())


def rows(rows: int, columns: int, itemsize: int, wide: bool, sms: int) -> Rows:
    """Several rows a program at a few hundred columns; splits of a row if the rows do not fill the device."""
    enough = PROGRAMS_PER_SM * sms
    if wide:
        tile = min(WIDE_TILE, WIDE_TILE_BYTES // itemsize)
        block = min(next_power_of_2(columns), tile)
        if rows * block < tile * enough:
            tile = WIDE_TILE_LEAST_BYTES // itemsize
        tile_rows = max(1, tile // block)
    else:
        block = NARROW
        tile_rows = 4 * 32 * PER_THREAD * 4 // max(itemsize, 4) // block
    blocks, row_tiles = cdiv(columns, block), cdiv(rows, tile_rows)
    splits = min(blocks, cdiv(enough, max(row_tiles, 1)), MAX_SPLITS)
    chunk = cdiv(blocks, splits) * block
    splits = cdiv(columns, chunk)
    return Rows(tile_rows, block, splits, chunk, row_tiles * splits)


def modelled(tiles: int, launches: int) -> float:
    """Microseconds of a narrow forward that leaves most of the device idle: tiles in a row, then the sum, if any."""
    return launches * LAUNCH + tiles * (2 * LOAD + BARRIER) + (launches - 1) * (LOAD + BARRIER)


@lru_cache(1024)  # 2 us otherwise
def forward(rows: int, columns: int, share: int, summed: bool) -> Forward:
    """One program for a small problem, else tiles of several rows; a share of the elements if each costs more.

    Where the loss is summed, several programs cost a second launch: as much as 2.3 tiles more of one program, so that
    one of up to 2 tiles is taken, and not 4.
    """
    block = next_power_of_2(columns)
    per_warp = 32 * PER_THREAD // share
    tile_rows = max(1, min(next_power_of_2(rows), SINGLE_WARPS * per_warp // max(block, ROW_COST)))
    tiles = next_power_of_2(cdiv(rows, tile_rows))  # a power of two: few variants to compile
    if modelled(tiles, 1) <= modelled(1, 2 if summed else 1):
        return Forward(tile_rows, block, tiles, 1, max(1, min(SINGLE_WARPS, tile_rows * block // per_warp)))
    tile_rows = 4 * per_warp // block
    tiles = next_power_of_2(cdiv(cdiv(rows, tile_rows), MAX_PROGRAMS))
    return Forward(tile_rows, block, tiles, cdiv(rows, tile_rows * tiles), 4)


def counts(rows: int, num_warps: int) -> int:
    """Programs of count_kernel, or 0 if those of the forward count all entries of non_final_mask themselves.

    That is one load after another; the launch, and the load of its counts, is as much as four of them.
    """
    loads = cdiv(rows, COUNTED_A_WARP * num_warps)
    return 0 if loads * LOAD <= LAUNCH + LOAD else cdiv(rows, COUNTED)


def backward(columns: int, itemsize: int, dense: bool) -> tuple[int, int]:
    """Elements of a block, and of its runs of one or two rows: the whole block, or as many as are stored at once."""
    share = 1 if itemsize <= 4 else 2  # of the registers
    wide = BWD_BLOCK // share // (2 if dense else 1)  # 142 registers on gfx1100, were it not halved
    if wide <= columns:
        return wide, wide
    longest = next_power_of_2(columns + 2) // 2  # a power of two, at most columns + 1
    return BWD_BLOCK_NARROW // share, min(16 // itemsize, longest)
