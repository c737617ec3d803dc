"""Triton helper of the backwards: a block of a flat array of rows, which one dense store writes."""

import triton
import triton.language as tl


@triton.jit
def block_of_rows(width, FAR: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """The block of this program in a contiguous (rows, width) array, cut into runs of RUN <= width + 1 elements.

    So a run touches at most two rows: what belongs to a row is loaded twice a run, not once an element. Returns

    - where the block starts, an element of the flat array;
    - the first row of each run, [runs];
    - the column of each element, and whether it is in the second row of its run, both [runs, elements];
    - where each element is in the flat array, [runs, elements].

    FAR: the array has more elements than int32 counts; else the division is in int32, which is cheaper.
    """
    start = tl.program_id(0)
    if FAR:
        start = start.to(tl.int64)
    start = start * BLOCK
    first = start // width
    run = tl.arange(0, BLOCK // RUN) * RUN
    column = (start - first * width).to(tl.int32) + run  # [runs], from the start of the block's first row
    skipped = column // width if RUN < BLOCK else tl.zeros([BLOCK // RUN], tl.int32)
    element = tl.arange(0, RUN)[None, :]
    row = first + skipped
    column = (column - skipped * width)[:, None] + element
    second = column >= width
    column = tl.where(second, column - width, column)
    return start, row, column, second, (start + run)[:, None] + element
