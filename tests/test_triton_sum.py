"""The second stage alone: more partial sums than one block of it holds."""

import pytest
import torch
from conftest import TRITON_DEVICE, TRITON_MARK

triton = pytest.importorskip("triton")
pytestmark = TRITON_MARK


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 3000])
def test_sum_of_any_number_of_partial_sums(n: int) -> None:
    from dqn_fused._backends.triton_backend import SUM_BLOCK, run, sum_kernel, tl

    partial = torch.randn(n, device=TRITON_DEVICE)
    loss = torch.empty((), device=TRITON_DEVICE)
    run(sum_kernel, 1, loss, partial, n, BLOCK=SUM_BLOCK, ACC=tl.float32, num_warps=4)
    torch.testing.assert_close(loss.double(), partial.double().sum(), rtol=1e-5, atol=1e-5)
