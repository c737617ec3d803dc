"""The fewest bytes that a loss and its gradient have to move, however they are computed."""

from bench.measure.variants import Variant

GIGA = 1e9


def least_bytes(variant: Variant, n: int, A: int, itemsize: int) -> int:
    """Every element of each matrix in `reads` once, and of the gradient once.

    A matrix of q's dtype is n*A*itemsize bytes, a mask n*A. The conservative term lists q twice: its backward needs the
    result of its forward, so q is read in both. Per-sample values (actions, rewards, q of the action taken, losses)
    are left out, and so is what a cache may save.
    """
    return sum(matrix_bytes(name, n, A, itemsize) for name in variant.reads) + n * A * itemsize


def matrix_bytes(name: str, n: int, A: int, itemsize: int) -> int:
    return n * A * (1 if name.endswith("mask") else itemsize)
