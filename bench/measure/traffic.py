"""The fewest bytes that a loss and its gradient have to move, whoever computes them."""

from bench.measure.variants import Variant

GIGA = 1e9


def least_bytes(variant: Variant, n: int, A: int, itemsize: int) -> int:
    """Every element of each matrix in `reads` once, and of the gradient once.

    A matrix of q's dtype is n*A*itemsize bytes, a mask n*A. The conservative term has q in its list although only its
    backward depends on the result of its forward: q is read in both. Left out is what there is one of for each sample
    (actions, rewards, q of the action taken, losses), and whatever a cache may save.
    """
    return sum(matrix_bytes(name, n, A, itemsize) for name in variant.reads) + n * A * itemsize


def matrix_bytes(name: str, n: int, A: int, itemsize: int) -> int:
    return n * A * (1 if name.endswith("mask") else itemsize)
