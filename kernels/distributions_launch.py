"""Launch sizes of the losses of distributions: plain arithmetic on shapes, as launch.py. Reasoned, not yet measured.

A program works on some predicted values of some samples. It chooses the next action of its samples by itself, so where
several programs share a sample they read the same rows of next values; from the cache, as long as it holds them.
"""

from typing import NamedTuple

from .launch import cdiv, next_power_of_2

WARPS = 4
TILE = 2048  # pairs that a program holds at once, 16 a thread; each has two sums
READ = 4096  # elements that it reads at once: 32 a thread, in 8 loads of 16 bytes in float32
LEAST_BLOCK = 32  # predicted quantiles of a program: fewer leave more of its time to what is done once a sample
MOST_BLOCK = 256  # 2 a thread
CHOICE_BYTES = 1 << 16  # that one program reads to choose: about as long as another launch takes
CHOICE_AGAIN = 12 << 20  # bytes that are read more than once, in total: another launch at 5 TB/s
READ_SOFTMAX = 1024  # the same of logits, 16 a thread
COLUMNS = 8  # of a thread, of each of which it has a logit, a power, a target and so on
MOST_WARPS = 16
SHARED = 16  # pairs of an atom and a probability that a thread has at once: each is added up where it is made
SUM_ROWS, SUM_SPLITS = 32, 64  # a tile of sum_rows_kernel


class Choice(NamedTuple):
    """Tile of a choice among (rows, A, K) values, or with K = 1 among (rows, A)."""

    actions: int
    columns: int


class Pairs(NamedTuple):
    """Launch of quantile_fwd_kernel."""

    rows: int  # samples of a program
    block: int  # predicted quantiles of a program
    targets: int  # quantiles of a tile
    splits: int  # programs of a sample
    programs: int


def pairs(n: int, K: int, itemsize: int, sms: int) -> Pairs:
    """A quarter of a thousand predicted quantiles a program; fewer where the programs do not fill the device."""
    tile = TILE if itemsize <= 4 else TILE // 2
    block = min(next_power_of_2(K), MOST_BLOCK)
    rows = max(1, min(next_power_of_2(n), 32 * WARPS // block))
    while 2 * cdiv(n, rows) * cdiv(K, block) <= sms:
        if rows > 1:
            rows //= 2
        elif block > LEAST_BLOCK:
            block //= 2
        else:
            break
    splits = cdiv(K, block)
    return Pairs(rows, block, max(1, tile // (rows * block)), splits, cdiv(n, rows) * splits)


def choice(rows: int, A: int, K: int, itemsize: int, softmax: bool) -> Choice:
    """Whole rows where they fit, and always where their softmax is taken."""
    read = _read(itemsize, softmax) // rows
    columns = next_power_of_2(K) if softmax else min(next_power_of_2(K), read)
    actions = min(next_power_of_2(A), max(1, read // columns))
    return Choice(actions, columns)


def rows_of(tile: Choice, m: int, itemsize: int, softmax: bool) -> int:
    """Rows of a program that does nothing but reduce them."""
    return max(1, min(next_power_of_2(m), _read(itemsize, softmax) // (tile.actions * tile.columns)))


def _read(itemsize: int, softmax: bool) -> int:
    """Elements that a program reads at once."""
    return (READ_SOFTMAX if softmax else READ) // (1 if itemsize <= 4 else 2)


def warps(columns: int, itemsize: int) -> int:
    """Warps of a program that keeps several values of each of its columns, a softmax among them."""
    share = 1 if itemsize <= 4 else 2  # of the registers
    return max(WARPS, min(MOST_WARPS, share * columns // (32 * COLUMNS)))


def chooses_first(m: int, A: int, K: int, itemsize: int, splits: int) -> bool:
    """Whether the means that choose are worth a launch of their own."""
    row = A * K * itemsize
    return row > CHOICE_BYTES or (splits - 1) * m * row > CHOICE_AGAIN


class Projection(NamedTuple):
    """Launch of categorical_fwd_kernel."""

    rows: int  # samples of a program
    atoms: int
    chunk: int  # probabilities that are shared at once
    programs: int
    num_warps: int


def projection(n: int, K: int, itemsize: int, sms: int) -> Projection:
    """A sample a program, or as many as give each thread an atom, if there are enough of them for the device."""
    share = 1 if itemsize <= 4 else 2  # of the registers
    atoms = next_power_of_2(K)
    num_warps = warps(atoms, itemsize)
    rows = max(1, min(next_power_of_2(n), 32 * WARPS // atoms))
    while rows > 1 and 2 * cdiv(n, rows) <= sms:
        rows //= 2
    chunk = max(1, min(atoms, 32 * num_warps * SHARED // share // (rows * atoms)))
    return Projection(rows, atoms, chunk, cdiv(n, rows), num_warps)
