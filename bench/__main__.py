"""``python -m bench``: the grid of sizes; ``demo``: the agent and its replay; ``update``: a whole update."""

import argparse
from pathlib import Path

from bench import demo, grid, update
from bench.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("grid", "demo", "update"), default="grid")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the CSV (default: out)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each provider at each size and variant (default: 1)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the loss (default: all)"
    )
    parser.add_argument("--plot", default="cartpole.png", help="where the demo saves its learning curve")
    parser.add_argument("--seed", type=int, default=1, help="of the demo's agent (default: 1)")
    args = parser.parse_args()
    if args.what == "demo":
        demo.run(args.plot, args.seed)
    elif args.what == "update":
        update.run()
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        grid.run(args.out, args.seconds, args.variants)


if __name__ == "__main__":
    main()
