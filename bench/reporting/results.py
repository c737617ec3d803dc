"""Rows of figures as CSV: one schema a kind, written as they come, so that a crash keeps what was measured."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ABOUT = ("kind", "device", "cores", "threads", "os", "python", "torch", "triton", "commit")
TIMES = ("us", "us_p20", "us_p80", "speedup")
ON_A_GPU = ("device_us", "graph_us")  # time in kernels; a replay of the CUDA graph
COLUMNS = {
    "loss": (
        *ABOUT, "variant", "n", "A", "dtype", "provider", *TIMES, *ON_A_GPU,
        "bytes", "gb_per_s", "of_floor", "peak_bytes",
    ),
    "linear": (*ABOUT, "variant", "n", "A", "D", "dtype", "provider", *TIMES, *ON_A_GPU, "peak_bytes"),
    "distributional": (*ABOUT, "variant", "n", "A", "K", "dtype", "provider", *TIMES, *ON_A_GPU, "peak_bytes"),
    "update": (
        *ABOUT, "network", "n", "A", "dtype", "mode", "provider", *TIMES, "adds_us", "adds_p20", "adds_p80",
        "share", "peak_bytes",
    ),
    "host": (*ABOUT, "call", "case", "shape", "dtype", "provider", *TIMES, "us_least", "of_least"),
    "graph": (
        *ABOUT, "variant", "n", "A", "K", "dtype", "provider", *TIMES, "adds_us", "adds_p20", "adds_p80", "behind",
    ),
    "launches": (*ABOUT, "case", "provider", "launch", "count", "us"),
    "kernels": (
        *ABOUT, "target", "language", "call", "case", "shape", "dtype", "kernel", "registers", "spill_bytes",
        "shared_bytes", "load_bits", "store_bits", "block_threads", "programs", "occupancy", "bytes",
        # Counted by bench/gpu_code/ptx for the launch; instructions are of PTX and per warp, in all and by kind.
        "loaded_bytes", "stored_bytes", "sectors", "bank_conflicts",
        "instructions", "integer", "float", "special", "shuffle", "barrier", "shared_access",
    ),
}  # fmt: skip
INTEGERS = {
    "cores", "threads", "n", "A", "D", "K", "bytes", "peak_bytes", "registers", "spill_bytes", "shared_bytes",
    "load_bits", "store_bits", "block_threads", "programs", "loaded_bytes", "stored_bytes", "sectors", "bank_conflicts",
}  # fmt: skip
NUMBERS = {
    *TIMES, *ON_A_GPU, "gb_per_s", "of_floor", "adds_us", "adds_p20", "adds_p80", "share", "behind", "count",
    "us_least", "of_least", "occupancy", "instructions", "integer", "float", "special", "shuffle", "barrier",
    "shared_access",
}  # fmt: skip


class Table:
    """A CSV file that grows; what a row lacks stays empty."""

    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.columns = folder / f"{kind}.csv", COLUMNS[kind]
        self.rows: list[Row] = []
        with self.path.open("w", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writeheader()

    def add(self, rows: Iterable[Row]) -> None:
        new = [{column: row.pop(column, "") for column in self.columns} | row for row in map(dict, rows)]
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(new)  # refuses a column it does not know
        self.rows += new


def read(path: Path) -> list[Row]:
    """Rows with their numbers as numbers; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{column: _parsed(column, text) for column, text in row.items()} for row in csv.DictReader(file)]


def _parsed(column: str, text: str) -> Any:
    if text and column in INTEGERS:
        return int(text)
    return float(text) if text and column in NUMBERS else text
