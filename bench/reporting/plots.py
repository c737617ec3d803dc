"""Pictures of the figures: speed against eager, the share of the floor, memory. Without matplotlib there are none."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.reporting import tables
from bench.reporting.results import Row, read

# This project's providers are in colours, the others in greys and browns.
STYLE: dict[str, dict[str, Any]] = {
    "eager": {"color": "0.25", "linestyle": "--"},
    "eager, CUDA graph": {"color": "0.25", "linestyle": ":"},
    "torch.compile": {"color": "0.55", "marker": "s"},
    "torch.compile, reduce-overhead": {"color": "0.55", "marker": "s", "linestyle": ":"},
    "TorchRL": {"color": "tab:brown", "marker": "v"},
    "rlax": {"color": "tab:olive", "marker": "^"},
    "expert": {"color": "tab:green", "linestyle": "--"},
    "matrix": {"color": "tab:olive", "marker": "^"},
    "fused": {"color": "tab:blue", "marker": "o"},
    "fused, sparse": {"color": "tab:orange", "marker": "D"},
    "fused[compiled], without node": {"color": "tab:blue", "marker": "s", "linestyle": "-.", "alpha": 0.6},
}
OURS = {"compiled": "-", "triton": "--", "torch": ":"}  # a line style for each backend
# Two lines coincide with two others.
AROUND = {
    name: {"marker": "o", "markersize": 10, "markerfacecolor": "none", "zorder": 3} for name in ("eager", "expert")
}
FAMILY = (256, 26702)
D = 512


def style(provider: str) -> dict[str, Any]:
    """Of a line: colour by what is called, dashes by backend."""
    backend = provider.partition("[")[2].rstrip("]")
    base = {"linewidth": 1.8, "markersize": 5}
    if provider in STYLE:
        return base | STYLE[provider]
    if provider.startswith("fused["):
        return base | {"color": "tab:blue", "marker": "o", "linestyle": OURS[backend]}
    if provider.startswith("loss_and_grad["):
        return base | {"color": "tab:orange", "marker": "D", "linestyle": OURS[backend]}
    return base


def draw_all(results: Path, out: Path, prefix: str = "bench_") -> str:
    """Draw every picture that has figures; return which were drawn, or why none was."""
    if find_spec("matplotlib") is None:
        return "no pictures: matplotlib is not installed"
    out.mkdir(parents=True, exist_ok=True)
    loss = [row for row in read(results / "loss.csv") if row["dtype"] == "float32"]
    linear, distributional = read(results / "linear.csv"), read(results / "distributional.csv")
    drawn = []
    for name, draw in (
        ("speed", lambda path: speed(loss, path)),
        ("floor", lambda path: floor(loss, path)),
        ("memory", lambda path: memory(loss, linear, path)),
        ("distributional", lambda path: distributions(distributional, path)),
    ):
        if draw(out / f"{prefix}{name}.png"):
            drawn.append(f"{prefix}{name}.png")
    return "pictures: " + (", ".join(drawn) or "none")


def shown(providers: Iterable[str]) -> list[str]:
    """What a picture has room for: the PyTorch backend is in the tables."""
    return [name for name in providers if name not in ("eager", "floor") and not name.endswith("[torch]")]


def speed(rows: Sequence[Row], path: Path) -> bool:
    """Times as fast as eager by size, plain loss."""
    rows = [row for row in rows if row["variant"] == "dqn"]
    return by_size(rows, "speedup", "times as fast as eager", 1.0, "eager", lambda value, _: f"{value:g}x", path)


def floor(rows: Sequence[Row], path: Path) -> bool:
    """Share of the floor's rate by size, plain loss."""
    rows = [row for row in rows if row["variant"] == "dqn"]
    label = "bytes per second, of the floor's rate"
    return by_size(rows, "of_floor", label, 1.0, "floor", lambda value, _: f"{100 * value:g} %", path)


