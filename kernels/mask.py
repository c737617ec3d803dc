"""Triton kernel and helpers that count the true entries of non_final_mask before a row: its place in next_q."""

import triton
import triton.language as tl

VEC = tl.constexpr(16)  # entries, of one byte each
BEFORE = tl.constexpr(1 << 16)  # a counter has all true entries in its lower half, those before a row in its upper


@triton.jit
def count_range(mask, low, high, row, BLOCK: tl.constexpr):
    """Numbers of the true entries of mask[low:high] and of those before a row, below 2^15; 16 divides low."""
    body = high // VEC * VEC
    counters = tl.zeros([BLOCK], tl.int32)
    for first in range(low, body, BLOCK):
        i = first + tl.arange(0, BLOCK)
        # Compared by vector, not by element: the load stays whole.
        entry = tl.load(mask + i, mask=i // VEC < body // VEC, other=0) != 0
        counters += tl.where(entry, tl.where(i < row, BEFORE + 1, 1), 0)
    i = body + tl.arange(0, VEC)
    entry = tl.load(mask + i, mask=(i < high) & (i >= low), other=0) != 0
    total = tl.sum(counters, 0) + tl.sum(tl.where(entry, tl.where(i < row, BEFORE + 1, 1), 0), 0)
    return total % BEFORE, total // BEFORE


@triton.jit
def count_before(mask, counts, row, n, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of the true entries of a mask, (n,), and of those before a row.

    counts: None, or how many of each COUNTED entries are true, so that not all of the mask has to be read.
    """
    if counts is None:
        total, before = count_range(mask, 0, n, row, BLOCK)
    else:
        chunk = row // COUNTED
        totals = tl.zeros([BLOCK], tl.int32)
        befores = tl.zeros([BLOCK], tl.int32)
        for first in range(0, tl.cdiv(n, COUNTED), BLOCK):
            i = first + tl.arange(0, BLOCK)
            found = tl.load(counts + i, mask=i < tl.cdiv(n, COUNTED), other=0)
            totals += found
            befores += tl.where(i < chunk, found, 0)
        _, within = count_range(mask, chunk * COUNTED, row, row, BLOCK)
        total = tl.sum(totals, 0)
        before = tl.sum(befores, 0) + within
    return total, before


@triton.jit(do_not_specialize=["n"])
def count_kernel(counts, mask, n, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """How many of each COUNTED entries of a mask, (n,), are true."""
    low = tl.program_id(0) * COUNTED
    total, _ = count_range(mask, low, tl.minimum(low + COUNTED, n), 0, BLOCK)
    tl.store(counts + tl.program_id(0), total)
