"""Launch sizes of the sweep: how rows and actions are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned and read off the compiled kernels, not yet measured on a GPU. A tile of 128 x 128 Q-values is
64 registers a thread of 8 warps; adding the bias and reducing it take 120 to 254 in all, so that a multiprocessor
mostly holds one program; 256 columns would be twice that. Its two operands are 128 rows of 128 bytes each, 32 KiB a
stage; three stages are 96 KiB, of the 99 KiB that sm_120 and sm_89 have in all.
"""

from typing import NamedTuple

from .launch import cdiv, next_power_of_2

# By what multiplies: the most rows of a tile, its columns, and the bytes of features of a row that are multiplied at
# once. 128 bytes are the widest row that a swizzle of shared memory knows; the units of a lane, with or without tensor
# cores, have the operands of a step in registers beside the tile, where more of either spills.
TILES = {
    "nvidia": (128, 128, 128),  # tensor cores
    "mfma": (128, 128, 128),  # tensor cores of 64 lanes
    "wmma": (64, 64, 64),  # tensor cores of 32 lanes
    "fma": (64, 64, 64),  # none, 128 lanes of NVIDIA's
    "valu": (32, 64, 64),  # none, 32 lanes of AMD's
    "interpreter": (16, 32, 256),  # small, so that small tests have several
}
MASKED_COLUMNS = 64  # rows of a mask begin at any byte and are read by the byte: 64 a thread would spill on Triton 3.6
# Rows that a tile is rounded up to, and the programs a multiprocessor is given: those of 128 rows one after the other,
# of others so many at once. Up to 16 rows the weight is read at the rate of the memory whatever multiplies, and its
# 16 KiB a stage are what is in flight.
PROGRAMS_PER_SM = {16: 4, 32: 4, 64: 3, 128: 2}


class Sweep(NamedTuple):
    """Launch of ``sweep_fwd_kernel``."""

    rows: int  # of a tile
    columns: int  # of a tile
    features: int  # that are multiplied at once
    row_tiles: int
    splits: int
    chunk: int  # columns of a split, a multiple of columns
    num_warps: int
    num_stages: int


def sweep(rows: int, columns: int, features: int, itemsize: int, masked: bool, units: str, sms: int) -> Sweep:
    """Tiles by what multiplies them, and as many programs as run in a wave or two: each fills its pipeline once."""
    most_rows, tile_columns, step = TILES[units]
    if masked:
        tile_columns = min(tile_columns, MASKED_COLUMNS)
    tile_rows = min(next((size for size in PROGRAMS_PER_SM if rows <= size), most_rows), most_rows)
    row_tiles, tiles = cdiv(rows, tile_rows), cdiv(columns, tile_columns)
    splits = max(1, min(tiles, PROGRAMS_PER_SM[tile_rows] * sms // max(row_tiles, 1)))
    chunk = cdiv(tiles, splits) * tile_columns
    return Sweep(
        tile_rows,
        tile_columns,
        max(16, min(next_power_of_2(features), step // itemsize)),
        row_tiles,
        cdiv(columns, chunk),
        chunk,
        num_warps=8 if tile_rows == 128 else 4,
        # What the AMD compiler counts as two is one tile in shared memory, of 64 KiB, and the next in registers.
        num_stages=2 if units in ("mfma", "wmma", "valu") else 3,
    )
