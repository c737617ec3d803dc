"""Kinds of figures, one CSV each: measure the pieces of work there are, within a deadline if there is one."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.measure import distributional, graph, linear, loss, machine, update
from bench.measure.deadline import Deadline
from bench.measure.progress import track
from bench.measure.rlax_process import RlaxProcess
from bench.reporting import plots, tables
from bench.reporting.results import Row, Table

KINDS: dict[str, ModuleType] = {
    "update": update,
    "linear": linear,
    "distributional": distributional,
    "loss": loss,
    "graph": graph,
}
# Of the time that is left when their turn comes.
SHARES = {"update": 0.2, "linear": 0.3, "distributional": 0.3, "loss": 0.8, "graph": 1.0}
# Under a deadline a provider gets this part of the time of its piece of work; most of the rest is compiling.
PART = 1 / 24


def run(
    out: Path,
    device: str,
    seconds: float,
    variants: Sequence[str],
    size: str = "full",
    only: Sequence[str] = tuple(KINDS),
    deadline: Deadline | None = None,
    say: Callable[[object], None] = print,
) -> list[str]:
    """Measure, write and print; returns what went wrong or was left out, a line each."""
    problems: list[str] = []
    machine.commit()  # before a file of it changes
    if device == "cpu" and (warning := machine.busy()):
        say(f"WARNING: {warning}")
    deadline = deadline or Deadline()
    for kind in [kind for kind in KINDS if kind in only]:
        work = getattr(KINDS[kind], size)(device, list(variants))
        rows = measure(kind, work, out, device, seconds, problems, deadline.part(SHARES[kind]))
        for title, text in tables.tables(kind, rows).items():
            say(f"\n{title}\n\n{text}")
    drawn = plots.draw_all(out, out)
    say(f"\nfigures in {out}: {', '.join(sorted(path.name for path in out.glob('*.csv')))}; {drawn}")
    for problem in problems:
        say(f"NOT MEASURED: {problem}")
    return problems


def measure(
    kind: str,
    work: Sequence[Any],
    out: Path,
    device: str,
    seconds: float,
    problems: list[str],
    deadline: Deadline,
) -> list[Row]:
    """Rows of a kind, written as they come."""
    table, dropped = Table(out, kind), list[Any]()
    with RlaxProcess() as rlax:
        one = partial(loss.measure, rlax=rlax) if kind == "loss" else KINDS[kind].measure
        for piece, share in track(deadline.over(work, dropped), len(work), kind, lambda item: item[0]):
            try:
                table.add(one(piece, device, min(seconds, share * PART), problems))
            except Exception as error:  # out of memory, say: what is measured stays, the rest goes on
                problems.append(f"{piece}: {type(error).__name__}: {error}")
    problems += [f"{kind} {piece}: no time left" for piece in dropped]
    return table.rows
