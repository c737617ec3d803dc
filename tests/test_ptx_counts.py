"""What the executor counts: bytes of global memory against bench/measure/traffic.py, exactly, and conflicts."""

import pytest
import torch
from conftest import EXECUTED
from test_loss import dtype_id

pytest.importorskip("triton")
if not EXECUTED:
    pytest.skip("needs g++, and the compiler in place of the interpreter", allow_module_level=True)

from bench.gpu_code import aot
from bench.gpu_code.ptx.triton import executing
from bench.measure.traffic import least_bytes
from bench.measure.variants import VARIANTS, random_arguments

pytestmark = pytest.mark.executor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(64, 8192), (33, 4099)], ids=str)
@pytest.mark.parametrize("variant", ["dqn", "masked double", "munchausen", "cql"])
def test_bytes_of_the_wide_regime(variant: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every matrix is read once, or twice where both passes need it, and the gradient written once: 5% for the rest.

    No row is terminated, since its matrices would not be read.
    """
    chosen = VARIANTS[variant]
    arguments = random_arguments(chosen, *shape, dtype, "cpu")
    arguments["terminated"] = torch.zeros_like(arguments["terminated"])
    options = {name: x for name, x in chosen.options.items() if name != "return_td_error"}
    with executing("sm_90", races=False) as executor:
        aot.calls(arguments, **options)["loss_and_grad"]()
    moved = sum(launch.counts["load_bytes"] + launch.counts["store_bytes"] for launch in executor.launches)
    least = least_bytes(chosen, *shape, dtype.itemsize)
    assert 1 <= moved / least <= 1.05, f"{moved} bytes, {moved / least:.4f} of the model's {least}"
    stored = {launch.name: launch.counts["store_bytes"] for launch in executor.launches}
    assert stored["td_loss_bwd_kernel"] == shape[0] * shape[1] * dtype.itemsize
    assert sum(launch.counts["atomic"] for launch in executor.launches) == 0


def test_bytes_of_rows_that_are_terminated() -> None:
    """They are not read: half of the rows, half of the bytes."""
    arguments = random_arguments(VARIANTS["dqn"], 64, 8192, torch.float32, "cpu")
    moved = []
    for end in (0, 2):
        arguments["terminated"] = torch.arange(64) % 2 < end // 2
        arguments["terminated"][0] = False
        with executing("sm_90", races=False) as executor:
            aot.calls(arguments)["forward"]()
        moved.append(sum(x.counts["load_bytes"] for x in executor.launches if x.name == "row_fwd_kernel"))
    assert moved[1] < 0.55 * moved[0]
