"""The launch sizes of csrc/cuda/geometry.h, compiled for the host: everything is covered, and nothing too large."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[1] / "csrc/cuda/geometry.h"
CXX = shutil.which("c++")
EXPORTS = """
using namespace dqn_fused::cuda;
extern "C" {
void rows(const long* x, long* y) {
  auto p = rows_launch(x[0], x[1]);
  y[0] = p.splits, y[1] = p.chunk, y[2] = p.blocks;
}
void forward(const long* x, long* y) {
  auto p = forward_launch(x[0], x[1], x[2]);
  y[0] = p.lanes, y[1] = p.threads, y[2] = p.block_rows, y[3] = p.blocks;
}
void backward(const long* x, long* y) {
  auto p = backward_launch(x[0], x[1], x[2]);
  y[0] = p.block, y[1] = p.blocks, y[2] = p.rows;
}
}
"""
GRID, SHARED = 2**31 - 1, 48 << 10
Launch = Callable[..., list[int]]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    if CXX is None or not HEADER.exists():
        pytest.skip("no C++ compiler, or no source tree")
    folder = tmp_path_factory.mktemp("geometry")
    (folder / "geometry.cpp").write_text(f'#include "{HEADER}"\n{EXPORTS}')
    library = folder / "geometry.so"
    subprocess.run([CXX, "-std=c++17", "-shared", "-fPIC", "-o", library, folder / "geometry.cpp"], check=True)
    functions = ctypes.CDLL(str(library))

    def call(name: str, *given: int) -> list[int]:
        out = (ctypes.c_long * 4)()
        getattr(functions, name)((ctypes.c_long * len(given))(*given), out)
        return list(out)

    return call


@pytest.mark.parametrize("A", [65, 512, 2048, 2049, 50_257, 128_256, 1_000_003])
@pytest.mark.parametrize("rows", [1, 2, 64, 1024, 100_000, 10_000_000])
def test_rows(launch: Launch, rows: int, A: int) -> None:
    splits, chunk, blocks, _ = launch("rows", rows, A)
    assert (splits - 1) * chunk < A <= splits * chunk, "each split has columns, and each column one split"
    assert blocks * 8 >= rows * splits > (blocks - 1) * 8, "a warp for each row and split"
    assert blocks <= GRID
    if rows <= 64 and A >= 50_257:
        assert rows * splits >= min(132 * 8, rows * (A // 2048)), "few rows fill the device, too"


@pytest.mark.parametrize("most", [384, 512, 768])
@pytest.mark.parametrize("K", [1, 2, 8, 9, 18, 64, 128, 4096, 4097, 1_000_000])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 128, 512, 3072, 3073, 100_000, 50_000_000])
def test_forward(launch: Launch, n: int, K: int, most: int) -> None:
    lanes, threads, block_rows, blocks = launch("forward", n, K, most)
    assert lanes in (1, 2, 4, 8, 16, 32)
    assert lanes == 32 or lanes * 8 >= K
    assert 32 <= threads <= most
    assert threads % 32 == 0
    assert block_rows * blocks >= n > block_rows * (blocks - 1) or n == 0
    assert 1 <= blocks <= 4096, "what sum_kernel adds"
    if n * lanes <= 3 * most and K <= 4096:
        assert blocks == 1, "one launch"


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("A", [1, 2, 3, 15, 16, 18, 64, 65, 1000, 128_256, 2**33])
@pytest.mark.parametrize("n", [1, 2, 7, 128, 100_000])
def test_backward(launch: Launch, n: int, A: int, itemsize: int) -> None:
    size = n * A
    block, blocks, rows, _ = launch("backward", size, A, itemsize)
    assert block * blocks >= size > block * (blocks - 1)
    assert block * itemsize % (256 * 16) == 0, "every thread stores whole vectors"
    assert blocks <= GRID or size > 2**40
    # A block may begin in any column.
    assert rows == max((start % A + block - 1) // A + 1 for start in (0, 1, A - 1, block % A))
    accumulated = 8 if itemsize == 8 else 4
    assert rows * (8 + 4 * accumulated) <= SHARED
