"""Write the tables of the README and of docs/, the sentences with figures in them, and the pictures, from the CSV.

Each stands between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``; NAME is the results folder and a section of
it, such as cpu/loss, or kernels, or host. Those of ranks, such as ranks/memory, are computed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import median

from bench.measure.machine import ROOT
from bench.reporting import plots, ranks, tables
from bench.reporting.results import Row, read

RESULTS, README, DOCS = ROOT / "bench/results", ROOT / "README.md", ROOT / "docs"
OTHERS = ("eager", "torch.compile", "torch.compile, reduce-overhead", "eager, CUDA graph", "TorchRL", "rlax")


def run(folders: Sequence[Path]) -> None:
    """Render these results folders, the kernels and their launches, into the README and docs/."""
    wanted = sections(folders) | ranks.sections()
    for page in pages():
        text = page.read_text()
        page.write_text(replaced(text, wanted))
        print(f"{page.relative_to(ROOT)}: {', '.join(stale(text, wanted)) or 'nothing'} changed")
    for folder in folders:
        prefix = "bench_" if folder.name == "cpu" else f"bench_{folder.name}_"
        print(f"docs: {plots.draw_all(folder, DOCS, prefix)}")


def pages() -> list[Path]:
    """Those with figures in them."""
    return [page for page in (README, *sorted(DOCS.glob("*.md"))) if marked(page.read_text())]


def result_folders(root: Path = RESULTS) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/loss.csv"))


def sections(folders: Sequence[Path], root: Path = RESULTS) -> dict[str, str]:
    """Name -> markdown, of all that there are figures for."""
    found = {f"{folder.name}/{name}": text for folder in folders for name, text in of_folder(folder).items()}
    for name, section in (("kernels", kernels), ("host", host)):
        if rows := read(root / f"{name}.csv"):
            found[name] = section(rows)
    return found


def marked(readme: str) -> dict[str, str]:
    """Name -> what stands between its marks."""
    return {
        m[1]: m[2].strip("\n") for m in re.finditer(r"<!-- bench:(\S+) -->(.*?)<!-- /bench:\1 -->", readme, re.DOTALL)
    }


def stale(readme: str, wanted: dict[str, str]) -> list[str]:
    """Names between whose marks something else stands."""
    return [name for name, text in marked(readme).items() if name in wanted and wanted[name] != text]


def replaced(readme: str, wanted: dict[str, str]) -> str:
    for name in marked(readme):
        if name in wanted:
            begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
            before, _, rest = readme.partition(begin)
            readme = f"{before}{begin}\n\n{wanted[name]}\n\n{end}{rest.partition(end)[2]}"
    return readme


def of_folder(folder: Path) -> dict[str, str]:
    kinds = ("loss", "linear", "distributional", "update", "graph")
    loss, linear, distributional, update, graph = (read(folder / f"{kind}.csv") for kind in kinds)
    plain = [row for row in loss if row["variant"] == "dqn"]
    family = [row for row in loss if row["variant"] != "dqn"]
    found = {}
    if plain and (short := tables.summary(loss, distributional, linear)):
        found["summary"] = f"{short}\n\n{machine(plain[0])}"
    if plain:
        found["loss"] = f"{tables.loss(plain, columns(plain))}\n\n{machine(plain[0])} {noise(plain)}\n\n{speeds(plain)}"
    if family:
        found["family"] = f"{tables.loss(family, columns(family), memory=True)}\n\n{gradient(family)}"
    if linear:
        found["linear"] = f"{tables.linear(linear)}\n\n{heads(linear)}"
    if distributional:
        names = [name for name in tables.seen(distributional) if not name.endswith("[torch]")]
        found["distributional"] = f"{tables.distributional(distributional, names)}\n\n{pairs(distributional)}"
    if update:
        found["update"] = f"{tables.update(update)}\n\n{shares(update)}"
    if graph:
        found["graph"] = f"{tables.graph(graph)}\n\n{machine(graph[0])} {worst(graph)}{same(graph)}"
    return found


def columns(rows: Sequence[Row]) -> list[str]:
    """What a table has room for: the PyTorch backend, and providers that have few of the losses, are in the CSV."""
    counts = Counter(row["provider"] for row in rows)
    names = [name for name in tables.seen(rows) if 2 * counts[name] >= counts["eager"]]
    ours = [name for name in names if "[" in name and not name.endswith("[torch]")]
    return [name for name in OTHERS if name in names] + ours + ["floor"]


def machine(row: Row) -> str:
    threads = "thread" if row["threads"] == 1 else "threads"
    return (
        f"{row['device']}, {row['cores']} cores, {row['threads']} {threads}, {row['os']}, Python {row['python']}, "
        f"torch {row['torch']}, at {row['commit']}."
    )


def noise(rows: Sequence[Row]) -> str:
    """Spread of the rounds of a typical cell."""
    apart = median((row["us_p80"] - row["us_p20"]) / row["us"] for row in rows)
    return f"From the 20th to the 80th percentile of its rounds a typical cell spans {100 * apart:.0f} % of its time."


def speeds(rows: Sequence[Row]) -> str:
    """From how many to how many times as fast as eager, and where slower."""
    single = [row for row in rows if row["dtype"] == "float32"]
    parts, slower = [], []
    for name in tables.seen(single):
        if name in ("eager", "floor"):
            continue
        own = [row for row in single if row["provider"] == name]
        ratios = [row["speedup"] for row in own]
        parts.append(f"{code(name)} {min(ratios):.2f} to {max(ratios):.2f}")
        behind = [tables.size_of(row) for row in own if row["speedup"] < 1]
        if behind:
            where = "at every size" if len(behind) == len(own) else f"at {', '.join(behind)}"
            slower.append(f"{code(name)} {where}")
    text = f"Times as fast as eager in float32, the least and the most over the sizes: {'; '.join(parts)}."
    return f"{text}\n\nSlower than eager: {'; '.join(slower) or 'none of them'}."


def gradient(rows: Sequence[Row]) -> str:
    largest = max(rows, key=lambda row: row["n"] * row["A"])
    size = 4 * largest["n"] * largest["A"] / 1e6
    return f"The gradient alone is {size:,.1f} MB at {tables.size_of(largest)}."


def pairs(rows: Sequence[Row]) -> str:
    """Memory of the gradients, and the commit of the figures."""
    largest = max(rows, key=lambda row: row["n"] * row["A"] * row["K"])
    size = 4 * largest["n"] * largest["A"] * largest["K"] / 1e6
    return (
        f"The gradient alone is {size:,.1f} MB at {largest['n']} x {largest['A']} x {largest['K']}. {machine(largest)} "
        f"{noise(rows)}"
    )


def heads(rows: Sequence[Row]) -> str:
    """Memory of the gradient of the weight, and the heads for which the matrix is faster."""
    us = {(row["provider"], tables.head_of(row)): row["us"] for row in rows}
    sizes = [size for name, size in us if name == "fused"]
    better = [size for size in sizes if us.get(("matrix", size), inf) < us["fused", size]]
    largest = max(rows, key=lambda row: row["A"] * row["D"])
    return (
        f"The dense gradient of the weight is {4 * largest['A'] * largest['D'] / 1e6:,.1f} MB at {largest['A']:,} x "
        f"{largest['D']} in float32. Faster with the matrix than fused: {', '.join(better) or 'none of these sizes'}."
    )


def shares(rows: Sequence[Row]) -> str:
    """What the whole update gains by a faster loss."""
    text = []
    for network in dict.fromkeys(row["network"] for row in rows):
        found = {row["provider"]: row for row in rows if row["network"] == network and row["mode"] == "eager"}
        eager = found.pop("eager", None)
        if eager is None or eager["share"] == "":
            continue
        gains = [f"{row['speedup']:.2f} times as fast with {code(name)}" for name, row in found.items() if "_" in name]
        part = f"{100 * eager['share']:.1f} % of an update"
        if eager["adds_p20"] < 0 < eager["adds_p80"]:
            part = "within the noise of an update"
        text.append(f"{network}: the eager loss is {part}, and the whole update is {' and '.join(gains)}.")
    return "\n".join(f"- {line}" for line in text)


def worst(rows: Sequence[Row]) -> str:
    """How far each backend's graph is behind that of eager's lines, where it is furthest behind."""
    text = []
    compared = [row for row in rows if row["adds_us"] != "" and row["provider"] not in ("eager", tables.AGAIN)]
    for name in tables.seen(compared):
        row = max((row for row in rows if row["provider"] == name), key=lambda row: row["behind"])
        where = tables.size_of(row) if row["variant"] == "dqn" else tables.of_variant(row)
        text.append(f"{code(name)} {100 * row['behind']:+.1f} % at {where}")
    return f"Furthest behind the graph of eager's lines: {'; '.join(text)}."


def same(rows: Sequence[Row]) -> str:
    """How far eager's graph is from itself under another name: less than that is noise."""
    apart = sorted((row for row in rows if row["provider"] == tables.AGAIN), key=lambda row: abs(row["behind"]))
    if not apart:
        return ""
    middle, most = (100 * abs(row["behind"]) for row in (apart[len(apart) // 2], apart[-1]))
    text = "The graph of eager's lines, timed under two names, differs from itself by"
    return f" {text} {middle:.1f} %, at most {most:.1f} %."


COUNTED = "sm_90"


def kernels(rows: Sequence[Row]) -> str:
    """Those that move matrices, in float32; the linear head's in half precision, too."""
    shown = [row for row in rows if row["language"] == "cuda" or row["bytes"]]
    shown = [row for row in shown if row["dtype"] == "float32" or row["call"] == "sweep"]
    # Where there are many actions loss_and_grad is the launches of forward and backward.
    shown = [row for row in shown if row["call"] != "loss_and_grad" or row["kernel"] == "td_loss_fwd_kernel"]
    about = rows[0]
    executed = [row for row in shown if row["target"] == COUNTED and row.get("loaded_bytes", "") != ""]
    text = f"{tables.kernels(shown, kernel_case)}\n\n"
    if executed:
        text += f"Counted on {COUNTED}:\n\n{tables.counts(executed, kernel_case)}\n\n"
    return f"{text}Triton {about['triton']}, at {about['commit']}."


def host(rows: Sequence[Row]) -> str:
    """The least that a call of the Triton backend costs the host."""
    about = rows[0]
    return f"{tables.host(rows)}\n\n{machine(about)} Triton {about['triton']}."


def kernel_case(row: Row) -> str:
    if row["language"] == "cuda":
        return f"CUDA `{row['kernel']}`"
    whole = ", and the gradient" if row["call"] == "loss_and_grad" else ""
    half = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"`{row['kernel']}`, {row['case']} {row['shape']}{half}{whole}"


def code(name: str) -> str:
    return f"`{name}`" if "[" in name or "_" in name else name
