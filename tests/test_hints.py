"""The errors for mistaken keywords, and the warning for q and next_q exchanged."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import assert_agree
from conftest import Setting
from test_loss import make, to_device

import dqn_fused
from dqn_fused import FusedDQNLoss, fused_dqn_loss, fused_dqn_loss_and_grad, fused_td_loss
from dqn_fused.hints import CALLED_HERE
from dqn_fused.reference import dqn_loss

FUNCTIONS: list[Callable[..., Any]] = [fused_dqn_loss, fused_dqn_loss_and_grad, dqn_loss, FusedDQNLoss()]


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "FusedDQNLoss")


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
@pytest.mark.parametrize("keyword", CALLED_HERE)
def test_mistaken_keywords(function: Callable[..., Any], keyword: str) -> None:
    arguments = make((4, 3))
    expected = f"{name_of(function)}: unexpected argument {keyword!r}; it is called {CALLED_HERE[keyword]} here"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        function(**arguments, **{keyword: arguments["rewards"]})


def test_keywords_that_nobody_uses() -> None:
    arguments = make((4, 3))
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=f"^{name_of(function)}: unexpected argument 'colour'$"):
            function(**arguments, colour=1)
    with pytest.raises(TypeError, match=r"^FusedDQNLoss: unexpected argument 'discount'; it is called gamma here$"):
        FusedDQNLoss(discount=0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^fused_td_loss: unexpected argument 'weight'; it is called weights here$"):
        fused_td_loss(arguments["q"], arguments["actions"], arguments["rewards"], weight=1)  # type: ignore[arg-type]


OTHERS = [
    (name, getattr(dqn_fused, name))
    for name in dqn_fused.__all__
    if name.startswith(("fused_linear", "fused_quantile", "fused_categorical"))
]


@pytest.mark.parametrize(("name", "function"), OTHERS, ids=[name for name, _ in OTHERS])
def test_mistaken_keywords_of_the_other_losses(name: str, function: Callable[..., Any]) -> None:
    """The names that every loss shares are translated, those of the scalar loss are not."""
    positional = [x for x in inspect.signature(function).parameters.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
    given, count = [torch.zeros(1)] * 9, sum(x.default is x.empty for x in positional)
    support = {"support": (0.0, 1.0)} if "categorical" in name else {}
    for keyword, more in (("action", "; it is called actions here"), ("q_values", ""), ("colour", "")):
        with pytest.raises(TypeError, match=f"^{name}: unexpected argument {keyword!r}{more}$"):
            function(*given[:count], **support, **{keyword: 1})


@pytest.mark.parametrize(
    "module", ["FusedLinearDQNLoss", "FusedQuantileLoss", "FusedCategoricalLoss", "FusedCategoricalTDLoss"]
)
def test_mistaken_keywords_of_modules(module: str) -> None:
    support = {"support": (0.0, 1.0)} if "Categorical" in module else {}
    with pytest.raises(TypeError, match=f"^{module}: unexpected argument 'discount'; it is called gamma here$"):
        getattr(dqn_fused, module)(**support, discount=0.9)


def test_the_page_on_migrating_has_every_name() -> None:
    page = (Path(__file__).parent.parent / "docs/migrating.md").read_text()
    rows = [
        row.split("|")[1:3] for row in page.partition("## Keywords")[2].partition("\n## ")[0].splitlines() if "|" in row
    ]
    for elsewhere, here in CALLED_HERE.items():
        names = set(re.findall(r"\w+", here)) - {"or"}
        known = [there for ours, there in rows if names & set(re.findall(r"\w+", ours))]
        assert any(elsewhere in re.findall(r"\w+", there) for there in known), elsewhere


def test_mistaken_keywords_under_compile() -> None:
    torch.compiler.reset()
    arguments = make((4, 3), torch.float64)
    compiled = torch.compile(lambda **given: fused_dqn_loss(**given), backend="eager")
    assert_agree(compiled(**arguments), fused_dqn_loss(**arguments))
    with pytest.raises(TypeError, match="unexpected argument 'done'; it is called terminated here"):
        compiled(**arguments, done=arguments["terminated"])


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def swapped(setting: Setting) -> dict[str, Any]:
    arguments = {k: to_device(x, setting.device) for k, x in make((4, 3)).items()}
    return arguments | {"q": arguments["q"].detach(), "next_q": arguments["next_q"].detach().requires_grad_()}


@pytest.mark.parametrize("function", [fused_dqn_loss, fused_dqn_loss_and_grad], ids=name_of)
def test_q_and_next_q_exchanged(setting: Setting, function: Callable[..., Any]) -> None:
    arguments = swapped(setting)
    with pytest.warns(UserWarning, match="q does not require a gradient and next_q does: are they swapped") as caught:
        function(**arguments, backend=setting.backend)
    assert [warning.filename for warning in caught] == [__file__], "the line that calls"


@pytest.mark.usefixtures("quiet")
def test_no_warning_where_there_is_no_mistake(setting: Setting) -> None:
    """Not recorded on purpose, or recorded with a next_q that is not detached."""
    arguments = swapped(setting)
    for function in (fused_dqn_loss, fused_dqn_loss_and_grad):
        with torch.no_grad():
            function(**arguments, backend=setting.backend)
        function(**arguments | {"next_q": arguments["next_q"].detach()}, backend=setting.backend)
        function(**arguments | {"q": arguments["q"].clone().requires_grad_()}, backend=setting.backend)
