"""Launch sizes of the sweep: how rows and actions are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned and read off the compiled kernels, not yet measured on a GPU. A tile of 128 x 128 Q-values is
64 registers a thread of 8 warps; adding the bias and reducing it take 120 to 254 in all, so that a multiprocessor
mostly holds one program; 256 columns would be twice that. Its two operands are 128 rows of 128 bytes each, 32 KiB a
stage; three stages are 96 KiB, of the 99 KiB that sm_120 and sm_89 have in all.
"""

from functools import lru_cache
from typing import NamedTuple

from .launch import cdiv, next_power_of_2

# By what multiplies: the most rows of a tile, its columns, and the bytes of features of a row that are multiplied at
# once. 128 bytes are the widest row that a swizzle of shared memory knows; the units of a lane, with or without tensor
# cores, have the operands of a step in registers beside the tile, where more of either spills.
TILES = {
    "nvidia": (128, 128, 128),  # tensor cores
    "split": (128, 64, 128),  # tensor cores, on three products of halves of float32, which are in registers, too
    "mfma": (128, 128, 128),  # tensor cores of 64 lanes
    "wmma": (64, 64, 64),  # tensor cores of 32 lanes
    "fma": (64, 64, 64),  # none, 128 lanes of NVIDIA's; the bytes are of float32, in which they multiply
    "valu": (32, 64, 64),  # none, 32 lanes of AMD's, which multiply float32 alone
    "interpreter": (16, 32, 256),  # small, so that small tests have several
}
MASKED_COLUMNS = 64  # rows of a mask begin at any byte and are read by the byte: 64 a thread would spill on Triton 3.6
# Rows that a tile is rounded up to, and the programs that a multiprocessor holds at once. Up to 16 rows the weight is
# read at the rate of the memory whatever multiplies, and its 16 KiB a stage are what is in flight.
RESIDENT = {16: 4, 32: 4, 64: 3, 128: 1}
# What a program costs beside its tiles, in tiles: to wait for its first operands, and to reduce the last product.
FILL = 1
# Row tiles that run at once: each reads its rows of hidden again for every tile of columns. 32 of 128 rows of 1,024
# halves are 8 MiB, which stay in the 20 MB of one side of an A100's second-level cache; all of 17,000 rows, 35 MB.
ROW_TILES_AT_ONCE = 32
MAX_SPLITS = 64  # of many rows: 256 bytes a row of partial results


class Sweep(NamedTuple):
    """Launch of ``sweep_fwd_kernel``."""

    rows: int  # of a tile
    columns: int  # of a tile
    features: int  # that are multiplied at once
    row_tiles: int
    group: int  # row tiles whose splits run one after another, before those of the next group
    splits: int
    chunk: int  # columns of a split, a multiple of columns
    num_warps: int
    num_stages: int


def sweep(rows: int, columns: int, features: int, itemsize: int, masked: bool, units: str, sms: int) -> Sweep:
    """Tiles for the units that multiply them, distributed so that the device idles least."""
    tile_rows, tile_columns, tile_features = _tile(rows, features, itemsize, masked, units)
    row_tiles, tiles, at_once = cdiv(rows, tile_rows), cdiv(columns, tile_columns), RESIDENT[tile_rows] * sms
    splits = best_splits(row_tiles, tiles, at_once)
    return Sweep(
        tile_rows,
        tile_columns,
        tile_features,
        row_tiles,
        max(1, at_once // splits),
        splits,
        cdiv(tiles, splits) * tile_columns,
        num_warps=_warps(tile_rows),
        num_stages=_stages(units),
    )


class Backward(NamedTuple):
    """Launch of ``sweep_bwd_kernel``: one program for each tile."""

    rows: int
    columns: int
    features: int
    num_warps: int
    num_stages: int


def backward(rows: int, features: int, itemsize: int, masked: bool, units: str) -> Backward:
    """The tiles of the sweep, which are multiplied again."""
    tile = _tile(rows, features, itemsize, masked, units)
    return Backward(*tile, _warps(tile[0]), _stages(units))


def _tile(rows: int, features: int, itemsize: int, masked: bool, units: str) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the features that are multiplied at once."""
    most_rows, columns, step = TILES[units]
    if masked:
        columns = min(columns, MASKED_COLUMNS)
    if units == "fma":
        itemsize = 4  # with 32 halves of each row at once 400 bytes a thread spill
    tile_rows = min(next((size for size in RESIDENT if rows <= size), most_rows), most_rows)
    return tile_rows, columns, max(16, min(next_power_of_2(features), step // itemsize))


def _warps(rows: int) -> int:
    return 8 if rows == 128 else 4


def _stages(units: str) -> int:
    """For the AMD compiler two stages are one tile in shared memory, of 64 KiB, and the next in registers."""
    return 2 if units in ("mfma", "wmma", "valu") else 3


@lru_cache(1024)  # 15 to 30 us otherwise
def best_splits(row_tiles: int, tiles: int, at_once: int) -> int:
    """The number of parts, none empty, into which tiles of columns are split: the least of waves times their length."""
    fewest = 1 if row_tiles <= ROW_TILES_AT_ONCE else min(cdiv(at_once, ROW_TILES_AT_ONCE), tiles)
    most = min(tiles, max(MAX_SPLITS, cdiv(2 * at_once, max(row_tiles, 1))))
    candidates = dict.fromkeys(cdiv(tiles, cdiv(tiles, parts)) for parts in range(fewest, most + 1))
    return min(candidates, key=lambda parts: cdiv(row_tiles * parts, at_once) * (cdiv(tiles, parts) + FILL))


def share(plan: Sweep, columns: int, sms: int) -> float:
    """The share of the tiles that the device could take while the launch runs."""
    at_once, tiles = RESIDENT[plan.rows] * sms, cdiv(columns, plan.columns)
    waves = cdiv(plan.row_tiles * plan.splits, at_once)
    return plan.row_tiles * tiles / (at_once * waves * (plan.chunk // plan.columns))
