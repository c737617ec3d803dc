"""Launch sizes of the kernels of distributions, as launch.py has those of the others: reasoned, not yet measured."""

from typing import NamedTuple

from .launch import MAX_PROGRAMS, cdiv, next_power_of_2

PER_THREAD = 16  # elements of a tile of logits, half of it in float64
PAIRS = 32  # of a thread at once, of an atom and a probability: they are added up as they are made
LEAST = 8  # elements or pairs that a thread is worth having for
MAX_WARPS = 16


class Categorical(NamedTuple):
    """Launch of ``categorical_fwd_kernel``."""

    actions: int  # of a tile
    atoms: int
    chunk: int  # probabilities that are shared at once
    tiles: int  # samples of a program, one after the other
    programs: int
    num_warps: int


def categorical(n: int, A: int, K: int, itemsize: int, choice: str | None) -> Categorical:
    """A program a sample: one batch of Atari fills a device with a warp for each 512 of its logits."""
    atoms, actions = next_power_of_2(K), next_power_of_2(A)
    most = PER_THREAD * 32 * 4 // max(itemsize, 4)  # elements of a warp
    row = 1 if choice == "value" else atoms  # elements of an action
    work = atoms if choice is None else max(actions * row, atoms * atoms // 2)
    num_warps = max(1, min(4, work // (LEAST * 32)), min(MAX_WARPS, 2 * atoms // most))
    actions = max(1, min(actions, num_warps * most // row))
    chunk = max(1, min(atoms, num_warps * 32 * PAIRS * 4 // max(itemsize, 4) // atoms))
    tiles = next_power_of_2(cdiv(n, MAX_PROGRAMS))
    return Categorical(actions, atoms, chunk, tiles, cdiv(n, tiles), num_warps)
