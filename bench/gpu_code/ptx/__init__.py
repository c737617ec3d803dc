"""The GPU code executed without a GPU: PTX, as the compilers emit it, run on the CPU over every thread of a grid.

- engine/: a C++ library that parses a kernel and executes it, with checks of bounds, alignment, unwritten bytes, races
  and barriers; built on first use by build.py, called through executor.py.
- triton.py: stands in for the launch of the Triton backend.
- cuda.py: csrc/cuda with its own host code, a CUDA runtime of a few functions beneath it.

Tests run on it, and bench/gpu_code/kernels.py counts with it; it is in bench/ because tests import bench and never the
reverse.

Assumed of a GPU: the lanes of a warp run together unless a branch parts them, memory is in order, ex2, lg2, approximate
division and the sums within a matrix product are the host's. Not executed: wgmma, tcgen05, TMA, AMD.
"""
