"""``python -m dqn_fused``: versions, devices and backends, for a bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import dqn_fused
from dqn_fused import node
from dqn_fused._backends.compiled_backend import cpu_capability


def report() -> str:
    """What is installed and which backends can run, one fact a line."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    lines = [
        f"dqn_fused  {dqn_fused.__version__}",
        f"torch      {torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})",
        f"triton     {triton}",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"cpu        torch {torch.backends.cpu.get_cpu_capability()}, csrc {cpu_capability() or 'not built'}, "
        f"{torch.get_num_threads()} threads",
    ]
    lines.append(f"autograd   recorded in {f'Python: {node.MISSING}' if node.MODULE is None else 'C++'}")
    for i in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        lines.append(f"cuda:{i}     {torch.cuda.get_device_name(i)}, compute capability {capability}")
    for name, status in dqn_fused.backends().items():
        state, why = ("available", ", but ") if status.available else ("not available", ": ")
        lines.append(f"backend    {name}: {state}{why + status.reason if status.reason else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
