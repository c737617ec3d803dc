"""Markdown tables of the figures, for the terminal and the README."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.reporting.results import Row


def tables(kind: str, rows: Sequence[Row]) -> dict[str, str]:
    """Title -> table, of all providers."""
    if not rows:
        return {}
    if kind == "loss":
        names = dict.fromkeys(row["variant"] for row in rows)
        return {name: loss([row for row in rows if row["variant"] == name], seen(rows, name)) for name in names}
    title, table = {
        "linear": ("linear head", linear),
        "distributional": ("distributional losses", distributional),
        "update": ("whole update", update),
        "graph": ("network and loss in one graph", graph),
    }[kind]
    return {title: table(rows)}


AGAIN = "eager, again"  # the same graph under another name: how far apart they are is what the measurement can tell

SUMMARY = {
    ("dqn", "32 x 18"): "DQN, 32 x 18",
    ("dqn", "1024 x 18"): "DQN, 1024 x 18",
    ("dqn", "1024 x 512"): "DQN, 1024 x 512",
    ("dqn", "256 x 50257"): "DQN, 256 x 50257",
    ("masked double", "1024 x 512"): "masked double DQN, 1024 x 512",
    ("munchausen", "1024 x 512"): "Munchausen, 1024 x 512",
    ("cql", "1024 x 512"): "CQL, 1024 x 512",
    ("QR-DQN", "32 x 18 x 200"): "QR-DQN, 32 x 18 x 200 quantiles",
    ("IQN", "32 x 18 x 64"): "IQN, 32 x 18 x 64 samples",
    ("C51", "32 x 18 x 51"): "C51, 32 x 18 x 51 atoms",
}
SUMMARY_HEAD = (50257, 512)


def summary(loss: Sequence[Row], distributional: Sequence[Row], linear: Sequence[Row]) -> str:
    """A line for each of some sizes of every family: eager's lines, the loss with its backward, loss and gradient."""
    found: dict[str, dict[str, Row]] = {}
    for row in (*loss, *distributional):
        size = " x ".join(str(row[name]) for name in ("n", "A", "K") if name in row)
        label = SUMMARY.get((row["variant"], size)) if row["dtype"] == "float32" else None
        if label is not None:
            found.setdefault(label, {})[row["provider"]] = row
    names = {"eager": "eager", "fused[compiled]": "fused", "loss_and_grad[compiled]": "loss and gradient"}
    lines = ["| loss, forward and backward | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(names)]
    for label in SUMMARY.values():
        if all(name in found.get(label, ()) for name in names):
            lines.append(f"| {label} | " + " | ".join(cell(found[label][name], True) for name in names) + " |")
    A, D = SUMMARY_HEAD
    heads = {row["provider"]: row for row in linear if (row["A"], row["D"], row["variant"]) == (A, D, "dqn")}
    if "eager" in heads and "fused" in heads:
        size = f"{heads['fused']['n']} x {A}, {D} features"
        lines.append(f"| linear head, {size} | {cell(heads['eager'], True)} | {cell(heads['fused'], True)} | |")
    return "\n".join(lines) if len(lines) > 2 else ""


def seen(rows: Iterable[Row], variant: str | None = None) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows if variant in (None, row.get("variant"))))


def loss(rows: Sequence[Row], providers: Sequence[str], memory: bool = False) -> str:
    """A line a variant, size and dtype."""
    several = len({row["variant"] for row in rows}) > 1

    def label(row: Row) -> str:
        name = f"{row['variant']}, " if several else ""
        return f"{name}{size_of(row)}"

    head = "loss, n x A" if several else "n x A"
    return grid(head, rows, label, providers, lambda row: cell(row, memory))


def linear(rows: Sequence[Row], providers: Sequence[str] | None = None) -> str:
    """A line a head."""
    return grid("A x D", rows, head_of, providers or seen(rows), lambda row: cell(row, True))


def distributional(rows: Sequence[Row], providers: Sequence[str] | None = None) -> str:
    """A line a loss and size."""
    return grid("loss, n x A x K", rows, of_variant, providers or seen(rows), lambda row: cell(row, True))


