"""Run a script with float64 as PyTorch's default dtype: python tests/in_float64.py script.py [arguments]."""

import runpy
import sys

import torch

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
