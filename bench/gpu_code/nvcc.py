"""The CUDA kernels of csrc/cuda, compiled by nvcc where it is installed."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu_code import aot
from bench.gpu_code.machine_code import widest
from bench.gpu_code.occupancy import occupancy
from bench.measure.machine import ROOT
from bench.reporting.results import Row

# One instance of each kernel that the float32 and bfloat16 losses launch, and the most threads of a block.
INSTANCES = {
    "forward_kernel<float, float, false>": ("float32", 768),
    "forward_kernel<float, float, true>": ("float32", 512),
    "rows_kernel<float, Largest<float>, false>": ("float32", 256),
    "rows_kernel<float, FirstLargest<float>, true>": ("float32", 256),
    "rows_kernel<float, Exponentials<float>, false>": ("float32", 256),
    "rows_kernel<BFloat16, Largest<float>, false>": ("bfloat16", 256),
    "backward_kernel<float, float, false>": ("float32", 256),
    "backward_kernel<float, float, true>": ("float32", 256),
    "backward_kernel<float, BFloat16, false>": ("bfloat16", 256),
    "sum_kernel<float>": ("float32", 512),
}


def rows() -> Iterator[Row]:
    """One row for each target and instance; none without nvcc, c++filt and the sources."""
    compiler, demangler = shutil.which("nvcc"), shutil.which("c++filt")
    source = ROOT / "csrc/cuda/td_loss.cu"
    if compiler is None or demangler is None or not source.exists():
        return
    known = subprocess.check_output([compiler, "--list-gpu-code"], text=True).split()
    for target in (target.name for target in aot.TARGETS if target.name in known):
        cubin = compiled(compiler, source, target)
        for name, usage, code in functions(cubin, demangler):
            if name in INSTANCES:
                dtype, threads = INSTANCES[name]
                yield {
                    "target": target,
                    "language": "cuda",
                    "dtype": dtype,
                    "kernel": name,
                    "registers": usage["REG"],
                    "spill_bytes": usage["STACK"] + usage["LOCAL"],
                    "shared_bytes": usage["SHARED"],
                    "load_bits": widest(code, "load"),
                    "store_bits": widest(code, "store"),
                    "block_threads": threads,
                    "occupancy": occupancy(target, usage["REG"], threads, usage["SHARED"]),
                }


def compiled(compiler: str, source: Path, target: str) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        subprocess.run(
            [
                compiler, "-cubin", f"-arch={target}", "-std=c++17", "-O3", "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(Path(torch.__file__).parent / "include"),
                str(source), "-o", file.name,
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        return Path(file.name).read_bytes()


def functions(cubin: bytes, demangler: str) -> Iterator[tuple[str, dict[str, int], str]]:
    """(name with template arguments, resources, machine code) of each function."""
    text = aot.disassembled("cuobjdump", "--dump-resource-usage", cubin)
    usages = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    code = aot.disassembled("nvdisasm", "-c", cubin)
    sections = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-----|\Z)", code, re.DOTALL | re.MULTILINE))
    names = subprocess.check_output([demangler], input="\n".join(name for name, _ in usages), text=True).splitlines()
    for (mangled, usage), name in zip(usages, names, strict=True):
        plain = re.search(r"dqn_fused::cuda::(\w+<.*?>)\(", name)
        if plain:
            yield (
                re.sub(r"\w+::", "", plain[1]),
                {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)},
                sections[mangled],
            )
