"""The CUDA ops compile for every generation of GPU that this nvcc knows, without warnings and without spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
# Of a thread. A multiprocessor has 65,536: of the kernels that move the bytes three blocks or more are resident.
MOST_REGISTERS = {"forward_kernel": 128, "rows_kernel": 64, "backward_kernel": 80, "sum_kernel": 64}


def targets() -> list[int]:
    """Of those that this nvcc knows: the oldest, the newest and what is most in use."""
    if NVCC is None or not (ROOT / "csrc").is_dir():
        return []
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    numbers = sorted(int(code.removeprefix("sm_")) for code in known if code.removeprefix("sm_").isdigit())
    return sorted({80, 90, 100, numbers[-1]} & set(numbers))


@pytest.mark.aot
@pytest.mark.parametrize("target", targets())
def test_no_warnings_no_spills(target: int, tmp_path: Path) -> None:
    assert NVCC is not None
    result = subprocess.run(
        [
            NVCC, "-c", str(ROOT / "csrc/cuda/td_loss.cu"), "-o", str(tmp_path / "td_loss.o"), "-std=c++17", "-O3",
            "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-fPIC", "-Xptxas", "-v",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-isystem", str(Path(torch.__file__).parent / "include"),
            f"-gencode=arch=compute_{target},code=sm_{target}",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert f"for 'sm_{target}'" in log
    stacks = set(re.findall(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", log))
    assert stacks == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    check_symbols(tmp_path / "td_loss.o")
    entry = r"Compiling entry function '_ZN9dqn_fused4cuda\d+([a-z_]+)I(\w).*?Used (\d+) registers"
    used = re.findall(entry, log, re.DOTALL)
    assert {name for name, _, _ in used} == set(MOST_REGISTERS)
    for name, dtype, registers in used:
        assert int(registers) <= MOST_REGISTERS[name] * (2 if dtype == "d" else 1), name


def check_symbols(path: Path) -> None:
    """What the object leaves to LibTorch is in its CPU library, or among the three that its CUDA library has."""

    def names(path: Path, *options: str) -> set[str]:
        out = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].split("@")[0] for line in out.splitlines()}

    cuda = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}
    wanted = {name for name in names(path, "-u") if name.startswith(("aoti_", "torch_"))}
    assert "aoti_torch_get_current_cuda_stream" in wanted
    assert wanted - names(Path(torch.__file__).parent / "lib/libtorch_cpu.so", "-D", "--defined-only") <= cuda