def by_size(
    rows: Sequence[Row],
    column: str,
    ylabel: str,
    level: float,
    level_name: str,
    tick: Callable[[float, Any], str],
    path: Path,
) -> bool:
    from matplotlib.figure import Figure

    if not rows:
        return False
    sizes = sorted({(row["n"], row["A"]) for row in rows}, key=lambda size: (size[0] * size[1], size))
    figure = Figure(figsize=(8, 4.6), layout="constrained")  # without pyplot, so no display is needed
    axes = figure.add_subplot()
    axes.axhline(level, color="0.25", linestyle="--", linewidth=1.2, label=level_name)
    names = shown(tables.seen(rows))
    for name in names if level_name == "eager" else ["eager", *names]:
        points = {(row["n"], row["A"]): row[column] for row in rows if row["provider"] == name}
        xs = [i for i, size in enumerate(sizes) if size in points]
        line = style(name) | ({"marker": "x"} if name == "eager" else {})
        axes.plot(xs, [points[sizes[i]] for i in xs], label=name, **line)
    axes.set(yscale="log", ylabel=ylabel, xlabel="batch n x actions A, float32, in the order of n A")
    axes.set_xticks(range(len(sizes)), [f"{n} x {A}" for n, A in sizes], rotation=40, ha="right", fontsize="small")
    low, high = axes.get_ylim()
    ticks = [base * 10.0**power for power in range(-4, 4) for base in (1, 2, 5)]
    axes.set_yticks([value for value in ticks if low <= value <= high])
    axes.yaxis.set_major_formatter(tick)
    axes.minorticks_off()
    _finish(figure, axes, path)
    return True


def memory(loss: Sequence[Row], linear: Sequence[Row], path: Path) -> bool:
    """Peak memory of the linear head by the number of actions, and of the family in gradients."""
    from matplotlib.figure import Figure

    heads = [row for row in linear if row["D"] == D and row["variant"] == "dqn" and row["peak_bytes"] != ""]
    heads = [row for row in heads if row["dtype"] == "float32"]
    family = [row for row in loss if (row["n"], row["A"]) == FAMILY and row["peak_bytes"] != ""]
    if not heads or not family:
        return False
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in tables.seen(heads):
        points = sorted((row["A"], row["peak_bytes"] / 1e6) for row in heads if row["provider"] == name)
        left.plot(*zip(*points, strict=True), label=name, **style(name) | AROUND.get(name, {}))
    left.set(xscale="log", yscale="log", xlabel="actions A", ylabel="peak memory of a call, MB")
    left.set_title(f"linear head, {heads[0]['n']} rows of {D} features", fontsize="medium")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.legend(frameon=False, fontsize="small")
    names = [
        name for name in ("eager", *shown(tables.seen(family))) if name != "TorchRL"
    ]  # which has the plain loss only
    _bars(right, family, names, lambda row: row["variant"], lambda row: row["peak_bytes"] / (4 * row["n"] * row["A"]))
    right.set_xlabel("peak memory of a call, in gradients of q (n x A)")
    right.set_title(f"loss and gradient, {FAMILY[0]} x {FAMILY[1]}", fontsize="medium")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    return True


def distributions(rows: Sequence[Row], path: Path) -> bool:
    """Times as fast as eager, and peak memory in gradients, of each distributional loss and size."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["dtype"] == "float32" and row["peak_bytes"] != ""]
    if not rows:
        return False
    names = shown(tables.seen(rows))
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(set(map(tables.of_variant, rows)))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, rows, names, tables.of_variant, lambda row: row["speedup"])
    _bars(
        right,
        rows,
        ["eager", *names],
        tables.of_variant,
        lambda row: row["peak_bytes"] / (4 * row["n"] * row["A"] * row["K"]),
    )
    for axes, label in ((left, "times as fast as eager"), (right, "peak memory of a call, in gradients (n x A x K)")):
        axes.set(xscale="log", xlabel=label)
        axes.set_xlim(left=0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    return True


def _bars(
    axes: Any, rows: Sequence[Row], names: Sequence[str], group: Callable[[Row], str], value: Callable[[Row], float]
) -> None:
    """A group of horizontal bars for each label, a bar in it for each provider, and a line at one."""
    labels = list(dict.fromkeys(group(row) for row in rows))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        values = {group(row): value(row) for row in rows if row["provider"] == name}
        ys = [y + (i - (len(names) - 1) / 2) * height for y, label in enumerate(labels) if label in values]
        widths = [values[label] for label in labels if label in values]
        axes.barh(ys, widths, height * 0.9, label=name, color=style(name)["color"])
    axes.axvline(1.0, color="0.25", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
