"""Measure the losses.

full: everything; quick: under a minute; gpu: everything that needs a GPU, in one folder; kernels: the resources of the
compiled GPU kernels and the host's time per launch, without a GPU; report: tables and pictures from the CSV; demo: an
agent and its own replay batches.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.measure.suite import KINDS, run
from bench.measure.variants import VARIANTS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=("quick", "full", "gpu", "report", "kernels", "demo"), default="full"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of CSV and pictures (default: out)")
    parser.add_argument("--seconds", type=float, help="per provider and size (default: 0.5; quick: 0.1)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds (default: all)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the loss (default: all)"
    )
    parser.add_argument("--results", type=Path, help="folder that report reads (default: all in bench/results)")
    parser.add_argument("--limit", type=float, default=450, help="seconds that gpu may take (default: 450)")
    parser.add_argument("--plot", default="cartpole.png", help="where the demo saves its learning curve")
    parser.add_argument("--seed", type=int, default=1, help="of the demo's agent (default: 1)")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    if args.what == "demo":
        from bench.measure.demo import run as run_demo

        run_demo(args.plot, args.seed)
        return 0
    if args.what == "report":
        from bench.reporting.report import result_folders
        from bench.reporting.report import run as run_report

        run_report([args.results] if args.results else result_folders())
        return 0
    if args.what == "kernels":
        from bench.gpu_code.host import run as run_host
        from bench.gpu_code.kernels import run as run_kernels

        run_kernels()
        run_host()
        return 0
    if args.what == "gpu":
        from bench.measure.gpu import run as run_gpu

        return run_gpu(args.out, args.seconds or 0.5, args.variants, args.only, args.limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = args.seconds or (0.1 if args.what == "quick" else 0.5)
    return 1 if run(args.out, device, seconds, args.variants, args.what, args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
