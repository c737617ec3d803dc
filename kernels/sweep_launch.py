"""Launch sizes of the sweep: how rows and actions are dealt out to programs. Plain arithmetic on shapes, no autotuning.

The figures are reasoned and read off the compiled kernels, not yet measured on a GPU. A tile of 128 x 128 Q-values is
64 registers a thread of 8 warps, and as many again while it is reduced: 128 in all on sm_90 and sm_100, where two
programs share a multiprocessor and one multiplies while the other reduces; 256 columns would leave one. It needs two
operands of 128 rows of 128 bytes, 32 KiB a stage, which at three stages is what sm_120 has in all.
"""

from typing import NamedTuple

from .launch import cdiv, next_power_of_2

COLUMNS = 128
STEP_BYTES = 128  # of features of a row multiplied at once: 8 loads of 16 bytes, the widest row a swizzle knows
# Rows that a tile is rounded up to, and the programs of it that a multiprocessor holds. Up to 16 rows the weight is
# read at the rate of the memory whatever the tensor cores do, and its 16 KiB a stage are what is in flight.
TILE_ROWS = {16: 4, 64: 3, 128: 2}


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


def sweep(rows: int, columns: int, features: int, itemsize: int, units: str, sms: int) -> Sweep:
    """Tiles by what multiplies them: "nvidia", "mfma" (64 lanes), "wmma" (32 lanes), "fma" without tensor cores, or
    "interpreter", which calls Python for every element of a tile.
    """
    tile_rows = next((size for size in TILE_ROWS if rows <= size), max(TILE_ROWS))
    tile_columns, step = COLUMNS, max(16, min(next_power_of_2(features), STEP_BYTES // itemsize))
    programs = TILE_ROWS[tile_rows] * sms
    if units == "interpreter":
        tile_rows, tile_columns = 16, 32
    elif units in ("fma", "wmma"):
        # The operands of a step lie in registers beside the tile: more of either spills.
        tile_rows, tile_columns, step = min(tile_rows, 64), 64, min(step, 16 if units == "fma" else 32)
    row_tiles, tiles = cdiv(rows, tile_rows), cdiv(columns, tile_columns)
    # One wave of programs: each fills its pipeline once.
    splits = min(tiles, cdiv(programs, row_tiles))
    chunk = cdiv(tiles, splits) * tile_columns
    # What the AMD back end counts as two stages is one tile in shared memory, of 64 KiB, and one in registers.
    stages = 2 if units in ("mfma", "wmma") else 3
    warps = 8 if tile_rows == 128 else 4
    return Sweep(tile_rows, tile_columns, step, row_tiles, cdiv(columns, chunk), chunk, warps, stages)
