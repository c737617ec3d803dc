"""The benchmark itself: what it compares is equal, what it counts is right, and the pages say what the CSV says."""

import gc
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from bench.__main__ import parse
from bench.gpu_code.machine_code import widest
from bench.gpu_code.occupancy import occupancy
from bench.measure import distributional, gpu, graph, linear, loss, machine, suite, update
from bench.measure.cuda import launches
from bench.measure.deadline import Deadline
from bench.measure.gate import passed
from bench.measure.memory import peak_memory
from bench.measure.progress import track
from bench.measure.providers import Provider, can_compile, providers
from bench.measure.rlax_process import RlaxProcess
from bench.measure.timing import figures, interleaved
from bench.measure.traffic import least_bytes
from bench.measure.variants import VARIANTS, Variant, matrix, random_arguments
from bench.reporting import plots, ranks, report, tables
from bench.reporting.results import COLUMNS, Table, read
from dqn_fused._backends import serving

F32 = torch.float32


def has(*packages: str) -> bool:
    return all(find_spec(package) is not None for package in packages)


@pytest.fixture(scope="module")
def rlax() -> Iterator[RlaxProcess]:
    with RlaxProcess() as process:
        yield process


def agree(variant: str, rlax: RlaxProcess | None = None, dtype: torch.dtype = F32, compiled: bool = False) -> set[str]:
    """Names of the providers that equal eager; none may differ."""
    batch = random_arguments(VARIANTS[variant], 7, 5, dtype, "cpu")
    problems: list[str] = []
    found = passed(providers(variant, batch, "cpu", compiled, rlax), dtype, variant, problems)
    assert not problems
    return set(found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_provider_agrees_with_eager(variant: str) -> None:
    ours = {f"{what}[{name}]" for name in serving(torch.device("cpu")) for what in ("fused", "loss_and_grad")}
    assert agree(variant) >= {"eager", *ours}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_provider_agrees_with_eager_in_half_precision(dtype: torch.dtype) -> None:
    assert "loss_and_grad[torch]" in agree("dqn", dtype=dtype)


@pytest.mark.skipif(not has("jax", "rlax"), reason="no rlax")
@pytest.mark.parametrize("variant", ["dqn", "double"])
def test_rlax_agrees_with_eager_and_is_timed_in_its_own_process(variant: str, rlax: RlaxProcess) -> None:
    assert "rlax" in agree(variant, rlax)
    assert rlax.seconds(2) > 0


def test_rlax_takes_no_part_where_it_has_no_such_loss(rlax: RlaxProcess) -> None:
    assert "rlax" not in agree("munchausen", rlax)


@pytest.mark.skipif(not has("torchrl", "tensordict"), reason="no TorchRL")
def test_torchrl_agrees_with_eager() -> None:
    assert "TorchRL" in agree("dqn")


@pytest.mark.graph
def test_torch_compile_agrees_with_eager() -> None:
    if not can_compile():
        pytest.skip("no compiler")
    assert "torch.compile" in agree("dqn", compiled=True)


def test_a_wrong_result_gets_no_figure() -> None:
    right = torch.tensor(1.0), torch.tensor([1.0, 0.0])
    makers = {
        "eager": lambda: Provider(lambda: right),
        "other loss": lambda: Provider(lambda: (torch.tensor(1.01), right[1])),
        "other gradient": lambda: Provider(lambda: (right[0], torch.tensor([1.0, 0.01]))),
        "broken": lambda: Provider(lambda: [][0]),
    }
    problems: list[str] = []
    assert list(passed(makers, F32, "here", problems)) == ["eager"]
    assert [problem.split(",")[0] for problem in problems] == ["other loss", "other gradient", "broken"]


def test_arguments_are_the_same_on_every_run() -> None:
    first, again = (random_arguments(VARIANTS["prioritised"], 4, 3, F32, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def fake_timer(order: list[str], name: str, cost: float) -> Any:
    def timer(repeats: int) -> float:
        order.append(name)
        return repeats * cost

    return timer


def test_every_round_has_each_provider_once_and_ratios_are_paired() -> None:
    order: list[str] = []
    costs = {"slow": 0.02, "fast": 0.01}
    times = interleaved({name: fake_timer(order, name, cost) for name, cost in costs.items()}, seconds=0.4, rounds=4)
    rounds = [set(order[-8:][i : i + 2]) for i in range(0, 8, 2)]
    assert rounds == [{"slow", "fast"}] * 4
    assert times == {"slow": [pytest.approx(0.02)] * 4, "fast": [pytest.approx(0.01)] * 4}
    # A disturbance of whole rounds leaves the paired ratio alone, as it would not leave the ratio of medians.
    found = figures([1.0, 10.0, 3.0], [2.0, 20.0, 6.0])
    assert found == (3e6, 1e6, 10e6, 2.0)


def test_no_provider_keeps_its_neighbours() -> None:
    """In an order that only alternates, the last of five never follows the first three."""
    names, rounds = "abcde", 31
    runs: list[list[str]] = [[], []]
    for order in runs:
        interleaved({name: fake_timer(order, name, 0.01) for name in names}, seconds=0.31, rounds=rounds)
    order, again = (run[-len(names) * rounds :] for run in runs)
    assert order == again
    follows = set(zip(order[1:], order[:-1], strict=True))
    assert follows >= {(name, other) for name in names for other in names if name != other}


def test_slow_calls_are_not_warmed_up_at_length() -> None:
    calls: list[int] = []

    def timer(repeats: int) -> float:
        calls.append(repeats)
        return float(repeats)

    interleaved({"slow": timer}, seconds=0.1, rounds=3)
    assert calls == [1] * 4


def test_a_hiccup_does_not_settle_how_often_a_call_is_repeated() -> None:
    calls: list[int] = []

    def timer(repeats: int) -> float:
        calls.append(repeats)
        return 0.02 if len(calls) == 1 else 0.001 * repeats

    interleaved({"quick": timer}, seconds=0.1, rounds=10)
    assert calls[-10:] == [10] * 10


@pytest.mark.parametrize(
    ("variant", "itemsize", "expected"),
    [
        ("dqn", 4, 6 * 4 * 2),  # next_q, and the gradient
        ("double", 4, 6 * 4 * 2),  # next_q_online; of next_q one element a row
        ("clipped double", 4, 6 * 4 * 3),  # next_q of two networks
        ("masked double", 2, 6 * 2 + 6 + 6 * 2),  # a byte an element of the mask
        ("munchausen", 4, 6 * 4 * 3),  # next_q and target_q
        ("cql", 2, 6 * 2 * 4),  # next_q_online, and q twice
    ],
)
def test_fewest_bytes(variant: str, itemsize: int, expected: int) -> None:
    assert least_bytes(VARIANTS[variant], 2, 3, itemsize) == expected


def test_every_matrix_that_is_counted_is_an_argument() -> None:
    for variant in VARIANTS.values():
        batch = random_arguments(variant, 2, 3, F32, "cpu")
        assert all(matrix(batch, name).shape == (2, 3) for name in variant.reads)


def test_peak_memory_is_not_lowered_by_garbage_of_before() -> None:
    def call() -> torch.Tensor:
        gc.collect()
        return torch.zeros(1 << 20, dtype=torch.uint8)

    call()
    cycle: list[Any] = [torch.zeros(1 << 22, dtype=torch.uint8)]
    cycle.append(cycle)
    del cycle
    assert peak_memory(call) == 1 << 20


MEASURED: dict[str, Any] = {
    "loss": lambda problems: loss.measure(
        loss.Work("cql", 5, 4, compiled=False), "cpu", 0.001, problems, RlaxProcess()
    ),
    "linear": lambda problems: [
        row
        for variant in linear.OPTIONS
        for row in linear.measure(linear.Work(30, 8, variant, n=6), "cpu", 0.001, problems, rounds=2)
    ],
    "update": lambda problems: update.measure(update.CARTPOLE, "cpu", 0.001, problems),
    "graph": lambda problems: graph.measure(graph.Work("prioritised", 8, 4), "cpu", 0.001, problems),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_rows_hold_what_their_schema_says(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "can_compile", lambda: False)  # 10 s
    monkeypatch.setattr(graph, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    threads, problems = torch.get_num_threads(), list[str]()
    rows = MEASURED[kind](problems)
    assert not problems
    assert torch.get_num_threads() == threads
    table = Table(tmp_path, kind)
    table.add(rows)
    assert read(table.path) == table.rows
    eager = next(row for row in table.rows if row["provider"] == "eager")
    scalar = {"K"} if kind == "graph" else set()
    assert [name for name in COLUMNS[kind] if eager[name] == ""] == [
        name for name in COLUMNS[kind] if name in ("device_us", "graph_us", *scalar)
    ]
    assert eager["speedup"] == 1.0
    assert eager["us_p20"] <= eager["us"] <= eager["us_p80"]
    assert eager["threads"] == (1 if kind in ("update", "graph") else threads)
    assert tables.tables(kind, table.rows)
    with pytest.raises(ValueError, match="unheard"):
        table.add([{"unheard": 1}])


def test_of_the_floor() -> None:
    """A provider that takes twice the floor's time for the same bytes has half its rate."""
    rows = {
        row["provider"]: row
        for row in loss.measure(loss.Work("cql", 64, 32, compiled=False), "cpu", 0.01, [], RlaxProcess())
    }
    floor, eager = rows["floor"], rows["eager"]
    assert floor["bytes"] == 3 * 64 * 32 * 4  # q once
    assert eager["bytes"] == 4 * 64 * 32 * 4
    assert eager["of_floor"] == pytest.approx(4 / 3 * floor["us"] / eager["us"], rel=1e-2)


def test_a_deadline_is_divided_over_the_work() -> None:
    now = [100.0]
    deadline, dropped = Deadline(10.0, lambda: now[0]), list[str]()
    shares = []
    for item, share in deadline.over(["a", "b", "c", "d"], dropped, least=1.0):
        shares.append((item, share))
        now[0] += 1.0 if item == "a" else 8.5
    assert shares == [("a", 2.5), ("b", 3.0)]
    assert dropped == ["c", "d"]
    assert Deadline(10.0, lambda: now[0]).part(0.25).left() == 2.5
    assert Deadline().part(0.25).left() == math.inf


def test_a_crash_in_one_piece_of_work_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def measure(piece: str, device: str, seconds: float, problems: list[str]) -> list[dict[str, Any]]:
        now[0] += 4.0
        if piece == "bad":
            raise RuntimeError("out of memory")
        return [{"provider": piece}]

    monkeypatch.setitem(suite.KINDS, "linear", SimpleNamespace(measure=measure))
    problems: list[str] = []
    work = ["good", "bad", "also good", "late"]
    suite.measure("linear", work, tmp_path, "cpu", 1.0, problems, Deadline(12.0, lambda: now[0]))
    assert [row["provider"] for row in read(tmp_path / "linear.csv")] == ["good", "also good"]
    assert problems == ["bad: RuntimeError: out of memory", "linear late: no time left"]


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(track("ab", 2, "letters", str.upper)) == ["a", "b"]
    assert capsys.readouterr().err == "letters 1/2: A\nletters 2/2: B\n"


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "check_output", missing)
    machine.commit.cache_clear()
    assert machine.commit() == "unknown"
    machine.commit.cache_clear()


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for load, said in ((1.9, False), (2.1, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert (machine.busy() is not None) == said


@pytest.mark.parametrize("name", distributional.FAMILIES)
def test_distributional_losses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passes the gate against the lines written by hand, and gives a row for each provider."""
    monkeypatch.setattr(distributional, "can_compile", lambda: False)
    problems: list[str] = []
    work = distributional.Work(name, 6, 3, 5)
    rows = distributional.measure(work, "cpu", 0.001, problems)
    assert not problems
    assert rows[0]["provider"] == "eager"
    assert len(rows) == 1 + 2 * len(serving(torch.device("cpu"), distributional.FAMILIES[name].backends))
    table = Table(tmp_path, "distributional")
    table.add(rows)
    assert read(tmp_path / "distributional.csv") == table.rows
    assert f"| {name}, 6 x 3 x 5 |" in tables.distributional(rows)


def test_the_pages_say_what_the_csv_says() -> None:
    wanted = report.sections(report.result_folders()) | ranks.sections()
    text = {page: page.read_text() for page in report.pages()}
    marked = [name for page in text.values() for name in report.marked(page)]
    own = {f"cpu/{kind}" for kind in ("summary", "loss", "family", "linear", "distributional", "update", "graph")}
    assert len(set(marked)) == len(marked)
    assert own | {"kernels", "host"} | set(ranks.sections()) <= set(marked) <= set(wanted)
    for page in text.values():
        assert report.stale(page, wanted) == [], "run python -m bench report"
        assert report.replaced(page, wanted) == page


def test_a_changed_digit_in_a_page_is_noticed() -> None:
    wanted = report.sections(report.result_folders()) | ranks.sections()
    for page in report.pages():
        whole = page.read_text()
        for name, text in report.marked(whole).items():
            digits = [match.start() for match in re.finditer(r"\d", text)]
            for where in (digits[0], digits[len(digits) // 2], digits[-1]):
                other = text[:where] + str((int(text[where]) + 1) % 10) + text[where + 1 :]
                assert report.stale(whole.replace(text, other), wanted) == [name]


@pytest.mark.parametrize("name", graph.DISTRIBUTIONAL_SIZES)
def test_graphs_of_distributional_losses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problems: list[str] = []
    rows = graph.measure(graph.Work(name, 6, 3, 5), "cpu", 0.001, problems)
    assert not problems
    backends = serving(torch.device("cpu"), distributional.FAMILIES[name].backends)
    expected = ["no loss", "eager", "fused", *(f"fused[{x}]" for x in backends if x != "triton"), "eager, again"]
    assert [row["provider"] for row in rows] == expected
    table = Table(tmp_path, "graph")
    table.add(rows)
    assert read(table.path) == table.rows
    assert f"| {name}, 6 x 3 x 5 |" in tables.graph(table.rows)


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_a_graph_has_both_target_networks(kind: str) -> None:
    """The graph computes one of them; where its values are infinite, those of the other are the minimum."""
    loss_of_outputs = graph.loss_of(graph.Work("clipped double", 8, 4), "cpu", kind)
    q = torch.randn(8, 4)
    values = [loss_of_outputs(q, torch.full((8, 4), value)).item() for value in (math.inf, 0.0)]
    assert math.isfinite(values[0])
    assert values[0] != values[1]


def test_report_of_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    row = {"n": 32, "A": 18, "dtype": "float32", "threads": 1, "cores": 2, "device": "H200"}
    found = []
    for variant, slower in (("dqn", 0.01), ("cql", 0.04)):
        found += [
            row | {"variant": variant, "provider": "no loss", "us": 100.0},
            row | {"variant": variant, "provider": "eager", "us": 120.0, "adds_us": 20.0, "behind": 0.0},
            row | {"variant": variant, "provider": "fused", "us": 90.0, "adds_us": -10.0, "behind": slower},
            row | {"variant": variant, "provider": "eager, again", "us": 121.0, "adds_us": 21.0, "behind": -slower},
        ]
    Table(folder, "graph").add(found)
    text = report.sections([folder], tmp_path)["nvidia-h200/graph"]
    assert "| loss, n x A, or n x A x K | no loss | eager | fused |" in text
    assert "| cql, 32 x 18 | 100 us | +20 us | -10 us (+4.0 %) |" in text
    assert "Furthest behind the graph of eager's lines: fused +4.0 % at cql, 32 x 18. The graph of" in text
    assert "The graph of eager's lines, timed under two names, differs from itself by 4.0 %, at most 4.0 %." in text
    Table(folder, "graph").add(row for row in found if row["provider"] != "eager, again")  # as in earlier figures
    assert text.startswith(report.sections([folder], tmp_path)["nvidia-h200/graph"])
    assert tables.tables("graph", read(folder / "graph.csv"))


def test_report_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    row = {"variant": "dqn", "n": 32, "A": 18, "dtype": "float32", "threads": 1, "cores": 2, "peak_bytes": ""}
    row |= {"device": "H200", "us_p20": 1.0, "us_p80": 9.0}
    ours = "loss_and_grad[triton]"
    Table(folder, "loss").add(
        [
            row | {"provider": "eager", "us": 200.0, "speedup": 1.0},
            row | {"provider": "torch.compile", "us": 400.0, "speedup": 0.5},
            row | {"provider": ours, "us": 50.0, "speedup": 4.0},
        ]
    )
    found = report.sections([folder], tmp_path)
    assert list(found) == ["nvidia-h200/loss"]
    text = found["nvidia-h200/loss"]
    assert f"| n x A | eager | torch.compile | `{ours}` | floor |" in text
    assert "| 32 x 18 | 200 us (1.00x) | 400 us (0.50x) | 50 us (4.00x) |  |" in text
    assert "Slower than eager: torch.compile at every size." in text
    readme = "before\n<!-- bench:nvidia-h200/loss -->\nold\n<!-- /bench:nvidia-h200/loss -->\nafter\n"
    assert report.stale(readme, found) == ["nvidia-h200/loss"]
    new = report.replaced(readme, found)
    assert report.stale(new, found) == []
    assert new.startswith("before\n<!-- bench")
    assert new.endswith("-->\nafter\n")


@pytest.mark.skipif(not has("matplotlib"), reason="no matplotlib")
def test_pictures(tmp_path: Path) -> None:
    names = [f"bench_{name}.png" for name in ("speed", "floor", "memory", "distributional")]
    assert plots.draw_all(report.RESULTS / "cpu", tmp_path) == f"pictures: {', '.join(names)}"
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    assert plots.draw_all(tmp_path / "nothing", tmp_path) == "pictures: none"


def test_no_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in plots.draw_all(report.RESULTS / "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


def test_launches_are_counted_by_call() -> None:
    x = torch.randn(8, 8)
    found = {launch.name: launch.times for launch in launches(lambda: x.exp() + x.exp(), "cpu", times=5)}
    assert found["aten::exp"] == 2.0
    assert found["aten::add"] == 1.0


def test_profile_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROFILED", [(32, 18)])
    lines, problems = list[object](), list[str]()
    rows = gpu.profile(tmp_path, "cpu", lines.append, problems, Deadline())
    assert not problems
    assert read(tmp_path / "launches.csv") == rows
    total = {
        name: sum(row["count"] for row in rows if row["provider"] == name and row["case"] == "32 x 18")
        for name in ("eager", "loss_and_grad[torch]")
    }
    assert min(total.values()) > 10
    assert len(lines) == len(gpu.profiled("cpu"))
    gpu.profile(tmp_path, "cpu", lines.append, problems, Deadline(0.0))
    assert len(problems) == len(gpu.profiled("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_gpu_is_refused_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(tmp_path / "out", 0.1, ["dqn"], ["loss"], 10.0) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_line() -> None:
    assert parse([]).what == "full"
    assert parse(["quick", "--only", "update", "--variants", "dqn", "cql"]).variants == ["dqn", "cql"]
    for size in ("quick", "full"):
        names = {work.variant for work in getattr(loss, size)("cpu", ["cql"])}
        assert names == {"cql"}
        assert all(isinstance(VARIANTS[work.variant], Variant) for work in getattr(loss, size)("cuda", list(VARIANTS)))


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (32, 128, 0, 1.0),
        (40, 128, 0, 0.75),  # 1,280 registers a warp: 12 in each quarter of the file
        (255, 256, 0, 0.125),
        (32, 256, 98_304, 0.25),  # two blocks of shared memory
        (16, 32, 0, 0.5),  # 32 blocks of a warp
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, expected: float) -> None:
    assert occupancy("sm_90", registers, threads, shared) == expected
    assert occupancy("gfx942", registers, threads, shared) is None


def test_widest_access_in_machine_code() -> None:
    nvidia = "LDG.E.U8 R2 ;\n LDG.E.64 R2 ;\n LDGSTS.E.BYPASS.LTC128B.128 [R1] ;\n STG.E [R2] ;\n LDS.128 R1"
    assert (widest(nvidia, "load"), widest(nvidia, "store")) == (128, 32)
    amd = "global_load_ubyte v1\n global_load_dwordx2 v[1:2]\n global_store_b128 v1"
    assert (widest(amd, "load"), widest(amd, "store")) == (64, 128)
    assert widest("EXIT", "load") == 0


@pytest.mark.aot
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_the_table_of_kernels() -> None:
    pytest.importorskip("triton")
    from bench.gpu_code import aot, kernels

    index = [target.name for target in aot.TARGETS].index("sm_90")
    cases = [kernels.Case("narrow", "dqn", (8, 4), F32), kernels.Case("wide", "masked double", (16, 512), F32)]
    cases.append(kernels.Case("quantiles", "quantile", (8, 3, 16), F32))
    cases.append(kernels.Case("atoms", "categorical", (8, 3, 16), F32))
    cases.append(kernels.Case("head soft", "sweep", (8, 64, 16), F32))
    cases.append(kernels.Case("head backward", "sweep", (8, 64, 16), F32))
    rows = list(kernels.of_target(index, cases))
    assert {name for row in rows for name in row} <= set(COLUMNS["kernels"])
    for row in rows:
        if row["kernel"] in ("td_loss_bwd_kernel", "rows_bwd_kernel"):
            assert row["stored_bytes"] == row["bytes"], "the gradient is stored once"
        assert row["instructions"] >= row["integer"] + row["float"] + row["special"] > 0
    found = {(row["case"], row["call"], row["kernel"]): row for row in rows}
    assert found["narrow", "loss_and_grad", "td_loss_fwd_kernel"]["bytes"] == 2 * 8 * 4 * 4
    reading = found["wide", "forward", "row_fwd_kernel"]
    assert reading["load_bits"] == 128
    assert reading["bytes"] == 16 * 512 * (4 + 1)
    assert 0 < reading["occupancy"] <= 1
    assert found["wide", "forward", "td_loss_fwd_kernel"]["bytes"] == 0
    assert found["wide", "backward", "td_loss_bwd_kernel"]["store_bits"] == 128
    assert found["wide", "backward", "td_loss_bwd_kernel"]["bytes"] == 16 * 512 * 4
    backward = found["head backward", "sweep", "sweep_bwd_kernel"]
    assert backward["bytes"] == 4 * (8 * 64 + 8 * 16 + 64 * 16)
    assert backward["stored_bytes"] == 4 * (8 * 64 + 64), "the gradient, and its sums over the rows"
    assert found["head soft", "sweep", "sweep_fwd_kernel"]["loaded_bytes"] > 0
    for name, forward in (("quantiles", "quantile_fwd_kernel"), ("atoms", "categorical_fwd_kernel")):
        for call, kernel in (("forward", forward), ("backward", "rows_bwd_kernel")):
            assert found[name, call, kernel]["bytes"] == 8 * 3 * 16 * 4
