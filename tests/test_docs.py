"""The documentation: links lead somewhere, code runs, and what is made by a program is what it makes."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
N, A, K, D, FEATURES = 6, 4, 5, 8, 3


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if page.parent.name == "docs":  # a site has nothing else
            assert linked.parent == page.parent, target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r"[\w/]+\.md", navigation)) == {page.name for page in PAGES if page.parent.name == "docs"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def names(page: str) -> dict[str, Any]:
    """What the code of a page supposes to be there."""
    torch.manual_seed(0)
    actions, rewards = torch.randint(A, (N,)), torch.randn(N)
    found: dict[str, Any] = {
        "torch": torch, "nn": nn, "n": N, "actions": actions, "rewards": rewards, "gamma": 0.99,
        "terminated": torch.rand(N) < 0.3, "states": torch.randn(N, FEATURES), "next_states": torch.randn(N, FEATURES),
        "next_value": torch.randn(N), "steps": torch.full((N,), 3.0), "weights": torch.rand(N),
        "next_legal": torch.ones(N, A, dtype=torch.bool),
    }  # fmt: skip
    if page == "docs/distributional.md":
        outputs = lambda: nn.Sequential(nn.Linear(FEATURES, A * K), nn.Unflatten(1, (A, K)))  # noqa: E731
        quantiles = lambda states, taus: torch.rand(N, A, 1, requires_grad=True) + taus.unsqueeze(1)  # noqa: E731
        found |= {"iqn": quantiles, "target_iqn": quantiles, "critic": nn.Linear(FEATURES, K), "weights": torch.rand(N)}
    else:
        outputs = lambda: nn.Linear(FEATURES, A)  # noqa: E731
    found |= {"q_network": outputs(), "target_network": outputs()}
    found |= {name: nn.Linear(FEATURES, D) for name in ("body", "target_body")}
    if page == "docs/ranks.md":  # in one process, which is a group of itself
        one = SimpleNamespace(**found, target=rewards)
        found |= {name: torch.randn(N, D, requires_grad=name == "hidden") for name in ("hidden", "next_hidden")}
        found |= {name: torch.randn(A, D) for name in ("weight", "next_weight")}
        found |= {name: torch.randn(A) for name in ("bias", "next_bias")}
        found |= {"mask": torch.ones(N, A, dtype=torch.bool), "group": None, "parts": [one], "weights": one.weights}
    return found | {name: nn.Linear(D, A) for name in ("head", "target_head")}


@every_page
def test_code(page: Path) -> None:
    """Blocks of Python are run, one after the other, with the names that the page supposes."""
    name = str(page.relative_to(ROOT))
    there = names(name)
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, name, "exec"), there)
        loss = there.get("loss")
        assert loss is None or loss.isfinite()


def test_diffs_are_of_the_present_names() -> None:
    """Lines that a diff adds call functions that exist, with arguments that they have."""
    import ast
    import inspect

    import dqn_fused

    calls = 0
    for page in PAGES:
        for diff in re.findall(r"^```diff\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            added = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
            code = "\n".join(line[4:] if line.startswith("    ") else line for line in added.splitlines())
            for node in ast.walk(ast.parse(added if _parses(added) else code)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in dqn_fused.__all__:
                    bound = inspect.signature(getattr(dqn_fused, node.func.id)).bind(
                        *node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
                    )
                    assert "unknown" not in bound.arguments
                    calls += 1
    assert calls >= 3


def _parses(code: str) -> bool:
    import ast

    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def test_the_page_of_mistakes_is_what_its_program_makes() -> None:
    spec = importlib.util.spec_from_file_location("mistakes", ROOT / "docs/mistakes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/mistakes.md").read_text() == module.page(), "run python docs/mistakes.py docs/mistakes.md"
    assert all("no error" not in module.message(call) for _, call in module.MISTAKES)
