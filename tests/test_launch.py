"""Launch sizes, which are arithmetic: the least that the written models give, and everything covered once."""

import pytest

pytest.importorskip("triton")

from dqn_fused.kernels import distributions_launch, launch, sweep_launch

SIZES = [1, 3, 32, 128, 256, 257, 512, 1024, 4096, 16384, 10**6, 10**8]


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("A", [1, 2, 6, 18, 64])
def test_forward_is_the_least_of_the_model(A: int, share: int) -> None:
    """One program of tiles in a row, or several of one each and a launch to sum them, as the model has it."""
    for n in SIZES:
        for summed in (True, False):
            plan = launch.forward(n, A, share, summed)
            assert plan.programs * plan.tiles * plan.rows >= n
            assert (plan.programs - 1) * plan.tiles * plan.rows < n
            assert plan.rows * plan.block <= 32 * plan.num_warps * launch.PER_THREAD
            launches = 2 if summed and plan.programs > 1 else 1
            if plan.programs == 1:
                assert launch.modelled(plan.tiles, 1) <= launch.modelled(1, 2 if summed else 1)
            elif plan.tiles == 1:
                most = launch.SINGLE_WARPS * 32 * launch.PER_THREAD // share // max(plan.block, launch.ROW_COST)
                in_one = launch.next_power_of_2(launch.cdiv(n, min(most, launch.next_power_of_2(n))))
                assert launch.modelled(plan.tiles, launches) < launch.modelled(in_one, 1)


def test_512_x_18_is_two_short_launches() -> None:
    """It was one program of 8 tiles: 14 us by the model, which has 7 for two launches, and 4 for 128 x 18."""
    assert launch.forward(512, 18, 1, True).programs == 16
    assert launch.forward(512, 18, 1, False).programs == 16
    assert launch.forward(256, 18, 1, True) == launch.Forward(128, 32, 2, 1, 16)
    assert launch.forward(128, 18, 1, True) == launch.Forward(128, 32, 1, 1, 16)
    assert launch.modelled(8, 1) == pytest.approx(14.1)
    assert launch.modelled(1, 2) == pytest.approx(7.2)
    assert launch.modelled(1, 1) == pytest.approx(3.95)


def test_the_second_launch_sums_one_tile() -> None:
    """10^6 x 18 left 31,250 partial sums to one program."""
    for n in SIZES:
        for A in (1, 18, 64):
            for share in (1, 2, 4):
                assert launch.forward(n, A, share, True).programs <= launch.MAX_PROGRAMS
    assert launch.forward(10**6, 18, 1, True).programs == 3907


def test_entries_of_the_mask_are_counted_in_the_launch_while_that_is_faster() -> None:
    """Up to four loads in a row; a counter has 15 bits."""
    for n in (1, 512, 8192, 8193, 10**6):
        plan = launch.forward(n, 18, 1, True)
        loads = launch.cdiv(n, launch.COUNTED_A_WARP * plan.num_warps)
        assert (launch.counts(n, plan.num_warps) == 0) == (loads <= 4)
        assert loads > 4 or n < 2**15
    assert launch.counts(8192, launch.forward(8192, 18, 1, True).num_warps) == 0
    assert launch.counts(10**6, launch.forward(10**6, 18, 1, True).num_warps) == 245
    assert launch.COUNTED < 2**15
    assert launch.COUNTED % 16 == 0


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("dense", [False, True])
def test_a_run_of_the_backward_touches_two_rows(itemsize: int, dense: bool) -> None:
    for A in range(1, 3000):
        block, run = launch.backward(A, itemsize, dense)
        assert block % run == 0
        assert run <= A + 1
        assert run == block or run * itemsize <= 16
        assert run == block or run * itemsize == 16 or 2 * run > A + 1


@pytest.mark.parametrize("sms", [108, 132, 170, 304])
def test_the_sweep_leaves_little_of_the_device_idle(sms: int) -> None:
    """At 50,257 actions it was half of an H100 at m = 17,024, and 0.56 of 170 multiprocessors at 24,576."""
    for A, masked in ((50257, False), (50257, True), (151936, False)):
        for m in range(256, 34001, 32):
            plan = sweep_launch.sweep(m, A, 1024, 2, masked, "nvidia", sms)
            assert sweep_launch.share(plan, A, sms) >= 0.85, (A, m)
            assert plan.row_tiles * plan.rows >= m > (plan.row_tiles - 1) * plan.rows
            assert plan.splits * plan.chunk >= A > (plan.splits - 1) * plan.chunk
            at_once = min(plan.row_tiles, plan.group, sms)
            assert at_once <= max(sweep_launch.ROW_TILES_AT_ONCE, sms // plan.splits)
            assert plan.row_tiles <= 32 or at_once <= 32
            assert plan.splits <= max(sweep_launch.MAX_SPLITS, 2 * sms // plan.row_tiles + 1)


@pytest.mark.parametrize("units", sweep_launch.TILES)
def test_every_tile_of_the_sweep_is_done_once(units: str) -> None:
    """The order of the programs, as sweep_fwd_kernel has it."""
    for m in (1, 40, 300, 5000):
        for A in (1, 41, 1000, 50257):
            plan = sweep_launch.sweep(m, A, 64, 4, False, units, 132)
            seen = set()
            for program in range(plan.row_tiles * plan.splits):
                first = program // (plan.group * plan.splits) * plan.group
                size = min(plan.row_tiles - first, plan.group)
                among = program - first * plan.splits
                seen.add((first + among % size, among // size))
            assert len(seen) == plan.row_tiles * plan.splits
            assert max(seen) == (plan.row_tiles - 1, plan.splits - 1)


LARGE = [launch.MOST - 1, launch.MOST]
INT32 = 2**31 - 1


@pytest.mark.parametrize("n", LARGE)
def test_the_last_tile_of_the_largest_batch_ends_within_int32(n: int) -> None:
    """Whole tiles are counted, those behind the last row, too."""
    for A in (1, 2, 18, 64):
        for share in (1, 2, 4):
            plan = launch.forward(n, A, share, True)
            assert plan.programs * plan.tiles * plan.rows <= INT32
    for itemsize in (2, 4, 8):
        for wide in (False, True):
            for rows, A in ((n, 65), (3, n), (n, n)):
                plan = launch.rows(rows, A, itemsize, wide, 304)
                assert plan.programs <= INT32
                assert plan.programs // plan.splits * plan.rows <= INT32
                assert plan.splits * plan.chunk + plan.block <= INT32
    assert launch.counts(n, 4) * launch.COUNTED <= INT32
    for K in (1, 8, 200, 16384):
        for itemsize in (4, 8):
            pairs = distributions_launch.pairs(n, K, K, itemsize, 304)
            assert pairs.programs // pairs.splits * pairs.rows <= INT32
            assert distributions_launch.projection(n, 2, K, itemsize, 304).programs <= INT32
    for units in sweep_launch.TILES:
        for m, A in ((n, 1000), (64, n)):
            sweep = sweep_launch.sweep(m, A, 64, 2, False, units, 304)
            assert sweep.row_tiles * sweep.rows <= INT32
            assert sweep.splits * sweep.chunk + sweep.columns <= INT32
