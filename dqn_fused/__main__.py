"""``python -m dqn_fused``: versions, devices and backends, for a bug report; ``--json`` for a program."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import dqn_fused
from dqn_fused import node
from dqn_fused._backends.compiled_backend import cpu_capability


def facts() -> dict[str, Any]:
    """What is installed, what it runs on, and which backends can run here, as values that JSON can hold."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "dqn_fused": dqn_fused.__version__,
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "triton": triton,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "csrc": cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "autograd": {"node": node.MODULE is not None, "reason": node.MISSING},
        "devices": [
            {
                "device": f"cuda:{i}",
                "name": torch.cuda.get_device_name(i),
                "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            }
            for i in range(torch.cuda.device_count())
        ],
        "backends": {name: status._asdict() for name, status in dqn_fused.backends().items()},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("DQN_FUSED_") or name == "TRITON_INTERPRET"
        },
    }


def report(found: dict[str, Any]) -> str:
    """The facts as text, one per line."""
    torch, cpu, autograd = found["torch"], found["cpu"], found["autograd"]
    lines = [
        f"dqn_fused  {found['dqn_fused']}",
        f"torch      {torch['version']} (CUDA {torch['cuda']}, HIP {torch['hip']})",
        f"triton     {found['triton'] or 'not installed'}",
        f"python     {found['python']} on {found['platform']}",
        f"cpu        torch {cpu['torch']}, csrc {cpu['csrc'] or 'not built'}, {cpu['threads']} threads",
        f"autograd   recorded in {'C++' if autograd['node'] else 'Python: ' + autograd['reason']}",
    ]
    for gpu in found["devices"]:
        lines.append(f"{gpu['device']}     {gpu['name']}, compute capability {gpu['compute_capability']}")
    for name, status in found["backends"].items():
        state, why = ("available", ", but ") if status["available"] else ("not available", ": ")
        lines.append(f"backend    {name}: {state}{why + status['reason'] if status['reason'] else ''}")
    lines += [f"variable   {name}={value}" for name, value in found["environment"].items()]
    return "\n".join(lines)


def main() -> None:
    """Print the facts."""
    parser = argparse.ArgumentParser(prog="python -m dqn_fused", description="Versions, devices and backends.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    found = facts()
    print(json.dumps(found, indent=2) if parser.parse_args().json else report(found))


if __name__ == "__main__":
    main()