def update(rows: Sequence[Row]) -> str:
    """A line a network, mode and loss."""
    lines = ["| network | update | loss | time | times as fast | the loss adds | of the update |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for row in rows:
        threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
        network = f"{row['network']}, {row['n']} x {row['A']}, {threads}"
        cells = [network, row["mode"], f"`{row['provider']}`" if "_" in row["provider"] else row["provider"]]
        cells += [time(row["us"]), f"{row['speedup']:.2f}x"]
        if row["adds_us"] == "":
            cells += ["", ""]
        else:
            around = f"{row['adds_p20']:,.0f} to {row['adds_p80']:,.0f}"
            cells += [f"{row['adds_us']:,.0f} us ({around})", f"{100 * row['share']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def graph(rows: Sequence[Row]) -> str:
    """A line a variant and size: what each loss adds to the graph without one, and how far it is behind eager's.

    Eager's graph under its second name is left to the sentence about noise.
    """
    rows = [row for row in rows if row["provider"] != AGAIN]

    def label(row: Row) -> str:
        return size_of(row) if row["variant"] == "dqn" else of_variant(row)

    def cell(row: Row) -> str:
        if row["adds_us"] == "":
            return time(row["us"])
        behind = "" if row["provider"] == "eager" else f" ({100 * row['behind']:+.1f} %)"
        return f"{row['adds_us']:+,.0f} us{behind}"

    return grid("loss, n x A, or n x A x K", rows, label, seen(rows), cell)


def kernels(rows: Sequence[Row], case_of: Callable[[Row], str]) -> str:
    """A line a kernel and case, a column a target: registers, spilled bytes, occupancy.

    The first case of each, where a kernel takes the same in several.
    """
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---|" + "---:|" * len(targets)]
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(case_of(row), {})[row["target"]] = row
    said = set()
    for case, found in by_case.items():
        text = " | ".join(resources(found[target]) if target in found else "" for target in targets)
        kernel = next(iter(found.values()))["kernel"]
        if (kernel, text) not in said:
            lines.append(f"| {case} | {text} |")
        said.add((kernel, text))
    return "\n".join(lines)


def resources(row: Row) -> str:
    parts = [str(row["registers"])]
    if row["spill_bytes"]:
        parts.append(f"{row['spill_bytes']} B spilled")
    if row["occupancy"] != "":
        parts.append(f"{100 * row['occupancy']:.0f} %")
    return ", ".join(parts)


def counts(rows: Sequence[Row], case_of: Callable[[Row], str]) -> str:
    """A line a kernel and case: what was counted when it was executed, of one target."""
    lines = [
        "| kernel | bytes moved | of the matrices | sectors | bank conflicts | instructions a warp | integer | float "
        "| special | shuffles | barriers | shared memory |",
        "|---|" + "---:|" * 11,
    ]
    for row in rows:
        moved = row["loaded_bytes"] + row["stored_bytes"]
        parts = [f"{moved:,}", f"{moved / row['bytes']:.3f}", f"{row['sectors']:,}", f"{row['bank_conflicts']:,}"]
        names = ("instructions", "integer", "float", "special", "shuffle", "barrier", "shared_access")
        parts += [f"{row[name]:,.0f}" for name in names]
        lines.append(f"| {case_of(row)} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def host(rows: Sequence[Row]) -> str:
    """A line a case and call: the least that it took the host."""

    def label(row: Row) -> str:
        return f"{row['call']}, {row['case']} {row['shape']}"

    return grid("call", rows, label, seen(rows), lambda row: f"{row['us_least']:.1f} us ({row['of_least']:.1f}x)")


def grid(
    head: str,
    rows: Sequence[Row],
    label: Callable[[Row], str],
    providers: Sequence[str],
    cell: Callable[[Row], str],
) -> str:
    """One line for each label, one column for each provider."""
    names = [f"`{name}`" if "[" in name else name for name in providers]
    lines = [f"| {head} | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    by_label: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_label.setdefault(label(row), {})[row["provider"]] = row
    for text, found in by_label.items():
        cells = [cell(found[name]) if name in found else "" for name in providers]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size_of(row: Row) -> str:
    K = "" if row.get("K", "") == "" else f" x {row['K']}"
    return f"{row['n']} x {row['A']}{K}{dtype_of(row)}"


def of_variant(row: Row) -> str:
    return f"{row['variant']}, {size_of(row)}"


def head_of(row: Row) -> str:
    variant = "" if row["variant"] == "dqn" else f", {row['variant']}"
    return f"{row['A']:,} x {row['D']}{variant}{dtype_of(row)}"


def dtype_of(row: Row) -> str:
    return "" if row["dtype"] == "float32" else f", {row['dtype']}"


def cell(row: Row, memory: bool) -> str:
    text = f"{time(row['us'])} ({row['speedup']:.2f}x)"
    peak = row["peak_bytes"]
    return f"{text}, {peak / 1e6:,.1f} MB" if memory and peak != "" and peak >= 1e5 else text


def time(us: float) -> str:
    return f"{us:,.0f} us" if us < 10_000 else f"{us / 1000:,.1f} ms"
