"""The numerical tests on every processor that this one can act as: python tests/anywhere.py [--seeds 20].

Each run has a seed of its own for the data, and the next combination of the vector instructions of PyTorch, those of
csrc/ and one or two threads, so that twenty runs have seen all of them. Two runs go at a time. Each prints one line,
and one that fails also prints what pytest said. What depends on none of this (packaging, code compiled ahead of time,
the benchmark, recipes) is left to the suite.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = [
    "test_loss", "test_family", "test_linear", "test_autograd", "test_reference", "test_golden", "test_compiled",
    "test_properties", "test_transforms", "test_far_from_zero", "test_call_sites", "test_training_loop",
    "test_quantile", "test_quantile_autograd", "test_quantile_compiled",
    "test_categorical", "test_categorical_autograd", "test_distributional_autograd",
]  # fmt: skip


def environment(seed: int) -> dict[str, str]:
    """One of the 18 combinations: 18 seeds in a row have all of them, and neighbours differ in most settings."""
    combinations = [*itertools.product([None, "default", "avx2"], [None, "default", "avx2"], ["2", "1"])]
    names = ("ATEN_CPU_CAPABILITY", "DQN_FUSED_CPU_CAPABILITY", "OMP_NUM_THREADS")
    chosen = zip(names, combinations[5 * seed % len(combinations)], strict=True)
    return {name: value for name, value in chosen if value is not None}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(seed: int, interpreted: bool, one_in: int) -> bool:
    """Run the tests once, or one in so many of them, which move with the seed; print one line, and the failures."""
    changed = environment(seed)
    sample = str(int(os.environ.get("DQN_FUSED_TEST_SAMPLE", "0")) + seed)
    own = {**os.environ, **changed, "DQN_FUSED_TEST_SEED": str(seed), "DQN_FUSED_TEST_SAMPLE": sample}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-k", "not opcheck"]
    command += ["--one-in", str(one_in)]
    command += [f"tests/{name}.py" for name in TESTS]
    if interpreted:
        own["TRITON_INTERPRET"] = "1"
        command += ["tests/test_sweep.py", "-m", "interpret"]
    else:  # graphs, and losses recorded without the node in C++, call the same functions
        command += ["-m", "not ptx and not graph and not without_node"]
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines() or [result.stderr]
    what = " ".join(f"{name}={value}" for name, value in changed.items())
    print(f"seed {seed:2}: {lines[-1]} ({time.monotonic() - start:.0f} s) {what}", flush=True)
    if result.returncode:
        print("\n".join(lines[-80:]), result.stderr[-2000:], sep="\n", flush=True)
    return result.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="runs (default: 20)")
    parser.add_argument("--first", type=int, default=1, help="first seed; the suite's own is 0 (default: 1)")
    parser.add_argument("--one-in", type=int, default=1, help="each run takes the next one in so many (default: all)")
    parser.add_argument("--interpret", action="store_true", help="the Triton kernels in their interpreter instead")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    with ThreadPoolExecutor(min(2, cores())) as pool:
        passed = list(pool.map(run, seeds, itertools.repeat(args.interpret), itertools.repeat(args.one_in)))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
