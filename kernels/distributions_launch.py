"""Launch sizes of the distributional losses: plain arithmetic on shapes, as launch.py. Reasoned, not yet measured.

A program works on some predicted values of some samples and chooses the next action of its samples by itself. So
programs that share a sample read the same rows of next values, from the cache as long as it holds them.
"""

from typing import NamedTuple

from .launch import PROGRAMS_PER_SM, cdiv, next_power_of_2

WARPS = 4
TILE = 2048  # pairs that a program holds at once, 16 a thread, each with two sums; of float64 4 a thread
READ = 4096  # elements that it reads at once: 32 a thread, in 8 loads of 16 bytes in float32
READ_ONE_BY_ONE = 1024  # where each has a 64-bit address of its own: above, and above an eighth in float64, some spill
LEAST_BLOCK = 32  # predicted quantiles of a program: fewer leave more of its time to what is done once a sample
MOST_BLOCK = 256  # 2 a thread
CHOICE_BYTES = 1 << 16  # that one program reads to choose: about as long as another launch takes
CHOICE_AGAIN = 12 << 20  # bytes that are read more than once, in total: another launch at 5 TB/s
CHOICE_TILES = 4  # of logits, each of which takes as long as a load and the softmax of it
LOGITS = 8  # of a thread, of those whose softmax is taken at once, and 4 in float64
MOST_WARPS = 16  # for a long row
CHOICE_WARPS = 8  # for many actions
MOST_ATOMS = 16384  # a program holds a row of logits, 32 a thread of 16 warps: of twice as many most would spill
SHARED = 16  # pairs of an atom and a probability that a thread has at once: each is added up where it is made
SUM_ROWS, SUM_SPLITS = 32, 64  # a tile of sum_rows_kernel


class Choice(NamedTuple):
    """Tile of a choice among (m, A, K) values, or with K = 1 among (m, A)."""

    rows: int
    actions: int
    columns: int


class Pairs(NamedTuple):
    """Launch of quantile_fwd_kernel."""

    rows: int  # samples of a program
    block: int  # predicted quantiles of a program
    targets: int  # target quantiles of a tile
    averaged: int  # predicted quantiles that are averaged at once
    splits: int  # programs of a sample
    programs: int


def pairs(n: int, K: int, next_K: int, itemsize: int, sms: int) -> Pairs:
    """A quarter of a thousand predicted quantiles a program; fewer where the programs do not fill the device."""
    tile = TILE if itemsize <= 4 else TILE // 4
    block = min(next_power_of_2(K), MOST_BLOCK)
    rows = max(1, min(next_power_of_2(n), 32 * WARPS // block))
    while 2 * cdiv(n, rows) * cdiv(K, block) <= sms:
        if rows > 1:
            rows //= 2
        elif block > LEAST_BLOCK:
            block //= 2
        else:
            break
    averaged = min(next_power_of_2(K), READ_ONE_BY_ONE // rows)
    splits = cdiv(K, block)
    targets = min(next_power_of_2(next_K), tile // (rows * block))
    return Pairs(rows, block, targets, averaged, splits, cdiv(n, rows) * splits)


def choice(rows: int | None, m: int, A: int, K: int, itemsize: int, wide: bool, softmax_warps: int = 0) -> Choice:
    """Whole rows of K where they fit, and always by programs of softmax_warps, which take their softmax.

    Several rows for a program that does nothing but reduce them, whose rows are None.
    """
    read = 32 * softmax_warps * LOGITS * 4 // itemsize
    if softmax_warps == 0:
        read = (READ if wide else READ_ONE_BY_ONE) // (1 if itemsize <= 4 else 8)
    read //= rows or 1
    columns = next_power_of_2(K) if softmax_warps else min(next_power_of_2(K), read)
    actions = max(1, min(next_power_of_2(A), read // columns))
    return Choice(rows or max(1, min(next_power_of_2(m), read // (actions * columns))), actions, columns)


def warps(logits: int, itemsize: int, most: int) -> int:
    """Warps of a program that takes the softmax of so many logits at once, at most a number of them."""
    return max(WARPS, min(most, next_power_of_2(logits) * itemsize // (4 * 32 * LOGITS)))


def chooses_first(m: int, A: int, K: int, itemsize: int, splits: int, tiles: int) -> bool:
    """Whether the choice is worth a launch of its own; a program would work through so many tiles."""
    row = A * K * itemsize
    return row > CHOICE_BYTES or tiles > CHOICE_TILES or (splits - 1) * m * row > CHOICE_AGAIN


class Projection(NamedTuple):
    """Launch of categorical_fwd_kernel."""

    rows: int  # samples of a program
    atoms: int
    chunk: int  # probabilities that are shared at once
    programs: int
    num_warps: int


def projection(n: int, A: int, K: int, itemsize: int, sms: int) -> Projection:
    """One sample a program while all of them are resident at once; then as many as give each of 128 threads an atom.

    Few samples compare all A actions at once, if they can: loading the next ones takes 0.7 us.
    """
    atoms = next_power_of_2(K)
    num_warps = max(warps(atoms, itemsize, MOST_WARPS), warps(next_power_of_2(A) * atoms, itemsize, CHOICE_WARPS))
    rows = max(1, min(next_power_of_2(n), 32 * WARPS // atoms))
    while rows > 1 and cdiv(n, rows // 2) <= PROGRAMS_PER_SM * sms:
        rows //= 2
    shared = 32 * num_warps * SHARED // (1 if itemsize <= 4 else 4)
    chunk = max(1, min(atoms, shared // (rows * atoms)))
    return Projection(rows, atoms, chunk, cdiv(n, rows), num_warps)
